"""Bit widths by layer: how they are chosen, and that everything downstream keeps them."""

import itertools
import json
import math
import random

import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lkq_hf.files import bytes_of
from lkq_hf.quantization import QuantizedLinear, TwoStageGPTQConfig, TwoStageQuantizer, mixed_bits
from lkq_hf.quantization.block_solver import BlockSolver
from lkq_hf.quantization.blocks import find_layers, linear_weight
from lkq_hf.quantization.export import export_checkpoint, known_readers
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.sensitivity import _of_one_layer, _quick, trial_quantization
from lkq_hf.quantization.solve import quantize_weight
from lkq_hf.quantization.widths import Unit, choose_widths
from lkq_hf.sharing.cards import render_card
from lkq_hf.sharing.contents import read_contents

WIDTHS = (2, 3, 4, 8)


@pytest.fixture
def settings(tokenizer, texts):
    shape = {"num_samples": 8, "model_seqlen": 32, "group_size": 32, "device": "cpu"}
    return {"dataset": texts, "tokenizer": tokenizer, "preset": "paper", "sym": False, **shape}


def random_units(count, seed):
    chance = random.Random(seed)
    units = []
    for index in range(count):
        scale, base = math.exp(chance.uniform(-4, 4)), chance.uniform(2, 6)
        weights = chance.choice([100, 300, 700])
        losses = {bits: scale * base**-bits for bits in WIDTHS}
        units.append(Unit((f"{index}.proj",), weights, {bits: weights * bits for bits in WIDTHS}, losses))
    return units


@pytest.mark.one_version
@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_nearly_the_best_one(seed):
    units = random_units(6, seed)
    costs = [unit.sizes for unit in units]
    for mean in (2.0, 2.5, 3.0, 3.7, 8.0):
        budget = mean * sum(unit.weights for unit in units)
        chosen = choose_widths(units, costs, budget)

        def loss(widths):
            return sum(unit.losses[width] for unit, width in zip(units, widths, strict=True))

        def cost(widths):
            return sum(unit.sizes[width] for unit, width in zip(units, widths, strict=True))

        assert cost(chosen) <= budget
        for uniform in WIDTHS:
            assert uniform > mean or loss(chosen) <= loss([uniform] * 6) * (1 + 1e-9)
        # No choice of the same cost loses less.
        fitting = (widths for widths in itertools.product(WIDTHS, repeat=6) if cost(widths) <= cost(chosen))
        assert loss(chosen) <= 1.25 * min(map(loss, fitting))
    with pytest.raises(ValueError, match="more than the budget"):
        choose_widths(units, costs, 1.9 * sum(unit.weights for unit in units))


def test_a_larger_width_that_loses_more_is_no_step():
    unit = Unit(("0.proj",), 1, {2: 2, 3: 3, 4: 4}, {2: 1.0, 3: 0.2, 4: 0.3})
    assert choose_widths([unit], [unit.sizes], 100) == [3]


def test_widths_that_are_left_out():
    unit = Unit(("0.proj",), 1, {2: 2, 3: 3, 4: 4}, {2: 1.5, 3: 1.0, 4: 0.5})
    assert unit.at_least(3).losses == {3: 1.0, 4: 0.5}


def divergence_of(model, other, tokens):
    logits = (each(tokens).logits.log_softmax(-1) for each in (other, model))
    return F.kl_div(*logits, log_target=True, reduction="none").sum(-1).mean().item()


def solve(model, dense, names, tokens, settings):
    """Quantizes layers that share an input from their dense weights."""
    layers = [model.get_submodule(name) for name in names]
    moments = InputMoments(layers[0].in_features, deviation=False)
    with layers[0].register_forward_pre_hook(lambda _, args: moments.add(args[0])):
        for window in tokens.split(1):
            model(window)
    for name, layer in zip(names, layers, strict=True):
        solution = quantize_weight(dense[f"{name}.weight"], moments, settings)
        linear_weight(layer).copy_(solution.weight.dequantize())


