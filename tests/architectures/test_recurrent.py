"""Models with recurrent or convolutional layers beside those that attend."""

import pytest
import torch
from masked_reference import (
    assert_changes_of_the_batch_are_followed,
    assert_turns_equal_masked_attention,
    generate,
    masked_logits,
    models,
    padded_prompts,
    recorded_evictions,
)
from models import Graphs, add_lookahead, compiled_by, kept_entries, prompt_ids
from tiny import tiny_model
from torch.nn import functional as F

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.cache.recurrent import RecurrentLayer

FAMILIES = [
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "granitemoehybrid", "lfm2", "lfm2_moe", "nemotron_h", "jamba",
    "bamba", "falcon_h1", "olmo_hybrid", "kimi_linear", "zamba", "zamba2",
]  # fmt: skip
# Of each kind of state one: gated delta rule, Mamba 2, Mamba 1, convolution, and both in one layer, the last with
# attention whose weights several layers share.
KINDS = ["qwen3_5_text", "granitemoehybrid", "jamba", "lfm2", "falcon_h1", "zamba2"]
# Those that also come without experts.
DENSE = {
    "qwen3_next": {"mlp_only_layers": [0, 1, 2, 3]},
    "granitemoehybrid": {"num_local_experts": 0},
}


def _has_experts(model):
    return any("experts" in name for name, _ in model.named_parameters())


def states_of(cache):
    """``{(layer, name, index): state}``"""
    return {
        (index, name, place): state
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, RecurrentLayer)
        for name in ("conv_states", "recurrent_states")
        for place, state in getattr(layer, name).items()
        if state is not None
    }


@pytest.mark.parametrize(("attention", "static"), [("eager", False), ("sdpa", False), ("sdpa", True)])
@pytest.mark.parametrize("scorer", ["snapkv", "lookahead"])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_a_padded_batch(family, scorer, attention, static):
    base, model = models(family, scorer, attention)
    cache = LookaheadCache(7, scorer, max_new_tokens=20 if static else None)
    assert_turns_equal_masked_attention(base, model, cache, *padded_prompts())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("scorer", ["snapkv", "lookahead"])
@pytest.mark.parametrize("family", DENSE)
def test_turns_of_models_without_experts(family, scorer, static):
    base, model = models(family, scorer, **DENSE[family])
    assert not _has_experts(base)
    cache = LookaheadCache(7, scorer, max_new_tokens=20 if static else None)
    assert_turns_equal_masked_attention(base, model, cache, *padded_prompts())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in FAMILIES), *DENSE.items()])
