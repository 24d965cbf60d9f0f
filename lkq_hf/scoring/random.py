"""Random scores: the floor of every comparison."""

from dataclasses import dataclass

import torch

from lkq_hf.scoring.base import PrefillAttention, Scorer


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Keeps entries drawn at random, independently for each layer and head.

    Args:
        seed: the draw is the same for the same seed, layer and shape.
    """

    seed: int = 0

    def score(self, attention: PrefillAttention) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, attention.layer_index)))
        scores = torch.rand(*attention.key.shape[:2], attention.length, generator=generator)
        return scores.to(attention.key.device)