@pytest.mark.one_version
@torch.no_grad()
def test_losses_are_divergences_of_one_unit_alone():
    model, other = (tiny_model(vocab_size=96, initializer_range=0.2) for _ in range(2))
    tokens = torch.randint(0, 96, (30, 48), generator=torch.Generator().manual_seed(0))
    measured, compared, solved = tokens[:4], tokens[4:12], tokens[12:24]
    config = TwoStageGPTQConfig(bits=4, group_size=32, sym=False)
    settings = config.solver_settings()
    list_name, layers = find_layers(model, config)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    with trial_quantization(model, list_name, layers, tokens, settings, "cpu") as trial:
        units = trial.measure(3)
        mixed = {layer: 2 if ".mlp." in layer else 4 for unit in units for layer in unit.layers}
        found = trial.divergence(mixed)
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())
    assert [unit.layers for unit in units[:4]] == [
        ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"),
        ("0.self_attn.o_proj",),
        ("0.mlp.gate_proj", "0.mlp.up_proj"),
        ("0.mlp.down_proj",),
    ]
    names = [[f"{list_name}.{layer}" for layer in unit.layers] for unit in units]
    for unit, inside in zip(units, names, strict=True):
        solve(other, dense, inside, solved, _quick(settings, mixed[unit.layers[0]]))
    assert found == pytest.approx(divergence_of(model, other, compared), rel=1e-3)
    for unit, inside in zip(units, names, strict=True):
        other.load_state_dict(dense)
        solve(other, dense, inside, solved, _of_one_layer(settings, 2))
        alone = divergence_of(model, other, measured)
        expected = {2: alone, 3: alone / 4, 4: alone / 16, 8: alone / 4096}
        assert unit.losses == pytest.approx(expected, rel=1e-2, abs=1e-6)


class Rehearsed:
    """Stands for a trial quantization that predicts best, or worst, with one width in all layers."""

    def __init__(self, uniform_is_best):
        self.uniform_is_best = uniform_is_best

    def measure(self, bits):
        losses = [{2: loss, 3: loss / 4, 4: loss / 16, 8: 0.0} for loss in (0.001, 1.0, 0.03)]
        return [Unit((f"{i}.proj",), 100, {b: b for b in WIDTHS}, each) for i, each in enumerate(losses)]

    def divergence(self, bits):
        return float((len(set(bits.values())) > 1) == self.uniform_is_best)


@pytest.mark.parametrize("uniform_is_best", [True, False])
def test_one_width_for_all_stays_unless_a_choice_loses_less(uniform_is_best):
    costs = [{bits: 100 * bits for bits in WIDTHS}] * 3
    bits, loss = mixed_bits._best(Rehearsed(uniform_is_best), costs, 900)
    assert loss == 0
    assert bits == ({f"{i}.proj": 3 for i in range(3)} if uniform_is_best else {"0.proj": 2, "1.proj": 4, "2.proj": 3})


@pytest.mark.parametrize("bits", [2.4, 3.3])
def test_a_mean_of_bits(tiny_llama, settings, tmp_path, bits):
    model = TwoStageQuantizer(tiny_llama).quantize(tmp_path / "out", bits=bits, **settings)
    config = model.config.quantization_config
    widths = {name: m.bits for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    weights = {name: m.in_features * m.out_features for name, m in model.named_modules() if name in widths}
    mean = sum(widths[name] * weights[name] for name in widths) / sum(weights.values())
    assert bits - 0.7 < mean <= bits and len(set(widths.values())) > 1
    for index in range(2):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        assert len({widths[f"{attention}.{kind}_proj"] for kind in "qkv"}) == 1
        assert widths[f"{mlp}.gate_proj"] == widths[f"{mlp}.up_proj"]
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["bits"] in WIDTHS and stored["layer_bits"] and "mean_bits" not in stored
    assert stored["meta"]["mean_bits"] == pytest.approx(mean, abs=1e-4)
    assert sum(stored["meta"]["layers_by_bits"].values()) == len(widths)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(2, 30).view(1, -1)
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "again")
    once_more = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert once_more["layer_bits"] == config.layer_bits
    card = render_card(read_contents(tmp_path / "out"), "alice/mixed").text
    assert f"weights of {mean:.2f} bits on\naverage" in card and f"| {mean:.2f} on average, " in card


@pytest.mark.one_version
def test_a_size(tiny_llama, settings, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    quantizer = TwoStageQuantizer(str(tmp_path / "base"))
    quantizer.quantize(tmp_path / "small", bits=2, **settings)
    quantizer.quantize(tmp_path / "large", bits=4, **settings)
    least, most = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "large"))
    target = (least + most) // 2
    quantizer.quantize(tmp_path / "out", target_size=target, **settings)
    found = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert least < found <= target and found > target - 0.5 * (most - least)