def test_lookahead_tokens_leave_no_trace_in_logits_and_states(family, changes, attention):
    """To the last bit for a prompt under sdpa, unless experts share out the tokens. Longer sums and larger products
    may round otherwise."""
    _, model = models(family, "lookahead", attention, **changes)
    ids, mask = padded_prompts()
    question = prompt_ids(2, 6, seed=4)
    results = []
    for scorer in ("streaming", "lookahead"):
        # Both keep everything in main memory, so that the second turn sees the same.
        cache = LookaheadCache(7, scorer, park="cpu")
        with torch.no_grad():
            first = model(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()]
            states = {name: state.clone() for name, state in states_of(cache).items()}
            second = model(question, attention_mask=F.pad(mask, (0, 6), value=1), past_key_values=cache).logits
        results.append(({"logits": first} | states, {"logits": second} | states_of(cache)))
    (first, second), (first_found, second_found) = results
    assert len(first) > 1 and not torch.equal(list(first.values())[1], list(second.values())[1])
    bits = {"atol": 0, "rtol": 0} if attention == "sdpa" and not _has_experts(model) else {"atol": 1e-4, "rtol": 1e-4}
    for name, value in first.items():
        torch.testing.assert_close(first_found[name], value, **bits)
    for name, value in second.items():
        torch.testing.assert_close(second_found[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", KINDS)
def test_scores_are_those_of_one_pass_over_prompt_and_lookahead_tokens(family):
    """By definition, with adapters without LoRA: the tokens are embeddings like others."""
    base, model = models(family, "snapkv", "eager")
    add_lookahead(model, target_modules=[])
    ids, mask = padded_prompts()
    cache = LookaheadCache(7, allocation="uniform")
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    tokens = get_decoder(model).lookahead.active_tokens().expand(2, -1, -1)
    embeds = torch.cat([base.get_input_embeddings()(ids), tokens], dim=1)
    whole = F.pad(mask, (0, tokens.shape[1]), value=1)
    positions = (whole.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = base(
            inputs_embeds=embeds, attention_mask=whole, position_ids=positions, output_attentions=True, use_cache=False
        )
    attentions = [attention for attention in output.attentions if attention is not None]
    kept = kept_entries(cache)
    assert len(attentions) == len(kept)
    for attention, (layer, entries) in zip(attentions, kept.items(), strict=True):
        heads = cache.layers[layer].keys.shape[1]
        scores = attention[:, :, 40:, :40].mean(2).unflatten(1, (heads, -1)).mean(2)
        for row in range(2):
            for head in range(heads):
                real = scores[row, head].masked_fill(mask[row] == 0, -torch.inf)
                assert set(real.topk(7).indices.tolist()) == set(entries[row, head].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("family", KINDS)
def test_a_compiled_decode(family, reset_compiler):
    base, model = models(family, "lookahead")
    graphs = Graphs()
    cache = LookaheadCache(7, max_new_tokens=20)
    assert_turns_equal_masked_attention(base, model, cache, *padded_prompts(), **compiled_by(graphs))
    assert graphs.count == 1


@pytest.mark.parametrize("scorer", ["snapkv", "lookahead"])
@pytest.mark.parametrize("family", KINDS)
def test_an_answer_that_is_evicted_again_and_again(family, scorer, monkeypatch):
    base, model = models(family, scorer)
    stages = recorded_evictions(monkeypatch)
    ids, mask = padded_prompts()
    tokens, logits = generate(model, ids, LookaheadCache(7, scorer, refresh_every=4), mask, 20)
    assert len(stages) == 4
    expected = masked_logits(base, torch.cat([ids, tokens], 1), mask, stages)[:, 39:-1]
    torch.testing.assert_close(logits, expected, atol=5e-4, rtol=5e-4)
    assert torch.equal(expected.argmax(-1), tokens)


@pytest.mark.parametrize("family", KINDS)
def test_parking_and_chunks(family):
    """What is parked are the entries of the layers that attend; states just go on."""
    _, model = models(family, "lookahead")
    ids, mask = padded_prompts()
    whole, pieces = LookaheadCache(7), LookaheadCache(7, park="cpu")
    expected, expected_logits = generate(model, ids, whole, mask)
    found, logits = generate(model, ids, pieces, mask, prefill_chunk_size=9)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    for layer, kept in kept_entries(whole).items():
        assert torch.equal(kept_entries(pieces)[layer], kept)
    entries = sum(layer.parked.nbytes for layer in pieces.layers if hasattr(layer, "parked"))
    assert pieces.summary()["bytes_parked"] == entries > 0


@pytest.mark.parametrize("change", ["beams", "copy", "select", "repeat"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_changes_of_the_batch_reach_the_states(family, static, change):
    _, model = models(family, "lookahead")
    assert_changes_of_the_batch_are_followed(model, change, static)


@pytest.mark.parametrize("family", KINDS)
def test_a_forward_that_fails_leaves_the_states_as_they_were(family):
    _, model = models(family, "lookahead")
    cache, untouched = LookaheadCache(7), LookaheadCache(7)
    question = prompt_ids(1, 5, seed=9)
    with torch.no_grad():
        for each in (cache, untouched):
            model(prompt_ids(1, 40), past_key_values=each)

        def fail(*_):
            raise KeyboardInterrupt

        handle = get_decoder(model).layers[-1].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(question, past_key_values=cache)
        handle.remove()
        assert all(torch.equal(states_of(untouched)[name], state) for name, state in states_of(cache).items())
        found = model(question, past_key_values=cache).logits
        torch.testing.assert_close(found, model(question, past_key_values=untouched).logits)


def test_what_transformers_can_take_back_is_taken_back():
    """Convolutions keep what they read; recurrences cannot go back."""
    _, model = models("lfm2", "lookahead")
    ids = prompt_ids(1, 20).repeat(1, 2)
    expected, _ = generate(model, ids, LookaheadCache(100), new_tokens=12)
    found = model.generate(
        ids, past_key_values=LookaheadCache(100), max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4
    )
    assert torch.equal(found[:, 40:], expected)
    cache = LookaheadCache(7)
    model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4)
    assert kept_entries(cache)

    _, model = models("qwen3_5_text", "lookahead")
    cache = LookaheadCache(7)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(prompt_ids(1, 1), past_key_values=cache)
    before = {name: state.clone() for name, state in states_of(cache).items()}
    with pytest.raises(ValueError, match=r"recurrent.*deepcopy"):
        cache.crop(-1)
    assert cache.get_seq_length() == 41, "of no layer anything was removed"
    assert all(torch.equal(states_of(cache)[name], state) for name, state in before.items())


def test_the_summary_counts_states():
    _, model = models("qwen3_5_text", "lookahead")
    cache = LookaheadCache(7)
    with torch.no_grad():
        model(prompt_ids(2, 40), past_key_values=cache)
    summary = cache.summary()
    # For each row: heads, key and value features; and channels of queries, keys and values, four tokens of each.
    state = 2 * 4 * (4 * 16 * 16 + (2 * 16 + 2 * 16 + 4 * 16) * 4)
    entry = 2 * 4 * 2 * 2 * 16
    position = 2 * 4 * 2
    assert [layer["bytes"] for layer in summary["layers"][::2]] == [state, state]
    assert summary["bytes"] == cache.nbytes == 2 * (state + 7 * (entry + position))
    assert summary["bytes_without_eviction"] == 2 * (state + 40 * entry)


def test_models_that_only_have_states_are_refused():
    with pytest.raises(NotImplementedError, match=r"state of fixed size: there is nothing to evict"):
        prepare_model_for_eviction(tiny_model("falcon_mamba"))
