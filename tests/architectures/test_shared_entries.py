"""Models whose last layers attend to the entries of earlier ones, and read only the positions whose logits are asked
for (Gemma 4)."""

import copy

import pytest
import torch
from masked_reference import assert_turns_equal_masked_attention
from models import Graphs, add_lookahead, compiled_by, left_padded, prompt_ids
from tiny import tiny_model

from lkq_hf import LookaheadCache, prepare_model_for_eviction

FAMILIES = ["gemma4_unified_text", "gemma4_text", "gemma3n_text"]


def models(family, attention):
    base = tiny_model(family, "eager")
    adapted = add_lookahead(copy.deepcopy(base))
    adapted.set_attn_implementation(attention)
    return base, adapted


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("scorer", ["snapkv", "lookahead"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_a_padded_batch(family, attention, scorer, static):
    base, adapted = models(family, attention)
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 17, seed=1)[0]])
    cache = LookaheadCache(7, scorer, max_new_tokens=20 if static else None)
    assert_turns_equal_masked_attention(base, adapted, cache, ids, mask)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("target_modules", [None, []])
def test_logits_of_the_last_positions(attention, target_modules):
    model = tiny_model("gemma4_unified_text", attention)
    ids = prompt_ids(2, 40)
    # torch's compiled flex attention is wrong for 40 tokens on a CPU without AVX-512.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(ids).logits
        prepare_model_for_eviction(model)
        add_lookahead(model, target_modules=target_modules)
        for kept in (1, 3, 0):
            for scorer in ("snapkv", "lookahead"):
                cache = LookaheadCache(7, scorer)
                found = model(ids, past_key_values=cache, logits_to_keep=kept).logits
                torch.testing.assert_close(found, expected[:, -kept:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_decode(family, reset_compiler):
    base, adapted = models(family, "sdpa")
    graphs = Graphs()
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 17, seed=1)[0]])
    cache = LookaheadCache(7, max_new_tokens=20)
    assert_turns_equal_masked_attention(base, adapted, cache, ids, mask, **compiled_by(graphs))
    assert graphs.count == 1