@pytest.mark.one_version
def test_a_killed_run_keeps_its_widths(tiny_llama, settings, tmp_path, monkeypatch):
    tiny_llama.save_pretrained(tmp_path / "base")
    whole = TwoStageQuantizer(str(tmp_path / "base")).quantize(tmp_path / "whole", bits=3.3, **settings)
    solve = BlockSolver.solve

    def killed(solver, index, *more):
        if index == 1:
            raise KeyboardInterrupt
        return solve(solver, index, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BlockSolver, "solve", killed)
        TwoStageQuantizer(str(tmp_path / "base")).quantize(tmp_path / "out", bits=3.3, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(mixed_bits, "trial_quantization", None)
        quantizer = TwoStageQuantizer(str(tmp_path / "base"))
        model = quantizer.quantize(tmp_path / "out", bits=3.3, **settings)
    assert quantizer.report.resumed_blocks == 1
    assert model.config.quantization_config.layer_bits == whole.config.quantization_config.layer_bits
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("sym", [True, False])
def test_exports_say_each_layers_bits(tiny_llama, settings, tmp_path, sym):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import PackedQuantizationCompressor

    model = TwoStageQuantizer(tiny_llama).quantize(tmp_path / "ours", bits=3.3, **{**settings, "sym": sym})
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    out = export_checkpoint(tmp_path / "ours", tmp_path / "gptq", "gptq")
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    for name, layer in layers.items():
        # The first rule that matches decides, as in GPTQModel.
        rules = (value for rule, value in found.get("dynamic", {}).items() if rule == f"+:^{escaped(name)}$")
        assert next(rules, {"bits": found["bits"]}) == {"bits": layer.bits}
    out = export_checkpoint(tmp_path / "ours", tmp_path / "compressed", "compressed-tensors")
    stored = json.loads((out / "config.json").read_text())
    groups = quantization.QuantizationConfig.model_validate(stored["quantization_config"]).config_groups
    assert len(groups) == len({layer.bits for layer in layers.values()}) > 1
    tensors = load_file(out / "model.safetensors")
    for name, layer in layers.items():
        (scheme,) = (group for group in groups.values() if name in group.targets)
        mine = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
        weight = PackedQuantizationCompressor.decompress(mine, scheme)["weight"]
        assert torch.equal(weight, layer.dequantize(weight.dtype))
    card = render_card(read_contents(out), "alice/mixed").text
    assert " on average, " in card
    assert known_readers(tmp_path / "gptq") == []
    if not sym:
        assert known_readers(out) == ["compressed-tensors"]
        return
    assert known_readers(out) == ["compressed-tensors", "transformers with compressed-tensors"]
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(2, 30).view(1, -1)
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=0.1)


def escaped(name):
    return name.replace(".", r"\.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "fraction between for a mean"),
        ({"bits": 1.5}, "fraction between for a mean"),
        ({"bits": "4"}, "fraction between for a mean"),
        ({"bits": 3.5, "layer_bits": {"0.mlp.up_proj": 4}}, "give one of them"),
        ({"layer_bits": {"0.mlp.up_proj": 5}}, r"layer_bits\['0.mlp.up_proj'\] must be one of"),
        ({"target_size": "4.5 gigs"}, "such as 4.5GiB"),
    ],
)
def test_wrong_widths_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoStageGPTQConfig(**arguments)


def test_what_cannot_be_done_is_refused_before_anything_is_written(tiny_llama, settings, tmp_path):
    for arguments, message in (
        ({"target_size": "10kB"}, "is too little: with 2 bits in all layers"),
        ({"layer_bits": {"7.mlp.up_proj": 2}}, r"no layer that is quantized.*such as '0.self_attn.q_proj'"),
    ):
        with pytest.raises(ValueError, match=message):
            TwoStageQuantizer(tiny_llama).quantize(tmp_path / "out", **arguments, **settings)
    tiny_llama.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="one block at a time"):
        TwoStageQuantizer(str(tmp_path / "base")).quantize(tmp_path / "out", bits=3.3, block_by_block=True, **settings)
    mixture = tiny_model("mixtral")
    with pytest.raises(ValueError, match=r"found fused experts \(model.layers.0.mlp.experts\)"):
        TwoStageQuantizer(mixture).quantize(tmp_path / "out", bits=3.3, **settings)
    assert not (tmp_path / "out").exists()


def test_widths_of_ones_own(tiny_llama, settings, tmp_path):
    config = {"bits": 4, "layer_bits": {"1.mlp.down_proj": 2, "0.self_attn.k_proj": 8}}
    model = TwoStageQuantizer(tiny_llama).quantize(tmp_path / "out", **config, **settings)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.model.layers[1].mlp.down_proj.bits == 2 and again.model.layers[0].mlp.down_proj.bits == 4
    assert again.model.layers[0].self_attn.k_proj.bits == 8
    ids = torch.arange(2, 30).view(1, -1)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_sizes():
    assert [bytes_of(size) for size in (17, "17", "1.5kB", "2 MiB", "4.5GiB")] == [
        17, 17, 1500, 2 * 2**20, int(4.5 * 2**30),
    ]  # fmt: skip
    for wrong in ("", "GiB", "-1GB", "4.5T"):
        with pytest.raises(ValueError, match=r"such as 4\.5GiB"):
            bytes_of(wrong)
