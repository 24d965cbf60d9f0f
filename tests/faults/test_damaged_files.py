"""Adapters and checkpoints that are damaged, wrong or hostile: refused with an error, and never run, trusted or
allocated for."""

import json
import pickle
import random
import resource
import shutil

import pytest
import torch
from children import run
from jinja2.exceptions import SecurityError
from models import prompt_ids
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_checkpoint import small_tokenizer
from transformers import AutoModelForCausalLM

from lkq_hf import LookaheadCache, LookaheadKVConfig, TwoStageGPTQConfig, TwoStageQuantizer
from lkq_hf.adapter.model import adapter_parameters
from lkq_hf.hub import load_adapter, read_contents
from lkq_hf.sharing.cards import render_card
from lkq_hf.text.chat import render_chat

WEIGHTS = {"adapter": "adapter_model.safetensors", "checkpoint": "model.safetensors"}
CONFIGS = {"adapter": "adapter_config.json", "checkpoint": "config.json"}


@pytest.fixture(scope="session")
def quantized(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "checkpoint"
    TwoStageQuantizer.from_pretrained(files / "base").quantize(
        out, dataset=str(files / "calibration.jsonl"), num_samples=2, model_seqlen=32, group_size=32, device="cpu"
    )
    return out


@pytest.fixture
def adapter(files, tmp_path):
    """A copy to damage."""
    return shutil.copytree(files / "adapter", tmp_path / "adapter")


@pytest.fixture
def checkpoint(quantized, tmp_path):
    """A copy to damage."""
    return shutil.copytree(quantized, tmp_path / "checkpoint")


def base(files):
    return AutoModelForCausalLM.from_pretrained(files / "base")


def with_peft(files, directory):
    return PeftModel.from_pretrained(base(files), directory)


def with_transformers(files, directory):
    model = base(files)
    model.load_adapter(str(directory))
    return model


def with_ours(files, directory):
    model = base(files)
    load_adapter(model, directory)
    return model


def alone(files, directory):
    return AutoModelForCausalLM.from_pretrained(directory)


ROUTES = {"PeftModel": with_peft, "load_adapter": with_transformers, "lkq_hf.hub": with_ours}
every_route = pytest.mark.parametrize("route", ROUTES)


def answer(model):
    """Generated ids; an adapter's missing weights are found here at the latest."""
    cache = LookaheadCache(8) if getattr(model, "peft_config", None) else None
    return model.generate(input_ids=prompt_ids(1, 40), past_key_values=cache, max_new_tokens=2, do_sample=False)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_quantization(path, **changes):
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def points(size, count, seed=0):
    """Byte positions: of the header, which begins the file, and of the rest."""
    draw = random.Random(seed)
    return sorted(
        {draw.randrange(min(size, 3000)) for _ in range(count // 2)}
        | {draw.randrange(size) for _ in range(count // 2)}
    )


# ---- truncated at any byte


def check_truncated(kind, load, files, directory, count):
    for name in (WEIGHTS[kind], CONFIGS[kind]):
        path = directory / name
        content = path.read_bytes()
        # A config may lose its last line end.
        for size in points(len(content.rstrip()), count):
            path.write_bytes(content[:size])
            with pytest.raises(Exception) as error:
                answer(load(files, directory))
            assert not isinstance(error.value, MemoryError), size
        path.write_bytes(content)
    answer(load(files, directory))


@every_route
def test_a_truncated_adapter(route, files, adapter):
    check_truncated("adapter", ROUTES[route], files, adapter, 16)


def test_a_truncated_checkpoint(files, checkpoint):
    check_truncated("checkpoint", alone, files, checkpoint, 16)


@pytest.mark.slow
@every_route
def test_an_adapter_truncated_in_many_places(route, files, adapter):
    check_truncated("adapter", ROUTES[route], files, adapter, 600)


# ---- flipped bits


def flipped(content, seed, size):
    draw = random.Random(seed)
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 3])):
        changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def check_flipped(kind, load, files, directory, count):
    """Either an error, or a model of the right shape with finite weights: numbers may differ, nothing else."""
    whole = load(files, directory)
    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    method = type(getattr(whole.config, "quantization_config", None))
    refused = 0
    for name in (WEIGHTS[kind], CONFIGS[kind]):
        path = directory / name
        content = path.read_bytes()
        for seed in range(count):
            path.write_bytes(flipped(content, seed, min(len(content), 3000) if seed % 2 else len(content)))
            try:
                model = load(files, directory)
                answer(model)
            except Exception as error:
                assert not isinstance(error, MemoryError), seed
                refused += 1
            else:
                if type(getattr(model.config, "quantization_config", None)) is not method:
                    continue  # the flip renamed the key or the method: transformers alone reads it, as not quantized
                assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes, seed
                assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()), seed
        path.write_bytes(content)
    assert refused > count // 4, "a damaged header or config is noticed"


@every_route
def test_flipped_bits_of_an_adapter(route, files, adapter):
    check_flipped("adapter", ROUTES[route], files, adapter, 24)


def test_flipped_bits_of_a_checkpoint(files, checkpoint):
    check_flipped("checkpoint", alone, files, checkpoint, 24)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WEIGHTS)
