"""Decoders that were made to attend to an encoder as well (BART, Whisper, BERT), used as language models."""

import copy

import pytest
import torch
from masked_reference import assert_turns_equal_masked_attention
from models import Graphs, add_lookahead, compiled_by, left_padded, prompt_ids
from tiny import tiny_config, tiny_model
from transformers import BartForConditionalGeneration

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.adapter.model import adapter_parameters

FAMILIES = ["bart", "whisper", "bert", "electra", "modernbert-decoder"]


@pytest.mark.parametrize(("scorer", "static"), [("snapkv", True), ("lookahead", False), ("lookahead", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_a_padded_batch(family, scorer, static):
    base = tiny_model(family)
    model = copy.deepcopy(base)
    if scorer == "lookahead":
        add_lookahead(model)
    else:
        prepare_model_for_eviction(model)
    model.set_attn_implementation("sdpa")
    prompts = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 17, seed=1)[0]])
    cache = LookaheadCache(7, scorer, max_new_tokens=20 if static else None)
    assert_turns_equal_masked_attention(base, model, cache, *prompts)


@pytest.mark.parametrize("family", ["bart", "bert"])
def test_a_compiled_decode(family, reset_compiler):
    base = tiny_model(family)
    model = add_lookahead(copy.deepcopy(base))
    model.set_attn_implementation("sdpa")
    graphs = Graphs()
    prompts = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 17, seed=1)[0]])
    assert_turns_equal_masked_attention(
        base, model, LookaheadCache(7, max_new_tokens=20), *prompts, **compiled_by(graphs)
    )
    assert graphs.count == 1


def test_adapters_attach_to_layers_that_are_not_right_below_the_decoder():
    names = set(adapter_parameters(add_lookahead(tiny_model("bert")), "default"))
    assert any("encoder.layer.0.intermediate.dense.lookahead_kv_A" in name for name in names)
    last = {name.rsplit(".", 3)[-3] for name in names if "encoder.layer.3." in name}
    assert last == {"query", "key"}


def test_adapters_leave_out_attention_to_an_encoder():
    names = set(adapter_parameters(add_lookahead(tiny_model("bart")), "default"))
    assert any("layers.0.self_attn.v_proj.lookahead_kv_A" in name for name in names)
    assert not [name for name in names if "encoder_attn" in name]


def test_tokens_are_as_large_as_embeddings():
    model = add_lookahead(tiny_model("electra", embedding_size=32))
    assert model.electra.lookahead.active_tokens().shape == (1, 5, 32)


def test_what_an_encoder_has_read_is_refused():
    model = tiny_model("bart")
    prepare_model_for_eviction(model)
    cache = LookaheadCache(7, "snapkv")
    with pytest.raises(NotImplementedError, match=r"encoder_hidden_states.*EncoderDecoderCache"):
        model(prompt_ids(1, 40), encoder_hidden_states=torch.zeros(1, 9, 64), past_key_values=cache)
    assert not cache.has_prompt


def test_a_model_with_its_encoder_is_refused():
    config = tiny_config("bart")
    config.is_decoder, config.is_encoder_decoder = False, True
    with pytest.raises(TypeError, match=r"BartForConditionalGeneration, an encoder and a decoder"):
        prepare_model_for_eviction(BartForConditionalGeneration(config))
