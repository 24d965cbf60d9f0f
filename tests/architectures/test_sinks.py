"""Models whose heads have a learned sink in their softmax (gpt-oss)."""

import copy

import pytest
import torch
from masked_reference import (
    assert_turns_equal_masked_attention,
    generate,
    masked_logits,
    padded_prompts,
    recorded_evictions,
)
from models import Graphs, add_lookahead, compiled_by, kept_entries, prompt_ids
from tiny import tiny_model

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.cache.allocation import share_out

FAMILIES = ["gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "flint"]
WINDOW = {"sliding_window": 8}


def models(family, scorer):
    """The untouched model, and one that is ready for the scorer."""
    base = tiny_model(family, "eager", **WINDOW)
    torch.manual_seed(3)
    for name, parameter in base.named_parameters():
        if "sinks" in name:
            parameter.data = 2 * torch.randn_like(parameter)
    model = copy.deepcopy(base)
    if scorer == "lookahead":
        add_lookahead(model)
    else:
        prepare_model_for_eviction(model)
    return base, model


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("scorer", ["snapkv", "lookahead"])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_a_padded_batch(family, scorer, static):
    base, model = models(family, scorer)
    cache = LookaheadCache(7, scorer, max_new_tokens=20 if static else None)
    assert_turns_equal_masked_attention(base, model, cache, *padded_prompts())


def test_scores_are_shares_of_attention_beside_the_sink():
    """They decide which heads of which layers get more of one budget."""
    base, model = models("gpt_oss", "snapkv")
    add_lookahead(model, target_modules=[])
    ids = prompt_ids(2, 40)
    cache = LookaheadCache(7)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        tokens = model.model.lookahead.active_tokens().expand(2, -1, -1)
        embeds = torch.cat([base.get_input_embeddings()(ids), tokens], dim=1)
        attentions = base(inputs_embeds=embeds, output_attentions=True, use_cache=False).attentions
    kept = kept_entries(cache)
    shares = [attentions[layer][:, :, 40:, :40].mean(2).unflatten(1, (2, -1)).mean(2) for layer in kept]
    for found, expected in zip(kept.values(), share_out(shares, 7, "global"), strict=True):
        assert torch.equal(found, expected)


def test_a_compiled_decode(reset_compiler):
    base, model = models("gpt_oss", "lookahead")
    graphs = Graphs()
    cache = LookaheadCache(7, max_new_tokens=20)
    assert_turns_equal_masked_attention(base, model, cache, *padded_prompts(), **compiled_by(graphs))
    assert graphs.count == 1


@pytest.mark.parametrize("scorer", ["snapkv", "lookahead"])
def test_an_answer_that_is_evicted_again_and_again(scorer, monkeypatch):
    base, model = models("gpt_oss", scorer)
    stages = recorded_evictions(monkeypatch)
    ids, mask = padded_prompts()
    tokens, logits = generate(model, ids, LookaheadCache(7, scorer, refresh_every=4), mask, 20)
    assert len(stages) == 4
    expected = masked_logits(base, torch.cat([ids, tokens], 1), mask, stages)[:, 39:-1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
