"""What a generation with a LookaheadCache must equal (a full cache, evicted entries masked) and leave behind."""

import pytest
import torch
import transformers
from models import evicted_logits, kept_entries
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lkq_hf.attention
from lkq_hf.attention import thread_state
from lkq_hf.cache import prepare

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def generate(model, ids, cache, new_tokens=8, mask=None, **options):
    """Generated ids ``[batch, new]`` and their logits ``[batch, new, vocabulary]``."""
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        **GREEDY | {"max_new_tokens": new_tokens} | options,
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def skip_if_it_fails_without_the_cache(model, ids, **options):
    """For what this version of transformers cannot do with its own cache either."""
    try:
        model.generate(ids, do_sample=False, max_new_tokens=12, **options)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"transformers {transformers.__version__} fails without a LookaheadCache as well: {error}")


def expected_logits(base, ids, tokens, cache, mask=None, evicted_length=None):
    """Logits ``[batch, new, vocabulary]`` of the masked full cache at the places where ``tokens`` were generated.

    Args:
        base: the untouched model, with eager attention.
        ids, mask: the text before the tokens, of which the first ``evicted_length`` (None: all) were read and evicted.
        tokens: what was generated.
        cache: says which entries it kept; or a list of what ``kept_entries`` said after each reading.
    """
    sequence = torch.cat([ids, tokens], dim=1)
    stages = cache if isinstance(cache, list) else [kept_entries(cache)]
    length = ids.shape[1] if evicted_length is None else evicted_length
    assert {kept.shape[-1] for kept in stages[-1].values()} == {length}, "the last eviction chose from other tokens"
    if mask is not None:
        mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    return evicted_logits(base, sequence, mask, stages)[:, ids.shape[1] - 1 : -1]


def assert_as_masked(base, ids, tokens, logits, cache, mask=None, tolerance=1e-4, evicted_length=None):
    """The tokens are the greedy ones of the masked full cache, and the logits, unless None, its logits."""
    assert cache if isinstance(cache, list) else kept_entries(cache), "nothing was evicted, so nothing is tested"
    expected = expected_logits(base, ids, tokens, cache, mask, evicted_length)
    if logits is not None:
        torch.testing.assert_close(logits.float(), expected.float(), atol=tolerance, rtol=tolerance)
    assert torch.equal(expected.argmax(-1), tokens)


def evicted_length(cache):
    """Tokens that the eviction chose from: with drafted tokens, those of them that were accepted at once as well."""
    (length,) = {cache.layers[index].evicted_length for index in cache.evicted_layers()}
    return length


def assert_nothing_is_left_behind(entries):
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == entries
    assert lkq_hf.attention._renamed == {}
    assert thread_state.attend is None
    assert thread_state.lookahead_length == 0
    assert prepare._thread.forward is None
