"""Fused experts: quantized on the tokens they compute, packed, run packed, saved and loaded."""

import copy
import json
import logging

import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lkq_hf.quantization import QuantizedLinear, TwoStageGPTQConfig, TwoStageQuantizer
from lkq_hf.quantization import expert_inputs as expert_inputs_module
from lkq_hf.quantization import expert_solver as expert_solver_module
from lkq_hf.quantization.block_solver import BlockSolver
from lkq_hf.quantization.calibrate import find_layers
from lkq_hf.quantization.expert_inputs import ExpertInputs
from lkq_hf.quantization.experts import PACKED_EXPERTS, is_experts, packed_experts, projections, use_packed_experts
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.optimum_quantizer import mark_quantized
from lkq_hf.quantization.quantized_experts import QuantizedExperts
from lkq_hf.quantization.quantizer import restore_linear
from lkq_hf.quantization.shrinkage import common_share, mixture
from lkq_hf.quantization.walk import quantize_blocks

FEW = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
SMALL = FEW | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
# Tiny versions of the models, and what of them does not pack at these sizes.
MODELS = {
    "mixtral": (FEW, []),
    "qwen3_moe": (SMALL, []),
    "qwen2_moe": (SMALL, ["shared_expert_gate"]),
    "qwen3_next": (SMALL | LINEAR, ["shared_expert_gate", "in_proj_ba"]),
    "qwen3_5_moe_text": (SMALL | LINEAR, ["shared_expert_gate", "in_proj_a", "in_proj_b"]),
    # Biases, transposed weights, gate and up interleaved.
    "gpt_oss": (FEW | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, []),
    # Latent attention, a dense layer before the experts, shared experts.
    "deepseek_v3": (SMALL | LATENT | GROUPS | {"num_key_value_heads": 4, "head_dim": 32}, []),
}


def built(name, **changes):
    return tiny_model(name, **MODELS[name][0] | {"num_hidden_layers": 2} | changes)


def config(name="mixtral", **changes):
    exclude = [*MODELS[name][1], *changes.pop("exclude", [])]
    return TwoStageGPTQConfig(
        **{"bits": 4, "group_size": 32, "sym": False, "modules_to_not_convert": exclude or None, **changes}
    )


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 160, (6, 24), generator=torch.Generator().manual_seed(0))


def quantized(model, tokens, settings, **changes):
    list_name, layers = find_layers(model, settings)
    report = quantize_blocks(
        model, list_name, layers, tokens, settings.solver_settings(), **{"batch_size": 3, **changes}
    )
    mark_quantized(model, settings)
    return report


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def modules_of(model):
    return {name: module for name, module in model.named_modules() if packed_experts(module)}


