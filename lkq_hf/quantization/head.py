"""From the last block's hidden states to logits by the model's own forward, for some tokens at a time."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lkq_hf.quantization.capture import BlockCall, replaced_forward

# Logits kept at once, in float32: 256 MiB.
LOGITS = 1 << 26


class Head:
    """What a model does after its blocks: final norm, output embedding, and whatever else follows.

    The model's own forward runs with every block passed over, and the last one returns the hidden states that are
    given. Nothing is known about the model beyond that a block's first argument and result are the hidden states.

    Args:
        model: a causal language model.
        blocks: its blocks.
        calls: of the blocks.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], calls: Sequence[BlockCall]) -> None:
        self.model = model
        self.blocks = blocks
        self.calls = calls
        vocabulary = model.get_output_embeddings().weight.shape[0]
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
        self.tokens = max(1, min(LOGITS // vocabulary, longest))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits, float32 `[tokens, vocabulary]`, of hidden states `[tokens, hidden]`; at most `self.tokens`."""

        def passing_over(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                passed = args[0] if args else next(iter(kwargs.values()))
                result = hidden.unsqueeze(0) if index == len(self.blocks) - 1 else passed
                return self.calls[index].returned(result)

            return forward

        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, passing_over(index)))
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0].float()
