"""Models that are built otherwise than most: tokens of a batch form one list, a language model is a part of another
model, an attention changes what the cache handed it."""

import pytest
import torch
from models import (
    add_lookahead,
    base_and_adapted,
    kept_entries,
    left_padded,
    lookahead_attention,
    positions,
    prompt_ids,
    scores_of,
    tiny_gemma3_with_pictures,
    tiny_model,
    top_entries,
)
from reference import assert_as_masked, generate

from lkq_hf import LookaheadCache, prepare_model_for_eviction

item = pytest.mark.item

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64}


@item("models whose MLPs and experts are given a batch's tokens in one list")
@pytest.mark.parametrize(
    ("architecture", "sizes", "kv_heads"),
    [("opt", OPT, 4), ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}, 2)],
)
def test_tokens_in_one_list(architecture, sizes, kv_heads):
    base, model = base_and_adapted(architecture, **sizes)
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 17, seed=1)[0]])
    cache = LookaheadCache(budget=9, allocation="uniform")
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache)
    for layer, attention in lookahead_attention(base, model, ids, mask).items():
        expected = top_entries(scores_of(attention, kv_heads), 9, mask)
        assert torch.equal(cache.layers[layer].kept(), expected)


@item("what routers return of each token")
def test_router_logits():
    _, model = base_and_adapted("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    inputs = {"input_ids": prompt_ids(2, 40), "output_router_logits": True}
    inputs["labels"] = inputs["input_ids"]
    with torch.no_grad():
        plain = model(**inputs)
        found = model(**inputs, attention_mask=torch.ones(2, 40).long(), past_key_values=LookaheadCache(budget=9))
    torch.testing.assert_close(found.router_logits, plain.router_logits)
    torch.testing.assert_close(found.aux_loss, plain.aux_loss)


@item("Llama 4, Gemma 4 (without embeddings of its own for each layer)")
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama4_text", EXPERTS | {"num_local_experts": 2, "intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 1]}),
        ("gemma4_text", {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 16}),
    ],
)
def test_adapters_attach(architecture, changes):
    pytest.importorskip(f"transformers.models.{architecture.removesuffix('_text')}")
    model = tiny_model(architecture, layer_types=["full_attention"] * 3, **changes)
    ids = prompt_ids(2, 40)
    plain = model.generate(ids, max_new_tokens=1, do_sample=False)
    add_lookahead(model)
    cache = LookaheadCache(budget=9)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False), plain)
    alone = LookaheadCache(budget=9)
    with torch.no_grad():
        model(ids[1:], past_key_values=alone)
    assert kept_entries(alone).keys() == {0, 1, 2}
    for layer, kept in kept_entries(alone).items():
        assert torch.equal(cache.layers[layer].kept()[1:], kept)


@item("multimodal models that make their decoder's masks (Gemma 3): prompts of text")
@pytest.mark.parametrize(("attention", "static"), [("eager", False), ("sdpa", False), ("sdpa", True)])
def test_text_for_a_multimodal_model(attention, static):
    model, base = tiny_gemma3_with_pictures(attention), tiny_gemma3_with_pictures()
    add_lookahead(model)
    ids, mask = left_padded([prompt_ids(1, 40)[0] + 1, prompt_ids(1, 27, seed=1)[0] + 1])
    ids = ids % 160
    for scorer in ("lookahead", "snapkv"):
        cache = LookaheadCache(budget=9, scorer=scorer, max_new_tokens=8 if static else None)
        # A processor says of every token that it is no picture's.
        tokens, logits = generate(model, ids, cache, mask=mask, token_type_ids=torch.zeros_like(ids))
        assert_as_masked(base, ids, tokens, logits, cache, mask)


@item("multimodal models that make their decoder's masks (Gemma 3): pictures, with a scorer that appends no tokens")
def test_pictures_for_a_multimodal_model():
    model = tiny_gemma3_with_pictures()
    prepare_model_for_eviction(model)
    ids = prompt_ids(1, 40) + 1
    ids[0, 5:9] = 3
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 28, 28),
        "token_type_ids": (ids == 3).long(),
        "attention_mask": torch.ones_like(ids),
    }
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with pytest.raises(ValueError, match="prepared mask"):
        masks = {"full_attention": None, "sliding_attention": None}
        model.get_decoder()(ids, attention_mask=masks, past_key_values=LookaheadCache(9, "snapkv"))
    plain = model.generate(**inputs, **options)
    cache = LookaheadCache(budget=9, scorer="snapkv")
    found = model.generate(**inputs, **options, past_key_values=cache)
    torch.testing.assert_close(found.logits[0], plain.logits[0])
    assert sum(int(kept.sum()) for kept in kept_entries(cache).values()) == 9 * 2 * 2, "layers, KV heads"
    add_lookahead(model)
    with pytest.raises(NotImplementedError, match=r"pictures.*snapkv"):
        model.generate(**inputs, **options, past_key_values=LookaheadCache(budget=9))


@item("models whose attention changes keys or values that are cached (DiffLlama)", refused="DynamicCache")
@pytest.mark.parametrize("architecture", ["diffllama"])
def test_other_values_than_the_caches(architecture):
    model = tiny_model(architecture)
    prepare_model_for_eviction(model)
    cache = LookaheadCache(budget=9, scorer="snapkv")
    with pytest.raises(NotImplementedError, match=r"could not be observed.*DynamicCache"):
        model.generate(prompt_ids(1, 40), past_key_values=cache, max_new_tokens=2)
    assert not cache.has_prompt
    assert all(layer.keys is None or not layer.keys.numel() for layer in cache.layers)


@item("prompts and lookahead tokens beyond the positions that a model has learned", refused="a scorer without them")
def test_learned_positions():
    _, model = base_and_adapted("opt", **OPT, max_position_embeddings=64)
    ids = prompt_ids(1, 60)
    with pytest.raises(ValueError, match=r"60 tokens.*64 positions.*snapkv"):
        model(ids, past_key_values=LookaheadCache(budget=9))
    model.generate(ids, past_key_values=LookaheadCache(budget=9, scorer="snapkv"), max_new_tokens=4)
