"""What a conversation with a LookaheadCache must equal: a full cache, with the evicted entries masked.

The model is run once over the whole text, without a cache. Its attention is the modeling file's own eager function,
behind one that hides what was evicted.
"""

import copy
import inspect
import sys

import torch
from models import add_lookahead, kept_entries, left_padded, positions, prompt_ids
from tiny import tiny_model
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from lkq_hf import LookaheadCache
from lkq_hf.cache.prepare import get_decoder, prepare_model_for_eviction

NAME = "masked_reference"
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}

_stages = []


def _masked_attention(module, query, key, value, attention_mask, **options):
    stages = [(kept, begin) for kept, begin in _stages if _source(module, kept) is not None]
    if stages:
        heads = query.shape[1]
        hidden = attention_mask.expand(-1, heads, -1, -1).clone()
        for kept, begin in stages:
            one = kept[_source(module, kept)]
            length = one.shape[-1]
            gone = ~one.repeat_interleave(heads // one.shape[1], dim=1)[:, :, None]
            # What a later eviction has brought back (from main memory) is seen again.
            hidden[:, :, begin:] = attention_mask[:, :, begin:].expand(-1, heads, -1, -1)
            hidden[:, :, begin:, :length].masked_fill_(gone, torch.finfo(hidden.dtype).min)
        attention_mask = hidden
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, _masked_attention)
AttentionMaskInterface.register(NAME, eager_mask)


def _source(module, kept):
    """The layer whose entries the module attends to, if these were evicted."""
    index, config = module.layer_idx, module.config
    if index >= (first := _first_shared(config)):
        kinds = config.layer_types
        index = max(earlier for earlier in range(first) if kinds[earlier] == kinds[index])
    return index if index in kept else None


def _number_attention(base):
    """Zamba's modules do not know which layer they stand in; their forward is told."""
    for index, layer in enumerate(getattr(get_decoder(base), "layers", ())):
        for module in layer.modules():
            if getattr(module, "layer_idx", index) in (None, -1):
                module.layer_idx = index


def _first_shared(config):
    """The first layer that attends to the entries of an earlier one."""
    return config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)


def masked_logits(base, ids, mask, stages):
    """Logits ``[batch, length, vocabulary]`` of the text.

    Args:
        base: the untouched model.
        stages: pairs of what an eviction kept, ``{layer: [batch, kv_heads, length]}``, and the first position that
            sees this.
    """
    mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    before = base.config._attn_implementation
    _number_attention(base)
    base.set_attn_implementation(NAME)
    _stages.extend(stages)
    # Others count the padding too, in generate as well.
    takes_positions = "position_ids" in inspect.signature(type(base).forward).parameters
    options = {"position_ids": positions(mask)} if takes_positions else {}
    try:
        with torch.no_grad():
            return base(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    finally:
        _stages.clear()
        base.set_attn_implementation(before)


def generate(model, ids, cache, mask=None, new_tokens=6, **options):
    """Generated ids ``[batch, new]`` and their logits ``[batch, new, vocabulary]``."""
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, **GREEDY | {"max_new_tokens": new_tokens} | options
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def assert_turns_equal_masked_attention(base, model, cache, ids, mask, turns=2, tolerance=5e-4, **options):
    """Holds a conversation of several turns and compares every answer with masked attention.

    Args:
        base: the model without adapter and hooks.
        model: the same weights.
        cache: empty.
        ids, mask: the first prompt, padded on the left.
    """
    stages = []
    for turn in range(turns):
        length = ids.shape[1]
        tokens, logits = generate(model, ids, cache, mask, **options)
        kept = kept_entries(cache)
        assert kept, "nothing was evicted, so nothing is tested"
        stages.append((kept, length))
        text = torch.cat([ids, tokens], dim=1)
        expected = masked_logits(base, text, mask, stages)[:, length - 1 : -1]
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(expected.argmax(-1), tokens)
        ids = torch.cat([text, prompt_ids(len(ids), 5, seed=20 + turn)], dim=1)
        mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    assert sorted(stages[0][0]) == _full_layers(base), "every full-attention layer is evicted"


def _full_layers(model):
    config = get_decoder(model).config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [index for index, kind in enumerate(kinds[: _first_shared(config)]) if kind in ("full_attention", "hybrid")]


def models(family, scorer, attention="sdpa", **changes):
    """The untouched model, and one that is ready for the scorer."""
    base = tiny_model(family, **changes)
    model = copy.deepcopy(base)
    if scorer == "lookahead":
        add_lookahead(model)
    else:
        prepare_model_for_eviction(model)
    model.set_attn_implementation(attention)
    return base, model


def padded_prompts():
    return left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 17, seed=1)[0]])


def recorded_evictions(monkeypatch):
    """A list that every eviction from now on adds to: what was kept, and the length of the text."""
    stages, evict_to = [], LookaheadCache.evict_to

    def recorded(cache, *arguments):
        evict_to(cache, *arguments)
        stages.append((kept_entries(cache), int(cache.get_seq_length())))

    monkeypatch.setattr(LookaheadCache, "evict_to", recorded)
    return stages


def assert_changes_of_the_batch_are_followed(model, change, static):
    """A later turn after "beams", "copy", "select" or "repeat" equals one of a cache that read these rows."""
    ids = prompt_ids(2, 40)
    options = {"max_new_tokens": 20} if static else {}
    cache, expected = LookaheadCache(7, **options), LookaheadCache(7, **options)
    question = prompt_ids(4, 5, seed=9)
    order = [0, 1]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        if change == "beams":
            order = [1, 1]
            cache.reorder_cache(torch.tensor(order))
        elif change == "copy":
            used, cache = cache, copy.deepcopy(cache)
            model(prompt_ids(2, 9, seed=3), past_key_values=used)
        elif change == "select":
            order = [1]
            cache.batch_select_indices(torch.tensor(order))
        else:
            order = [0, 0, 1, 1]
            cache.batch_repeat_interleave(2)
        found = model(question[: len(order)], past_key_values=cache).logits
        model(ids[order], past_key_values=expected)
        reference = model(question[: len(order)], past_key_values=expected).logits
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)
