import json
import shutil

import pytest
import torch
from models import (
    add_lookahead,
    delete_adapter,
    needs_adapter_methods,
    prompt_ids,
    randomize_adapter,
    save_adapter,
    tiny_model,
)
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lkq_hf import LookaheadCache, LookaheadKVConfig
from lkq_hf.adapter.model import adapter_parameters
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.scoring import LookaheadScorer

WEIGHTS = "adapter_model.safetensors"
A_KEY = "base_model.model.model.layers.0.mlp.up_proj.lookahead_kv_A"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model and an adapter on disk, and the adapter's tensors by their place in the model."""
    base_directory, directory = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    tiny_model().save_pretrained(base_directory)
    model = AutoModelForCausalLM.from_pretrained(base_directory, attn_implementation="eager")
    peft_model = get_peft_model(
        model,
        LookaheadKVConfig(
            num_lookahead_tokens=5, r=4, pooling_kernel_size=3, pooling="sum", neighbor_weight=0.25, row_power=2.0
        ),
    )
    randomize_adapter(peft_model)
    peft_model.save_pretrained(directory)
    return base_directory, directory, tensors(peft_model)


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of the adapter to damage."""
    return shutil.copytree(saved[1], tmp_path / "adapter")


def base_model(saved):
    return AutoModelForCausalLM.from_pretrained(saved[0], attn_implementation="eager")


def tensors(model, name="default"):
    found = {}
    for key, value in adapter_parameters(model, name).items():
        key = key.removeprefix("base_model.model.").replace(".base_layer.", ".").removesuffix("." + name)
        found[key] = value.detach().clone()
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def with_load_adapter(saved, directory):
    model = base_model(saved)
    model.load_adapter(str(directory))
    return model


ROUTES = {
    "PeftModel": lambda saved, directory: PeftModel.from_pretrained(base_model(saved), directory),
    "PeftModel, low memory": lambda saved, directory: PeftModel.from_pretrained(
        base_model(saved), directory, low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda saved, directory: AutoPeftModelForCausalLM.from_pretrained(directory),
    "AutoModel": lambda saved, directory: AutoModelForCausalLM.from_pretrained(directory),
    "load_adapter": with_load_adapter,
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_loads_every_tensor(saved, route):
    model = ROUTES[route](saved, saved[1])
    assert_same(tensors(model), saved[2])
    cache = LookaheadCache(budget=6)
    model.generate(input_ids=prompt_ids(1, 40), past_key_values=cache, max_new_tokens=2)
    assert cache.summary()["entries_stored"] == 6 + 1
    assert model.peft_config["default"].pooling_kernel_size == 3
    scorer = LookaheadScorer().bind(get_decoder(model))
    assert (scorer.kernel_size, scorer.pooling, scorer.neighbor_weight, scorer.row_power) == (3, "sum", 0.25, 2.0)
    assert LookaheadScorer(kernel_size=5).bind(get_decoder(model)).pooling == "max"


@pytest.mark.parametrize(
    "route",
    [
        "PeftModel",
        pytest.param("load_adapter", marks=needs_adapter_methods),
        pytest.param("AutoModel", marks=needs_adapter_methods),
    ],
)
def test_saved_again_the_files_are_the_same(saved, tmp_path, route):
    ROUTES[route](saved, saved[1]).save_pretrained(tmp_path)
    assert_same(load_file(tmp_path / WEIGHTS), load_file(saved[1] / WEIGHTS))
    for name in (
        "peft_type",
        "num_lookahead_tokens",
        "r",
        "lora_alpha",
        "row_power",
        "pooling_kernel_size",
        "pooling",
        "neighbor_weight",
        "base_model_shape",
    ):
        found, expected = (json.loads((d / "adapter_config.json").read_text())[name] for d in (tmp_path, saved[1]))
        assert found == expected


def test_a_native_model_saves_and_loads(saved, tmp_path):
    model = add_lookahead(base_model(saved))
    save_adapter(model, tmp_path)
    assert_same(tensors(with_load_adapter(saved, tmp_path)), tensors(model))


def test_several_adapters_under_names_of_their_own(saved):
    model = base_model(saved)
    model.load_adapter(str(saved[1]), adapter_name="one")
    model.load_adapter(str(saved[1]), adapter_name="two")
    assert_same(tensors(model, "one"), saved[2])
    assert_same(tensors(model, "two"), saved[2])


def damage(change):
    def apply(directory):
        state = load_file(directory / WEIGHTS)
        change(state)
        save_file(state, directory / WEIGHTS, metadata={"format": "pt"})

    return apply


def drop(state):
    del state[A_KEY]


def add(state):
    state["base_model.model.model.layers.2.mlp.up_proj.lookahead_kv_A"] = torch.zeros(4, 64)


def reshape(state):
    state[A_KEY] = torch.zeros(3, 64)


def poison(state):
    state[A_KEY][1, 2] = torch.nan


DAMAGES = {"missing": drop, "unexpected": add, "shape": reshape, "finite": poison}


@pytest.mark.parametrize("kind", DAMAGES)
def test_peft_refuses_damaged_weights(saved, adapter, kind):
    damage(DAMAGES[kind])(adapter)
    with pytest.raises(ValueError, match=rf"do not fit its config and this model.*{kind}"):
        PeftModel.from_pretrained(base_model(saved), adapter)


@pytest.mark.parametrize("kind", ["missing", "finite"])
def test_what_transformers_loads_incompletely_is_refused_before_any_work(saved, adapter, kind):
    damage(DAMAGES[kind])(adapter)
    model = with_load_adapter(saved, adapter)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"1 tensors.*layers\.0\.mlp\.up_proj\.lookahead_kv_A.*not finite"):
        model(prompt_ids(1, 40), past_key_values=LookaheadCache(budget=6))
    assert not calls
    delete_adapter(model, "default")
    model.load_adapter(str(saved[1]))
    model(prompt_ids(1, 40), past_key_values=LookaheadCache(budget=6))


def test_transformers_refuses_wrong_shapes(saved, adapter):
    damage(reshape)(adapter)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        with_load_adapter(saved, adapter)


def test_truncated_files_are_refused_by_every_route(saved, adapter):
    content = (adapter / WEIGHTS).read_bytes()
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        (adapter / WEIGHTS).write_bytes(content[:size])
        for route in ("PeftModel", "load_adapter"):
            with pytest.raises(Exception, match=r"(?i)header|deserializ|incomplete|metadata|empty|file"):
                ROUTES[route](saved, adapter)


@pytest.mark.parametrize("route", ["PeftModel", "load_adapter"])
@pytest.mark.parametrize("field", ["r", "num_lookahead_tokens"])
def test_absurd_sizes_are_refused_by_the_config(saved, adapter, route, field):
    edit(adapter, **{field: 10**9})
    with pytest.raises(ValueError, match=f"{field} must be a whole number from 1 to 4096"):
        ROUTES[route](saved, adapter)


@pytest.mark.parametrize("route", ["PeftModel", "load_adapter"])
def test_another_base_is_refused_with_the_sizes(saved, adapter, route):
    edit(adapter, base_model_shape={"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 5})
    with pytest.raises(
        ValueError, match=r"hidden_size is 64 and should be 128; num_hidden_layers is 3 and should be 5"
    ):
        ROUTES[route](saved, adapter)


def edit(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
