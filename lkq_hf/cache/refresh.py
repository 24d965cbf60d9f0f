"""An eviction between two tokens of a long answer.

The scorer's tokens run behind what was read in a forward of their own, which leaves no trace but the eviction. Scorers
that append no tokens look at the entries, and at the queries of the last tokens, which are kept for them.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from lkq_hf.cache.evicted import EvictedCache
from lkq_hf.cache.reading import Reading
from lkq_hf.cache.recorded import RecordedRefresh
from lkq_hf.cache.static import StaticEvictedLayer
from lkq_hf.cache.steady import SteadyRefresh, is_steady
from lkq_hf.cache.suffix import suffix_inputs
from lkq_hf.compat import pass_cache


def refresh_steadily(decoder: PreTrainedModel, cache: EvictedCache, attention_mask: Any) -> bool:
    """Carries out a refresh that leaves all shapes as they are; False if this one does not, and nothing was done.

    Args:
        decoder: the stack of layers.
        cache: what has grown.
        attention_mask: ``[batch, >= text]``, or None if there is no padding.
    """
    eviction = cache.begin_eviction(decoder, int(cache.get_seq_length()) - (cache.refresh_every or 0))
    if not is_steady(cache, eviction):
        return False
    due = SteadyRefresh.prepare(decoder, cache, cache.bind_scorer(decoder), eviction, attention_mask)
    if not isinstance(cache.layers[0], StaticEvictedLayer):
        due.run()
        return True
    if is_on_gpu(cache) and due.inputs.positions.numel():
        if cache.recorded_refresh is None:
            cache.recorded_refresh = RecordedRefresh()
        cache.recorded_refresh.run(due)
    else:
        due.run()
    due.note()
    return True


def is_on_gpu(cache: EvictedCache) -> bool:
    """Whether kernels can be recorded."""
    return bool(cache.layers[0].keys.is_cuda) and not torch.cuda.is_current_stream_capturing()


def begin_refresh(decoder: PreTrainedModel, cache: EvictedCache, attention_mask: Any) -> tuple[Reading, Any]:
    """The reading of a refresh, not yet started, and the decoder's inputs; None if the scorer needs no forward.

    Args:
        decoder: the stack of layers.
        cache: what has grown.
        attention_mask: ``[batch, >= text]``, or None if there is no padding.
    """
    scorer = cache.bind_scorer(decoder)
    seen = int(cache.get_seq_length())
    layer = cache.layers[cache.evicted_layers()[0]]
    recent = min(cache.refresh_every or 0, layer.tail_length)
    mask = attention_mask[:, :seen].bool() if isinstance(attention_mask, torch.Tensor) else None
    if mask is not None and mask.all():
        mask = None
    batch, device = layer.keys.shape[0], layer.keys.device
    suffix = scorer.suffix(decoder)
    length = 0 if suffix is None else suffix.shape[1]
    eviction = cache.begin_eviction(decoder, seen - recent)
    reading = Reading(decoder, cache, scorer, batch, 0, length, mask, eviction, lambda output: output, recent)
    if suffix is None:
        return reading, None
    following = torch.arange(length, device=device)
    if mask is None:
        positions, whole = (seen + following)[None], torch.ones(batch, seen + length, dtype=torch.long, device=device)
    else:
        positions = mask.sum(-1, keepdim=True).to(device) + following
        whole = torch.cat([mask.to(device), mask.new_ones(batch, length).to(device)], dim=1).long()
    inputs: dict[str, Any] = {
        **suffix_inputs(decoder, suffix, scorer.suffix_per_layer(decoder), batch),
        "attention_mask": whole,
        "position_ids": positions.expand(batch, -1),
        "use_cache": True,
        **pass_cache(cache),
    }
    return reading, inputs