def test_many_flipped_bits(kind, files, adapter, checkpoint):
    directory, load = (adapter, with_peft) if kind == "adapter" else (checkpoint, alone)
    check_flipped(kind, load, files, directory, 600)


# ---- tensors that do not belong together


def damage(path, **changes):
    state = load_file(path)
    for name, change in changes.items():
        key = next(key for key in state if key.endswith(name))
        state[key] = change(state[key])
    save_file(state, path, metadata={"format": "pt"})


@every_route
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_of_another_type(route, dtype, files, adapter):
    """PEFT shows us the tensors before it loads them; transformers casts them, and warns of nothing."""
    damage(adapter / WEIGHTS["adapter"], lookahead_kv_A=lambda tensor: tensor.to(dtype))
    if route in ("PeftModel", "lkq_hf.hub"):
        with pytest.raises(ValueError, match=rf"lookahead_kv_A.* should hold floating-point numbers, found {dtype}"):
            ROUTES[route](files, adapter)
    else:
        answer(ROUTES[route](files, adapter))


@pytest.mark.parametrize("route", ["PeftModel", "lkq_hf.hub"])
def test_a_tensor_that_the_config_does_not_ask_for(route, files, adapter):
    path = adapter / WEIGHTS["adapter"]
    save_file(load_file(path) | {"something": torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"do not fit its config and this model: 1 tensors are unexpected \(something"
    ):
        ROUTES[route](files, adapter)


@pytest.mark.parametrize("route", ["PeftModel", "lkq_hf.hub"])
def test_a_config_that_asks_for_fewer_layers(route, files, adapter):
    edit(adapter / CONFIGS["adapter"], last_layer_modules=[])
    with pytest.raises(ValueError, match="do not fit its config and this model: 4 tensors are unexpected"):
        ROUTES[route](files, adapter)


def test_what_we_refused_leaves_the_model_without_an_adapter(files, adapter):
    path, model = adapter / WEIGHTS["adapter"], base(files)
    save_file(load_file(path) | {"something": torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unexpected"):
        load_adapter(model, adapter)
    load_adapter(model, files / "adapter")
    answer(model)


def remove(name):
    def change(path):
        state = load_file(path)
        for key in [key for key in state if key.endswith(name)]:
            del state[key]
        save_file(state, path, metadata={"format": "pt"})

    return change


CHECKPOINTS = {
    "a missing norm": (remove("model.norm.weight"), "the checkpoint has no model.norm.weight"),
    "a missing packed tensor": (remove("1.mlp.up_proj.qzeros"), "the checkpoint has no .*up_proj.qzeros"),
    "integers for floats": (
        lambda path: damage(path, **{"model.norm.weight": lambda tensor: tensor.long()}),
        "model.norm.weight should hold floating-point numbers, found I64",
    ),
    "NaN in the embedding": (
        lambda path: damage(path, **{"embed_tokens.weight": lambda tensor: tensor.fill_(torch.nan)}),
        "embed_tokens.weight holds values that are not finite",
    ),
    "a scale of zero": (
        lambda path: damage(path, scales=lambda tensor: tensor.fill_(0)),
        "scales should be finite and not 0",
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_with(kind, checkpoint):
    change, message = CHECKPOINTS[kind]
    change(checkpoint / WEIGHTS["checkpoint"])
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_a_config_that_leaves_packed_layers_out(checkpoint):
    """transformers would fill them with random weights."""
    edit_quantization(checkpoint / CONFIGS["checkpoint"], modules_to_not_convert=["mlp"])
    with pytest.raises(ValueError, match=r"holds packed weights of model\.layers\.0\.mlp.*modules_to_not_convert"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


# ---- configs


REFUSED_VALUES = {
    "r": [10**9, 0, -1, 4.0, "4", True, None, [4]],
    "num_lookahead_tokens": [10**9, 0, -3, "x", None],
    "lora_alpha": [0, -1, 1e300, float("nan"), float("inf"), "x", None, []],
    "row_power": [0.5, 9, float("nan"), "x", None],
    "pooling_kernel_size": [0, 2, 10**9 + 1, 3.0, "3", None],
    "pooling": ["median", 3, None, ["sum"]],
    "neighbor_weight": [0, -1, 2, float("nan"), "0.2", None],
    "target_modules": [5, [5], "(", {"q_proj": 1, 5: 2}],
    "last_layer_modules": [5, [5], "q_proj"],
    "base_model_shape": [[1], "x", 5],
}


@pytest.mark.parametrize("field", REFUSED_VALUES)
def test_values_that_an_adapters_config_cannot_have(field, files, adapter):
    for value in REFUSED_VALUES[field]:
        with pytest.raises(ValueError, match=f"{field} must be"):
            LookaheadKVConfig(**{field: value})
    edit(adapter / CONFIGS["adapter"], **{field: REFUSED_VALUES[field][0]})
    for route in ROUTES.values():
        with pytest.raises(ValueError, match=f"{field} must be"):
            route(files, adapter)


REFUSED_QUANTIZATION = {
    "bits": [10**9, "4", True, None],
    "group_size": [0, -2, "x", 1.5],
    "stages": ["stage1", 5, [5], [[]]],
    "preset": [[], "other"],
    "alpha": [float("nan"), "x", 2],
    "sweeps": [0, "x"],
    "meta": [[], 5],
    "modules_to_not_convert": [5, [5], "mlp"],
    "modules_in_block_to_quantize": [5, [5], "mlp"],
    "block_name_to_quantize": [5],
}


@pytest.mark.parametrize("field", REFUSED_QUANTIZATION)
def test_values_that_a_checkpoints_config_cannot_have(field, checkpoint):
    for value in REFUSED_QUANTIZATION[field]:
        with pytest.raises((ValueError, TypeError), match=f"{field} must be"):
            TwoStageGPTQConfig(**{field: value})
    edit_quantization(checkpoint / CONFIGS["checkpoint"], **{field: REFUSED_QUANTIZATION[field][0]})
    with pytest.raises((ValueError, TypeError), match=f"{field} must be"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@every_route
def test_an_unknown_field_of_an_adapters_config_is_named(route, files, adapter):
    """As everywhere in PEFT, so that adapters of later versions load if they can."""
    edit(adapter / CONFIGS["adapter"], of_a_later_version=5)
    with pytest.warns(UserWarning, match="of_a_later_version"):
        answer(ROUTES[route](files, adapter))


def test_an_unknown_field_of_a_checkpoints_config_is_refused(checkpoint):
    edit_quantization(checkpoint / CONFIGS["checkpoint"], of_a_later_version=5)
    with pytest.raises(TypeError, match="no field 'of_a_later_version'"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def attempt(load, files, directory):
    """Bytes by which this process grew while it tried to load something, and what was said."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load(files, directory)
        said = None
    except Exception as error:
        said = str(error)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, said


ABSURD = [
    ("adapter", with_peft, {"r": 10**9}),
    ("adapter", with_transformers, {"r": 10**9}),
    ("adapter", with_peft, {"num_lookahead_tokens": 10**9}),
    ("adapter", with_transformers, {"num_lookahead_tokens": 10**9}),
    ("adapter", with_peft, {"r": 4096, "num_lookahead_tokens": 4096}),
    ("checkpoint", alone, {"hidden_size": 10**9}),
    ("checkpoint", alone, {"intermediate_size": 10**9}),
    ("checkpoint", alone, {"vocab_size": 10**12}),
]


@pytest.mark.parametrize(
    ("kind", "load", "changes"), ABSURD, ids=lambda value: str(value) if type(value) is dict else ""
)
def test_absurd_sizes_do_not_allocate(kind, load, changes, files, adapter, checkpoint):
    directory = {"adapter": adapter, "checkpoint": checkpoint}[kind]
    edit(directory / CONFIGS[kind], **changes)
    grown, said = run(attempt, load, files, directory)
    assert said and grown < 300e6


def test_a_name_outside_of_the_directory(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "elsewhere.safetensors")
    names = dict.fromkeys(load_file(checkpoint.parent / "elsewhere.safetensors"), "../elsewhere.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ValueError, match=r"names files outside of its directory: \.\./elsewhere"):
        _ = read_contents(checkpoint).weight_files


def test_fields_that_steer_a_calibration_mean_nothing_in_a_checkpoint(checkpoint, tmp_path):
    """Nothing is read from, or written to, where a stranger's config points."""
    edit_quantization(
        checkpoint / CONFIGS["checkpoint"], dataset="/etc/passwd", resume_dir=str(tmp_path / "evil"), device="evil"
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    answer(model)
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "evil").exists()
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert not {"dataset", "resume_dir", "device"} & saved.keys()


# ---- code


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("what", ["tensors", "code"])
@every_route
def test_pickled_weights_of_an_adapter(route, what, files, adapter, tmp_path):
    state = load_file(adapter / WEIGHTS["adapter"])
    (adapter / WEIGHTS["adapter"]).unlink()
    with (adapter / "adapter_model.bin").open("wb") as file:
        if what == "code":
            pickle.dump(Evil(tmp_path / "evil"), file)
        else:
            torch.save(state, file)
    refusal, message = ValueError, r"holds pickled weights \(adapter_model\.bin\).*a pickle can run code"
    if route != "PeftModel":  # transformers does not look at them
        refusal, message = FileNotFoundError, "adapter_model.safetensors"
    with pytest.raises(refusal, match=message):
        ROUTES[route](files, adapter)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("what", ["tensors", "code"])
def test_pickled_weights_of_a_checkpoint(what, checkpoint, tmp_path):
    state = load_file(checkpoint / WEIGHTS["checkpoint"])
    (checkpoint / WEIGHTS["checkpoint"]).unlink()
    with (checkpoint / "pytorch_model.bin").open("wb") as file:
        if what == "code":
            pickle.dump(Evil(tmp_path / "evil"), file)
        else:
            torch.save(state, file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged or truncated"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not (tmp_path / "evil").exists()


def test_a_pickle_beside_the_weights_is_not_opened(files, adapter, tmp_path):
    with (adapter / "adapter_model.bin").open("wb") as file:
        pickle.dump(Evil(tmp_path / "evil"), file)
    for route in ROUTES.values():
        answer(route(files, adapter))
    assert not (tmp_path / "evil").exists()


HOSTILE = "{{ 7 * 191 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}\nlicense: evil"


def test_a_name_that_is_a_template_stays_a_name(adapter):
    edit(adapter / CONFIGS["adapter"], base_model_name_or_path=HOSTILE, target_modules=[HOSTILE])
    card = render_card(read_contents(adapter), "alice/adapter")
    assert "1337" not in str(card) and "<class" not in str(card)
    assert card.data.license is None


def test_a_chat_template_cannot_reach_python():
    tokenizer = small_tokenizer()
    before = tokenizer.chat_template
    tokenizer.chat_template = "{{ ().__class__.__base__.__subclasses__() }}"
    try:
        with pytest.raises(SecurityError):
            render_chat([{"role": "user", "content": "hello"}], "", tokenizer)
    finally:
        tokenizer.chat_template = before


# ---- another base, and budgets


@every_route
def test_an_adapter_for_another_base(route, files, adapter):
    shape = json.loads((adapter / CONFIGS["adapter"]).read_text())["base_model_shape"]
    edit(adapter / CONFIGS["adapter"], base_model_shape=shape | {"hidden_size": 4096, "model_type": "qwen3"})
    with pytest.raises(ValueError, match=r"made for another base model.*hidden_size is 128 and should be 4096"):
        ROUTES[route](files, adapter)


def test_no_weight_is_changed_by_an_adapter_that_is_refused(files, adapter):
    edit(adapter / CONFIGS["adapter"], base_model_shape={"hidden_size": 4096})
    model, expected = base(files), base(files)
    with pytest.raises(ValueError, match="another base model"):
        model.load_adapter(str(adapter))
    ids = prompt_ids(1, 20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not adapter_parameters(model, "default")


@pytest.mark.parametrize(
    "budget", [0, -1, -(10**30), 0.0, -0.5, 1.5, float("nan"), float("inf"), -float("inf"), "8", None, True, [8], 2j]
)
def test_budgets_that_are_none(budget):
    with pytest.raises((ValueError, TypeError), match="budget"):
        LookaheadCache(budget)


@pytest.mark.parametrize("budget", [10**30, 2**63, 1.0])
def test_a_huge_budget_keeps_everything(budget, files):
    model = with_peft(files, files / "adapter")
    cache = LookaheadCache(budget)
    model.generate(input_ids=prompt_ids(1, 40), past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert cache.summary()["entries_stored"] == 41
    assert LookaheadCache(1e-300).entries_to_keep(40) == 1