@pytest.mark.parametrize("name", MODELS)
def test_packed_experts_compute_what_dense_ones_do_with_the_dequantized_weights(name, tokens, tmp_path):
    model = built(name)
    before = logits(model, tokens)
    found = [key for key, module in model.named_modules() if is_experts(module)]
    report = quantized(model, tokens, config(name))
    after = logits(model, tokens)
    assert 0 < (after - before).norm() / before.norm() < 0.6
    assert list(modules_of(model)) == found and list(report.experts) == found
    assert not any(parameter.dim() > 2 for parameter in model.parameters() if parameter.numel() > 1024)

    dense = restore_linear(copy.deepcopy(model), torch.float32)
    assert [key for key, module in dense.named_modules() if is_experts(module)] == found
    torch.testing.assert_close(logits(dense, tokens), after, rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(logits(again, tokens), after)
    again.dequantize().save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager")
    assert not modules_of(plain)
    torch.testing.assert_close(logits(plain, tokens), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(("bits", "sym"), [(2, False), (3, True), (8, False)])
def test_other_formats_load_as_they_were_saved(name, bits, sym, tokens, tmp_path):
    model = built(name)
    quantized(model, tokens, config(name, bits=bits, sym=sym, group_size=-1))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_the_packed_implementation_runs_by_transformers_registry(tokens, monkeypatch):
    model = built("mixtral")
    quantized(model, tokens, config())
    calls = []
    original = ALL_EXPERTS_FUNCTIONS[PACKED_EXPERTS]
    spy = lambda *args: calls.append(args[0]) or original(*args)  # noqa: E731
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, PACKED_EXPERTS, spy)
    expected = logits(model, tokens)
    assert len(calls) == 2 and model.get_experts_implementation()[""] == PACKED_EXPERTS
    # The loops in transformers' own models read one dequantized weight after the other.
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


def test_experts_that_are_left_out_stay_as_they_are_beside_packed_ones(tokens, tmp_path):
    model = built("qwen3_moe")
    before = copy.deepcopy(model.model.layers[0].mlp.experts.state_dict())
    quantized(model, tokens, config("qwen3_moe", exclude=["layers.0.mlp.experts"]))
    assert list(modules_of(model)) == ["model.layers.1.mlp.experts"]
    assert all(
        torch.equal(before[key], value) for key, value in model.model.layers[0].mlp.experts.state_dict().items()
    )
    model.save_pretrained(tmp_path)
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_generate_and_other_dtypes(tokens):
    model = built("mixtral")
    quantized(model, tokens, config())
    half = copy.deepcopy(model).to(torch.bfloat16)
    packed = half.model.layers[0].mlp.experts.packed_down_proj
    assert packed.scales.dtype == torch.float16 and packed.dtype == packed[0].dtype == torch.bfloat16
    assert logits(half, tokens).dtype == torch.bfloat16
    generated = model.generate(tokens[:2, :8], max_new_tokens=4, do_sample=False)
    dense = restore_linear(copy.deepcopy(model), torch.float32)
    assert torch.equal(generated, dense.generate(tokens[:2, :8], max_new_tokens=4, do_sample=False))


def test_gradients_reach_what_comes_before_experts(tokens):
    model = built("mixtral")
    quantized(model, tokens, config())
    dense = restore_linear(copy.deepcopy(model), torch.float32)
    gradients = []
    for each in (model, dense):
        embeddings = each.get_input_embeddings()(tokens).detach().requires_grad_()
        each(inputs_embeds=embeddings).logits.square().sum().backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_an_expert_is_calibrated_on_its_tokens_with_the_squares_of_their_gates(tokens, monkeypatch):
    """The moments of the first layer's experts against a plain computation on the base model."""
    model = built("mixtral")
    received = []
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, args: received.append(args))
    logits(model, tokens)
    hook.remove()
    ((x, index, gates),) = received
    gate_up = experts.gate_up_proj.detach().clone()
    found, solved = [], []
    original = expert_solver_module.quantize_weights

    def own_alone(own, common, share):
        found.append((own.hessian, own.tokens, common.hessian, share))
        return own

    def spy(weights, moments, settings):
        solved.extend(each.hessian for each in moments)
        return original(weights, moments, settings)

    monkeypatch.setattr(expert_solver_module, "mixture", own_alone)
    monkeypatch.setattr(expert_solver_module, "quantize_weights", spy)
    # The attention before it stays as it is.
    quantized(model, tokens, config(exclude=["self_attn"]), batch_size=6)
    squares = gates.square()
    for expert in range(4):
        own = (squares * (index == expert)).sum(1)
        # The first projections of all four, then their last ones.
        hessian, count, common, share = found[expert]
        assert count == int((index == expert).sum())
        assert share == found[4 + expert][3] == common_share(count, 64)
        torch.testing.assert_close(hessian, (x * own[:, None]).T @ x / own.sum())
        torch.testing.assert_close(common, (x * squares.sum(1)[:, None]).T @ x / squares.sum())
        torch.testing.assert_close(solved[expert], hessian)
        # The down projection's inputs come from the quantized first projection: near those of the original one.
        gate, up = (x @ gate_up[expert].T).chunk(2, -1)
        inner = nn.functional.silu(gate) * up
        expected = (inner * own[:, None]).T @ inner / own.sum()
        assert (solved[4 + expert] - expected).norm() < 0.2 * expected.norm()
        assert not torch.equal(solved[4 + expert], expected)


