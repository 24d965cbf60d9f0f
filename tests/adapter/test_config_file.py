"""What adapter_config.json has to say, and how adapters are saved."""

import json
import logging
import shutil

import pytest
import torch
from models import SIZES, add_adapter, delete_adapter, lookahead_model, prompt_ids, save_adapter, tiny_model
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from lkq_hf import LookaheadCache, LookaheadKVConfig, shipped_adapter
from lkq_hf.adapter.config import SCORING_FIELDS
from lkq_hf.adapter.model import adapter_parameters
from lkq_hf.hub import load_adapter

LOGGER = "lkq_hf.adapter.config"
ROUTES = {
    "PeftConfig": lambda directory: PeftConfig.from_pretrained(str(directory)),
    "LookaheadKVConfig": lambda directory: LookaheadKVConfig.from_pretrained(str(directory)),
    "PeftModel": lambda directory: PeftModel.from_pretrained(tiny_model(), str(directory)),
    "load_adapter": lambda directory: load_adapter(tiny_model(), directory),
}


@pytest.fixture
def adapter(tmp_path):
    """Directory of an adapter that does not score as the defaults do."""
    model = tiny_model()
    config = LookaheadKVConfig(num_lookahead_tokens=5, r=4, row_power=2.0, pooling="sum", pooling_kernel_size=3)
    add_adapter(model, config)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(directory, leave_out=(), **changes):
    path = directory / "adapter_config.json"
    values = {name: value for name, value in json.loads(path.read_text()).items() if name not in leave_out}
    path.write_text(json.dumps(values | changes))


@pytest.mark.parametrize("route", ROUTES)
def test_a_file_without_a_field_that_decides_the_scores_is_refused(route, adapter):
    ROUTES[route](adapter)
    edit(adapter, leave_out=["row_power", "pooling"])
    with pytest.raises(ValueError, match=r"has no row_power, pooling, which decide how the adapter scores"):
        ROUTES[route](adapter)


@pytest.mark.parametrize("field", SCORING_FIELDS)
def test_each_field_is_needed(field, adapter):
    edit(adapter, leave_out=[field])
    with pytest.raises(ValueError, match=f"has no {field}, which"):
        PeftConfig.from_pretrained(str(adapter))


@pytest.mark.parametrize("route", ["PeftConfig", "LookaheadKVConfig"])
def test_a_file_of_an_earlier_version_is_loaded_with_a_warning(route, adapter, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        edit(adapter, leave_out=["format_version"])
        assert ROUTES[route](adapter).row_power == 2.0
        assert not caplog.records
        (adapter / "adapter_config.json").write_text('{"peft_type": "LOOKAHEAD_KV"}')
        assert ROUTES[route](adapter).row_power == 1.0
    assert f"has no {', '.join(SCORING_FIELDS)}; defaults are used in their place" in caplog.text


def test_a_file_of_a_later_version_is_refused(adapter):
    edit(adapter, format_version=2)
    with pytest.raises(ValueError, match="has format_version 2, and this lkq-hf reads 1"):
        PeftConfig.from_pretrained(str(adapter))


def test_the_shipped_adapter_says_all(caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        config = PeftConfig.from_pretrained(shipped_adapter())
    assert config.format_version == 1 and not caplog.records


def test_a_config_made_by_hand_needs_no_field(caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        config = LookaheadKVConfig(r=4)
        assert LookaheadKVConfig(**config.to_dict()).r == 4
    assert not caplog.records


@pytest.mark.parametrize("init_weights", [True, False])
def test_init_weights_as_other_methods_of_peft_take_it(init_weights, tmp_path):
    """PEFT's own tests pass it to have an adapter that does something at once."""
    model = get_peft_model(tiny_model(), LookaheadKVConfig(r=4, num_lookahead_tokens=5, init_weights=init_weights))
    ups = {name: p for name, p in adapter_parameters(model, "default").items() if "lookahead_kv_B" in name}
    assert ups and all(bool(up.any()) != init_weights for up in ups.values())
    assert all(torch.isfinite(up).all() for up in ups.values())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_weights"] is init_weights
    again = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    saved, loaded = (get_peft_model_state_dict(each) for each in (model, again))
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    ids = prompt_ids(1, 40)
    kept = []
    for each in (model, again):
        cache = LookaheadCache(budget=7)
        with torch.no_grad():
            each(input_ids=ids, past_key_values=cache)
        kept.append([layer.kept() for layer in cache.layers])
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


@pytest.mark.parametrize("value", ["gaussian", None, 1])
def test_other_ways_to_init_weights_are_refused(value):
    with pytest.raises(ValueError, match="init_weights must be True or False"):
        LookaheadKVConfig(init_weights=value)


def test_a_pickle_is_not_saved(tmp_path):
    model = get_peft_model(tiny_model(), LookaheadKVConfig(r=4))
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle.*save without safe_serialization=False"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    # What was written is no adapter that anything would load.
    assert not (tmp_path / "adapter_config.json").exists()
    (tmp_path / "adapter_model.bin").unlink()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("route", ["LookaheadKVConfig", "PeftModel", "load_adapter"])
def test_a_truncated_file_of_weights_is_named(route, adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged or truncated"):
        ROUTES[route](adapter)


def test_an_adapter_of_an_earlier_version_scores_as_it_did(adapter, tmp_path):
    """The fields that this version added change nothing."""
    earlier = shutil.copytree(adapter, tmp_path / "earlier")
    edit(earlier, leave_out=["format_version", "init_weights"])
    kept = []
    for directory in (adapter, earlier):
        model = lookahead_model()
        delete_adapter(model, "default")
        load_adapter(model, directory)
        cache = LookaheadCache(budget=7)
        with torch.no_grad():
            model(input_ids=prompt_ids(1, 40, vocabulary=SIZES["vocab_size"]), past_key_values=cache)
        kept.append([layer.kept() for layer in cache.layers])
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))
