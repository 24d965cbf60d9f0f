"""What later turns keep, against its definition: attention of the learned tokens over a masked full cache."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from models import (
    ARCHITECTURES,
    base_and_adapted,
    kept_entries,
    left_padded,
    lookahead_attention,
    prompt_ids,
    scores_of,
)
from shares import naive_shares
from torch.nn import functional as F

from lkq_hf import LookaheadCache
from lkq_hf.scoring import LookaheadScorer

BUDGET, TOKENS = 9, 5  # learned tokens: see models.add_lookahead


class RecordingScorer(LookaheadScorer):
    """Keeps the scores that the cache asked for."""

    recorded: dict = {}  # noqa: RUF012

    def score(self, attention):
        self.recorded[attention.layer_index] = super().score(attention)
        return self.recorded[attention.layer_index]


@contextmanager
def entries_hidden(base, stages, length):
    """Inside, tokens of an eager forward of ``length`` see only what each head has kept when they are read."""

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"]
        seen = torch.ones(mask.shape[0], 2, length, length, dtype=torch.bool)
        for stage in stages:
            kept = stage[module.layer_idx][:, :, None]
            seen[:, :, kept.shape[-1] :, : kept.shape[-1]] = kept
        hidden = mask.masked_fill(~seen.repeat_interleave(2, dim=1), torch.finfo(mask.dtype).min)
        return args, kwargs | {"attention_mask": hidden}

    with ExitStack() as stack:
        for layer in stages[0] if stages else ():
            attention = base.model.layers[layer].self_attn
            stack.callback(attention.register_forward_pre_hook(hide, with_kwargs=True).remove)
        yield


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_scores_and_kept_entries_are_those_of_the_definition(architecture, attention, allocation):
    """The learned tokens see what each head has kept, and all that came since; the best of both stays."""
    base, adapted = base_and_adapted(architecture)
    adapted.set_attn_implementation(attention)
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 17, seed=1)[0]])
    ids, mask = torch.cat([ids, prompt_ids(2, 24)], dim=1), F.pad(mask, (0, 24), value=1)
    mask[1, 40:43] = mask[0, 52:54] = 0  # of each later turn, one row's part is shorter
    cache = LookaheadCache(BUDGET, RecordingScorer(kernel_size=1), allocation=allocation)
    stages = []
    for start, end in ((0, 40), (40, 52), (52, 64)):
        here = mask[:, :end]
        places = (here.cumsum(-1) - 1).clamp(min=0)[:, start:]
        with torch.no_grad():
            adapted(ids[:, start:end], attention_mask=here, position_ids=places, past_key_values=cache)
        with entries_hidden(base, stages, end + TOKENS):
            attentions = lookahead_attention(base, adapted, ids[:, :end], here)
        expected = {}
        for layer, weights in attentions.items():
            candidates = here.bool()[:, None].repeat(1, 2, 1)
            if stages:
                candidates[..., :start] &= stages[-1][layer]
            expected[layer] = scores_of(weights).masked_fill(~candidates, -torch.inf)
            count = candidates.sum(-1)
            # The cache has its candidates in another order, and gives no score to what is none.
            found, wanted = (
                scores.sort(descending=True).values for scores in (RecordingScorer.recorded[layer], expected[layer])
            )
            for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
                best = slice(int(count[row, head]))
                torch.testing.assert_close(found[row, head, best], wanted[row, head, best], atol=1e-5, rtol=1e-5)
        stages.append(kept_entries(cache))
        for row in range(2):
            scores = [layer[row].tolist() for layer in expected.values()]
            kept = [[head.nonzero()[:, 0].tolist() for head in layer[row]] for layer in stages[-1].values()]
            assert kept == naive_shares(scores, BUDGET, allocation, 4 * BUDGET)