def test_deviations_of_experts_are_those_of_their_own_tokens(tokens, monkeypatch):
    """The full-precision model's inputs at the tokens that the quantized model routes to an expert."""
    model = built("mixtral")
    full = copy.deepcopy(model)
    found = []
    monkeypatch.setattr(expert_solver_module, "mixture", lambda own, common, share: found.append(own.deviation) or own)
    quantized(model, tokens, config(bits=3))
    received = []
    for each in (full, model):
        hook = each.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: received.append(args))
        logits(each, tokens)
        hook.remove()
    (x, _, _), (x_tilde, index, gates) = received
    for expert in range(4):
        own = (gates.square() * (index == expert)).sum(1, keepdim=True)
        expected = ((x - x_tilde) * own).T @ x_tilde / own.sum()
        torch.testing.assert_close(found[8 + expert], expected, rtol=1e-3, atol=1e-4)


def test_few_tokens_of_its_own_are_mixed_with_the_common_input():
    generator = torch.Generator().manual_seed(0)
    own, common = InputMoments(8), InputMoments(8)
    for moments, count in ((own, 5), (common, 50)):
        x = torch.randn(count, 8, generator=generator)
        moments.add(x, x + 0.1, weights=torch.rand(count, generator=generator))
    assert [common_share(tokens, 8) for tokens in (0, 8, 24)] == [1.0, 0.5, 0.25]
    mixed = mixture(own, common, 0.25)
    torch.testing.assert_close(mixed.hessian, 0.75 * own.hessian + 0.25 * common.hessian)
    torch.testing.assert_close(mixed.deviation, 0.75 * own.deviation + 0.25 * common.deviation)
    assert mixed.tokens == 5
    assert mixture(InputMoments(8), common, 1.0) is common
    assert mixture(InputMoments(8, deviation=False), InputMoments(8), 1.0).hessian.sum() == 0


def test_weighted_moments_are_those_of_repeated_tokens():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 2, 3, 0, 1, 2])
    repeated = x.repeat_interleave(weights.long(), 0)
    streamed = InputMoments(8)
    for rows in ([0, 1], [3], [2, 4, 5]):
        streamed.add(x[rows], x[rows].roll(1, -1), weights=weights[rows])
    torch.testing.assert_close(streamed.hessian, repeated.T @ repeated / 9)
    torch.testing.assert_close(streamed.deviation, (repeated.roll(1, -1) - repeated).T @ repeated / 9)
    assert (streamed.tokens, streamed.weight) == (6, 9.0)


def starve(model, layer, expert):
    """Lets a router send no token to an expert."""
    original = model.model.layers[layer].mlp.gate.forward

    def forward(hidden):
        scores, _, _ = original(hidden)
        scores[:, expert] = -torch.inf
        gates, index = scores.softmax(-1).topk(2)
        return scores, gates / gates.sum(-1, keepdim=True), index

    model.model.layers[layer].mlp.gate.forward = forward


