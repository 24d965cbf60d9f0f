"""Models with latent attention: of each token the cache holds one latent and one rotary part for all heads."""

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

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.adapter.model import adapter_parameters

FAMILIES = [
    "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4", "kimi_linear", "longcat_flash", "minicpm3", "youtu",
    "axk1",
]  # fmt: skip
FEW = ["deepseek_v3", "kimi_linear"]


@pytest.mark.parametrize(("attention", "static"), [("eager", False), ("sdpa", False), ("sdpa", True)])
@pytest.mark.parametrize("scorer", ["snapkv", "lookahead"])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_a_padded_batch(family, scorer, attention, static):
    base, model = models(family, scorer, attention)
    cache = LookaheadCache(7, scorer, max_new_tokens=20 if static else None)
    assert_turns_equal_masked_attention(base, model, cache, *padded_prompts())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whole_tokens_are_scored_by_the_mean_over_all_heads(attention):
    base, model = models("deepseek_v3", "snapkv", attention)
    add_lookahead(model, target_modules=[])
    ids = prompt_ids(2, 40)
    cache = LookaheadCache(7, allocation="uniform")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        tokens = model.model.lookahead.active_tokens().expand(2, -1, -1)
        embeds = torch.cat([base.get_input_embeddings()(ids), tokens], dim=1)
        attentions = base(inputs_embeds=embeds, output_attentions=True, use_cache=False).attentions
    for layer, kept in kept_entries(cache).items():
        assert kept.shape == (2, 1, 40)
        scores = attentions[layer][:, :, 40:, :40].mean((1, 2))
        for row in range(2):
            assert set(scores[row].topk(7).indices.tolist()) == set(kept[row, 0].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("family", FEW)
def test_a_compiled_decode(family, reset_compiler):
    base, model = models(family, "lookahead")
    graphs = Graphs()
    cache = LookaheadCache(7, max_new_tokens=20)
    assert_turns_equal_masked_attention(base, model, cache, *padded_prompts(), **compiled_by(graphs))
    assert graphs.count == 1


@pytest.mark.parametrize("scorer", ["snapkv", "streaming", "random", "lookahead"])
@pytest.mark.parametrize("static", [False, True])
def test_an_answer_that_is_evicted_again_and_again(scorer, static, monkeypatch):
    base, model = models("deepseek_v3", scorer)
    stages = recorded_evictions(monkeypatch)
    ids, mask = padded_prompts()
    cache = LookaheadCache(7, scorer, refresh_every=4, max_new_tokens=20 if static else None)
    tokens, logits = generate(model, ids, cache, mask, 20)
    assert len(stages) == 4
    expected = masked_logits(base, torch.cat([ids, tokens], 1), mask, stages)[:, 39:-1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(expected.argmax(-1), tokens)


@pytest.mark.parametrize("family", FEW)
def test_parking_and_chunks(family):
    _, model = models(family, "lookahead")
    ids, mask = padded_prompts()
    whole, pieces = LookaheadCache(7), LookaheadCache(7, park="cpu")
    expected, expected_logits = generate(model, ids, whole, mask)
    found, logits = generate(model, ids, pieces, mask, prefill_chunk_size=9)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    for layer, kept in kept_entries(whole).items():
        assert torch.equal(kept_entries(pieces)[layer], kept)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("change", ["beams", "copy", "select", "repeat"])
def test_changes_of_the_batch(change, static):
    _, model = models("deepseek_v3", "lookahead")
    assert_changes_of_the_batch_are_followed(model, change, static)


def test_drafted_tokens_are_taken_back():
    _, model = models("deepseek_v3", "lookahead")
    ids = prompt_ids(1, 20).repeat(1, 2)
    expected, _ = generate(model, ids, LookaheadCache(100), new_tokens=12)
    options = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 4}
    found = model.generate(ids, past_key_values=LookaheadCache(100), **options)
    assert torch.equal(found[:, 40:], expected)
    cache = LookaheadCache(7)
    model.generate(ids, past_key_values=cache, **options)
    assert sum(int(kept.sum()) for kept in kept_entries(cache).values()) == 7 * 4


def test_bytes_are_those_of_latents():
    _, model = models("deepseek_v3", "lookahead")
    cache = LookaheadCache(7)
    with torch.no_grad():
        model(prompt_ids(2, 40), past_key_values=cache)
    entry, position = 4 * (32 + 32), 4
    summary = cache.summary()
    assert summary["bytes"] == cache.nbytes == 4 * 2 * 7 * (entry + position)
    assert summary["bytes_without_eviction"] == 4 * 2 * 40 * entry
    assert summary["entries_stored"] == 7


def test_adapters_attach_to_the_projections_of_latents():
    _, model = models("deepseek_v3", "lookahead")
    names = {name.rsplit(".", 3)[-3] for name in adapter_parameters(model, "default") if "lookahead_kv_A" in name}
    assert {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"} <= names
    last = {name.rsplit(".", 3)[-3] for name in adapter_parameters(model, "default") if "layers.3." in name}
    assert last == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}


def test_other_changes_of_what_the_cache_returned_are_refused_at_the_first_layer():
    model = tiny_model("diffllama")
    prepare_model_for_eviction(model)
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    cache = LookaheadCache(7, "snapkv")
    with pytest.raises(NotImplementedError, match=r"attention of layer 0.*could not be observed.*DynamicCache"):
        model(prompt_ids(1, 40), past_key_values=cache)
    assert not calls and not cache.has_prompt