def test_experts_without_tokens_take_the_common_input_and_are_counted(tokens, tmp_path, caplog):
    model = built("mixtral")
    starve(model, 1, 2)
    with caplog.at_level(logging.WARNING, logger="lkq_hf"):
        report = quantized(model, tokens, config(), resume_dir=tmp_path)
    counts = report.experts["model.layers.1.mlp.experts"]
    assert (counts.experts, counts.unseen, counts.fewest_tokens, counts.tokens) == (4, 1, 0, tokens.numel())
    assert counts.rare >= 1 and report.experts["model.layers.0.mlp.experts"].unseen == 0
    assert "layers.1.mlp.experts: " in caplog.text and "(1 have none)" in caplog.text
    # It is calibrated: better than the nearest grid points on the tokens that it could have got.
    base = built("mixtral").model.layers[1].mlp.experts.down_proj[2]
    weight = model.model.layers[1].mlp.experts.packed_down_proj.dequantize(2)
    assert 0 < (weight - base).norm() / base.norm() < 0.2

    again = built("mixtral")
    starve(again, 1, 2)
    resumed = quantized(again, tokens, config(), resume_dir=tmp_path)
    assert resumed.resumed_blocks == 2 and resumed.experts == report.experts
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.one_version
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_come_out_the_same_however_many_are_solved_together(name, tokens, monkeypatch):
    """With rare ones and, in Mixtral, one without tokens."""
    models, sizes = [], []
    original = expert_solver_module.quantize_weights

    def spy(weights, moments, settings):
        sizes.append(len(weights))
        return original(weights, moments, settings)

    monkeypatch.setattr(expert_solver_module, "quantize_weights", spy)
    for together, expected in ((1, 4 * [1, 1]), (2_000_000, [3, 3, 1, 1]), (1 << 32, [4, 4])):
        models.append(built(name))
        if name == "mixtral":
            starve(models[-1], 1, 2)
        monkeypatch.setattr(expert_solver_module, "TOGETHER", together)
        report = quantized(models[-1], tokens, config(name, bits=3))
        assert sizes == 2 * expected
        sizes.clear()
    assert sum(counts.rare for counts in report.experts.values()) > 0
    for model in models[:2]:
        for (key, one), (_, all_) in zip(modules_of(model).items(), modules_of(models[2]).items(), strict=True):
            for projection in ("packed_gate_up_proj", "packed_down_proj"):
                for expert in range(4):
                    found = [each.get_submodule(projection).dequantize(expert) for each in (one, all_)]
                    assert (found[0] != found[1]).float().mean() < 0.01, (key, projection, expert)


@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_an_expert_that_cannot_be_quantized_is_named(projection, tokens):
    model = built("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.get_parameter(projection)[2, 3, 4] = 1e6
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.experts\.{projection}\[2\]: weights beyond 65504 have no"):
        quantized(model, tokens, config())


@pytest.mark.one_version
def test_a_killed_walk_resumes_to_the_same_experts(tokens, tmp_path, monkeypatch):
    whole = built("gpt_oss")
    quantized(whole, tokens, config("gpt_oss"))
    original = BlockSolver.solve
    done = []

    def killed(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return original(*args)

    monkeypatch.setattr(BlockSolver, "solve", killed)
    with pytest.raises(KeyboardInterrupt):
        quantized(built("gpt_oss"), tokens, config("gpt_oss"), resume_dir=tmp_path)
    monkeypatch.setattr(BlockSolver, "solve", original)
    resumed = built("gpt_oss")
    assert quantized(resumed, tokens, config("gpt_oss"), resume_dir=tmp_path).resumed_blocks == 1
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    changed = built("gpt_oss")
    with torch.no_grad():
        changed.model.layers[0].mlp.experts.down_proj[3, 0, 0] += 1
    with pytest.raises(ValueError, match="other base weights"):
        quantized(changed, tokens, config("gpt_oss"), resume_dir=tmp_path)


@pytest.mark.parametrize("changes", [{"true_sequential": False}, {"offload": "disk"}, {"batch_size": 1}])
def test_however_the_walk_goes_experts_come_out_close(changes, tokens):
    expected, model = built("mixtral"), built("mixtral")
    quantized(expected, tokens, config())
    quantized(model, tokens, config(), **changes)
    difference = (logits(model, tokens) - logits(expected, tokens)).norm() / logits(expected, tokens).norm()
    assert difference < (1e-2 if changes.get("offload") else 0.5)


class LargestFloat(TorchDispatchMode):
    """Remembers the most floating-point numbers that an operation has made real."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_loading_never_makes_dense_experts(name, tokens, tmp_path, monkeypatch):
    changes = {"num_local_experts": 32}
    model = built(name, **changes)
    largest = max(parameter.numel() for parameter in model.parameters())
    quantized(model, tokens, config(name))
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in this thread, where operations are seen
    with LargestFloat() as seen:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    embedding = model.get_input_embeddings().weight.numel()
    assert largest > 4 * embedding
    assert embedding <= seen.largest < largest / 4, seen.largest


@pytest.fixture
def checkpoint(tokens, tmp_path):
    model = built("mixtral")
    quantized(model, tokens, config())
    model.save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def damage(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_damaged_experts_are_refused(checkpoint):
    key = "block_sparse_moe.experts.packed_down_proj."
    key = next(name for name in load_file(checkpoint / "model.safetensors") if key in name).rpartition(".")[0]

    def set_scale(value):
        def change(tensors):
            tensors[f"{key}.scales"][1, 0, 0] = value

        return change

    changes = {
        "scales should be finite and positive": set_scale(float("nan")),
        "has no .*packed_down_proj.qweight": lambda tensors: tensors.pop(f"{key}.qweight"),
        "implies .* and F16": lambda tensors: tensors.update({f"{key}.scales": tensors[f"{key}.scales"].float()}),
        r"packed_down_proj.qweight has shape \[3": lambda tensors: tensors.update(
            {f"{key}.qweight": tensors[f"{key}.qweight"][:3].clone()}
        ),
    }
    whole = (checkpoint / "model.safetensors").read_bytes()
    for message, change in changes.items():
        damage(checkpoint, change)
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(checkpoint)
        (checkpoint / "model.safetensors").write_bytes(whole)
    # A config that leaves the experts out belongs to another checkpoint.
    settings = json.loads((checkpoint / "config.json").read_text())
    settings["quantization_config"]["modules_to_not_convert"] = ["experts"]
    (checkpoint / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"packed weights of .*experts.*not quanti"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_wrong_symmetric_zero_points_are_refused(tokens, tmp_path):
    model = built("mixtral")
    quantized(model, tokens, config(sym=True))
    model.model.layers[1].mlp.experts.packed_gate_up_proj.qzeros[2, 0, 0] ^= 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="symmetric zero points should all be 8"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_from_a_base_directory_through_both_front_ends(tokenizer, texts, tokens, tmp_path):
    built("qwen3_moe", vocab_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"dataset": texts, "bits": 4, "group_size": 32, "sym": False, "num_samples": 6, "model_seqlen": 32}
    on_load = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=TwoStageGPTQConfig(**options)
    )
    quantizer = TwoStageQuantizer.from_pretrained(tmp_path / "base")
    optimum = quantizer.quantize(tmp_path / "out", **options)
    assert len(quantizer.report.experts) == 2
    ids = tokens % 128
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(on_load, ids), logits(optimum, ids))
    assert torch.equal(logits(loaded, ids), logits(optimum, ids))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_block_by_block_from_files_that_hold_experts_one_by_one(name, tokenizer, texts, tmp_path):
    """gpt-oss holds them fused in its files too."""
    model = built(name, vocab_size=128)
    model.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"dataset": texts, "bits": 4, "group_size": 32, "sym": False, "num_samples": 6, "model_seqlen": 32}
    quantizer = TwoStageQuantizer.from_pretrained(tmp_path / "base")
    whole = quantizer.quantize(tmp_path / "whole", **options)
    quantizer.quantize(tmp_path / "blocks", **options, block_by_block=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "blocks")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def write_mxfp4(path):
    """A tiny gpt-oss with random experts in its format: two numbers of 4 bits a byte, a power of 2 for each 32.

    Returns:
        The experts' weights, `[experts, in, out]`, by their names.
    """
    built("gpt_oss", vocab_size=128).to(torch.bfloat16).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    dense = {}
    for name in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, in_features, out_features = tensors.pop(name).shape
        sizes = (experts, out_features, in_features // 32)
        blocks = torch.randint(0, 256, (*sizes, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, sizes, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = torch.stack([FP4[(blocks & 15).int()], FP4[(blocks >> 4).int()]], -1).flatten(-2)
        dense[name] = (values * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2).transpose(1, 2)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router"]}
    (path / "config.json").write_text(json.dumps(settings))
    return dense


def test_experts_that_come_in_mxfp4_are_dequantized_and_quantized(tokenizer, texts, tokens, tmp_path):
    dense = write_mxfp4(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"dataset": texts, "bits": 8, "group_size": 32, "sym": False, "num_samples": 6, "model_seqlen": 32}
    quantizer = TwoStageQuantizer.from_pretrained(tmp_path / "base")
    model = quantizer.quantize(tmp_path / "out", **options)
    for name, weights in dense.items():
        path, _, projection = name.rpartition(".")
        packed = packed_experts(model.get_submodule(path))[projection]
        for expert, weight in enumerate(weights):
            assert (packed.dequantize(expert).T - weight).norm() < 0.02 * weight.norm()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again.config.quantization_config) is TwoStageGPTQConfig
    assert torch.equal(logits(again, tokens % 128), logits(model, tokens % 128))
    with pytest.raises(ValueError, match=r"quantized already \(mxfp4\)"):
        quantizer.quantize(tmp_path / "other", **options, block_by_block=True)


def test_experts_whose_sizes_do_not_pack_are_refused_by_name():
    with pytest.raises(ValueError, match=r"experts: in_features=48 is not a multiple of group_size=32"):
        find_layers(built("qwen3_moe", moe_intermediate_size=48), config("qwen3_moe"))


def test_tokens_of_experts_and_a_sample(monkeypatch):
    inputs = ExpertInputs(3, torch.device("cpu"), "cpu", with_full=True)
    x = torch.arange(8.0).view(4, 2)
    index = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])
    gates = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    inputs.add(x, index, gates, x + 1)
    inputs.add(x + 100, index.flip(0), gates.flip(0), x + 101)
    own = x[[0, 1, 3]], x[[0, 2, 3]] + 100
    _, (expert, (found, full, weights)) = inputs.of_experts(range(1, 3))
    assert expert == 2 and torch.equal(found, torch.cat(own)) and torch.equal(full, found + 1)
    assert weights.tolist() == [4, 9, 49, 49, 9, 4]
    # More than may be held at once comes batch by batch.
    monkeypatch.setattr(expert_inputs_module, "GATHERED", 1)
    pieces = list(inputs.of_experts(range(1, 3)))
    assert [expert for expert, _ in pieces] == [1, 2, 1, 2]
    assert all(torch.equal(piece[0], part) for (_, piece), part in zip(pieces[1::2], own, strict=True))
    ((sample, _, weights),) = inputs.sample(3)
    assert torch.equal(sample, torch.cat([x[[0, 3]], x[[0, 3]] + 100])) and weights.tolist() == [5, 113, 113, 5]
    assert next(inputs.all_tokens())[2].tolist() == [5, 25, 61, 113]
    # An expert that computes nothing does not come; tokens that are not the same in both models have no deviation.
    inputs = ExpertInputs(3, torch.device("cpu"), "cpu", with_full=True)
    inputs.add(x, index.clamp(max=1), gates, x[:3])
    assert [(expert, part[1]) for expert, part in inputs.of_experts(range(3))] == [(0, None), (1, None)]


def test_a_packed_module_is_what_it_was_packed_from():
    model = built("gpt_oss")
    settings = config("gpt_oss")
    _, layers = find_layers(model, settings)
    experts = layers["model.layers.0.mlp.experts"]
    assert projections(experts) == ("gate_up_proj", "down_proj")
    assert not any(isinstance(layer, QuantizedLinear | QuantizedExperts) for layer in layers.values())
    use_packed_experts(model)  # nothing is packed
    assert model.config._experts_implementation != PACKED_EXPERTS
