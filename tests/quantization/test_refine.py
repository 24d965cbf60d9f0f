"""Block refinement and end-to-end tuning."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import tiny
import torch
from models import tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lkq_hf.quantization import QuantizedLinear, TwoStageGPTQConfig, block_gradients, gradient_steps
from lkq_hf.quantization.calibrate import find_layers
from lkq_hf.quantization.capture import capture_block_calls
from lkq_hf.quantization.config import REFINEMENTS
from lkq_hf.quantization.curvature import Curvature
from lkq_hf.quantization.fisher import error_factor, output_fisher
from lkq_hf.quantization.gradient_steps import held_out_windows, take_steps
from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.refine import BlockRefiner
from lkq_hf.quantization.refined_weight import RefinedWeight
from lkq_hf.quantization.refinement import BlockRefinement, EndToEnd, GradientSteps
from lkq_hf.quantization.walk import quantize_blocks
from lkq_hf.quantization.weight import QuantizedWeight


def random_tokens(windows, length=64, seed=0):
    # Token 0 is the padding, whose embedding is 0.
    return torch.randint(3, 160, (windows, length), generator=torch.Generator().manual_seed(seed))


def quantized(model, tokens, bits=2, sym=False, exclude=None, **settings):
    model = copy.deepcopy(model)
    config = TwoStageGPTQConfig(bits=bits, group_size=32, sym=sym, modules_to_not_convert=exclude)
    name, layers = find_layers(model, config)
    resume, device = settings.pop("resume_dir", None), settings.pop("device", "cpu")
    report = quantize_blocks(
        model,
        name,
        layers,
        tokens,
        replace(config.solver_settings(), **settings),
        batch_size=8,
        resume_dir=resume,
        device=device,
    )
    return model, report


def packed(model):
    return {
        name: module.quantized_weight()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def random_weight(sym):
    generator = torch.Generator().manual_seed(0)
    shape, groups = (6, 64), (6, 2)
    zeros = torch.full(groups, 4) if sym else torch.randint(0, 8, groups, generator=generator)
    scales = torch.rand(groups, generator=generator).add(0.5).half()
    integers = torch.randint(0, 8, shape, generator=generator)
    return QuantizedWeight(integers.int(), scales, zeros.int(), bits=3, group_size=32, sym=sym)


@pytest.mark.one_version
@pytest.mark.parametrize("sym", [False, True])
def test_gradients_are_those_of_rounding_taken_for_the_identity(sym):
    weight = random_weight(sym)
    offsets = torch.rand(6, 64, generator=torch.Generator().manual_seed(1)) - 0.5
    refined = RefinedWeight(weight, GradientSteps(zero_rate=0.3), offsets)
    probe = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    (refined(torch.float32) * probe).sum().backward()

    position, factor, zero = (
        p.detach().clone().requires_grad_() for p in (refined.position, refined.factor, refined.zero)
    )
    through = position + (position.round() - position).detach()
    level = through.view(6, 2, 32) - (zero + (zero.round() - zero).detach()).unsqueeze(-1)
    dense = (weight.scales.float() * factor.exp()).unsqueeze(-1) * level
    (dense.view(6, 64) * probe).sum().backward()
    assert torch.equal(refined(torch.float32), weight.dequantize())
    torch.testing.assert_close(refined.position.grad, position.grad)
    torch.testing.assert_close(refined.factor.grad, factor.grad)
    if sym:
        assert not refined.zero.requires_grad
    else:
        torch.testing.assert_close(refined.zero.grad, zero.grad)


def test_integers_that_stay_take_one_byte_once():
    weight = random_weight(sym=False)
    refined = RefinedWeight(weight, EndToEnd())
    result = refined.quantized()
    assert result.integers.dtype == torch.uint8 and torch.equal(result.integers.int(), weight.integers)
    assert result.integers.data_ptr() == refined.start.data_ptr()


def test_what_moves_stays_inside_the_grid_and_within_its_bound():
    weight = random_weight(sym=False)
    refined = RefinedWeight(weight, GradientSteps(zero_rate=0.3, offset_bound=1.0))
    with torch.no_grad():
        refined.position.add_(torch.randn(6, 64, generator=torch.Generator().manual_seed(3)) * 5)
        refined.zero.add_(100)
    refined.project()
    result = refined.quantized()
    assert result.integers.min() >= 0 and result.integers.max() <= 7
    assert (result.integers - weight.integers).abs().max() == 1
    assert (result.zeros == 7).all()


@pytest.mark.one_version
@pytest.mark.parametrize("sym", [False, True])
def test_refined_blocks_have_smaller_errors_on_held_out_windows(sym):
    model, tokens = tiny_model("llama", num_hidden_layers=2), random_tokens(256, length=32)
    plain, _ = quantized(model, tokens, bits=3, sym=sym, refinement=BlockRefinement(steps=0))
    settings = BlockRefinement(steps=40, offset_rate=0.1)
    refined, report = quantized(model, tokens, bits=3, sym=sym, refinement=settings)
    assert [block.name for block in report.blocks] == ["model.layers.0", "model.layers.1"]
    assert all(block.accepted for block in report.blocks)
    first = "model.layers.0."
    before, after = ({k: w for k, w in packed(m).items() if k.startswith(first)} for m in (plain, refined))
    assert any(not torch.equal(after[k].integers, before[k].integers) for k in before)
    for key, weight in after.items():
        assert (weight.integers - before[key].integers).abs().max() <= 1
        assert not sym or torch.equal(weight.zeros, before[key].zeros)


def test_a_few_windows_are_held_out():
    assert [int(held_out_windows(count).sum()) for count in (1, 2, 8, 17, 32, 128)] == [0, 1, 1, 2, 4, 4]
    assert held_out_windows(16).tolist() == [False] * 14 + [True] * 2


@pytest.mark.one_version
@pytest.mark.parametrize("windows", [16, 72])  # the last batch is held out in part, or as a whole
@pytest.mark.parametrize("settings", [{"refinement": BlockRefinement(steps=0)}, {"end_to_end": EndToEnd(steps=0)}])
def test_what_is_held_out_does_not_shape_the_solved_weights(windows, settings, monkeypatch):
    monkeypatch.setattr(gradient_steps, "HELD_OUT", 2 if windows == 16 else 8)
    model, tokens = tiny_model("llama", num_hidden_layers=2), random_tokens(windows, length=16)
    others = tokens.clone()
    others[held_out_windows(windows)] = random_tokens(windows, length=16, seed=1)[held_out_windows(windows)]
    one, other = (packed(quantized(model, each, bits=3, **settings)[0]) for each in (tokens, others))
    assert all(torch.equal(weight.integers, other[name].integers) for name, weight in one.items())
    one, other = (packed(quantized(model, each, bits=3)[0]) for each in (tokens, others))
    assert any(not torch.equal(weight.integers, other[name].integers) for name, weight in one.items())


@pytest.mark.one_version
def test_a_block_whose_error_rises_stays_as_it_was_solved():
    model, tokens = tiny_model("llama", num_hidden_layers=1), random_tokens(16)
    plain, _ = quantized(model, tokens, refinement=BlockRefinement(steps=0))
    kept, report = quantized(model, tokens, refinement=BlockRefinement(steps=2, scale_rate=50.0))
    assert [block.accepted for block in report.blocks] == [False]
    for name, weight in packed(plain).items():
        assert torch.equal(packed(kept)[name].scales, weight.scales)
        assert torch.equal(packed(kept)[name].integers, weight.integers)


@pytest.mark.one_version
def test_a_killed_refinement_resumes_to_the_same_result(tmp_path, monkeypatch):
    model, tokens = tiny_model("llama", num_hidden_layers=2), random_tokens(32)
    settings = {"refinement": BlockRefinement(steps=10), "end_to_end": EndToEnd(steps=4)}
    whole, _ = quantized(model, tokens, **settings)
    real = BlockRefiner.refine

    def killed(refiner, name, *args, **kwargs):
        if name.endswith(".1"):
            raise KeyboardInterrupt
        return real(refiner, name, *args, **kwargs)

    monkeypatch.setattr(BlockRefiner, "refine", killed)
    with pytest.raises(KeyboardInterrupt):
        quantized(model, tokens, resume_dir=tmp_path, **settings)
    monkeypatch.setattr(BlockRefiner, "refine", real)
    resumed, report = quantized(model, tokens, resume_dir=tmp_path, **settings)
    assert report.resumed_blocks == 1
    for name, weight in packed(whole).items():
        assert torch.equal(packed(resumed)[name].integers, weight.integers)
        assert torch.equal(packed(resumed)[name].scales, weight.scales)


@pytest.mark.one_version
def test_end_to_end_tuning_lowers_the_divergence_on_other_windows():
    model = tiny_model("llama", num_hidden_layers=2)
    tokens, others = random_tokens(128, length=32), random_tokens(64, length=32, seed=1)

    def divergence(other):
        with torch.no_grad():
            found, wanted = (m(others).logits.log_softmax(-1) for m in (other, model))
        return float(F.kl_div(found, wanted, log_target=True, reduction="sum") / others.numel())

    plain, _ = quantized(model, tokens, end_to_end=EndToEnd(steps=0))
    tuned, report = quantized(model, tokens, end_to_end=EndToEnd(steps=48, scale_rate=0.1))
    assert report.end_to_end.accepted and report.untuned is None
    assert divergence(tuned) < divergence(plain)
    for name, weight in packed(plain).items():
        assert torch.equal(packed(tuned)[name].integers, weight.integers)


def test_end_to_end_tuning_keeps_integers():
    with pytest.raises(ValueError, match="keeps the integers"):
        EndToEnd(offset_rate=0.1)


@pytest.mark.one_version
def test_a_model_without_room_to_be_tuned_stays_as_it_was(monkeypatch):
    from lkq_hf.quantization import end_to_end

    def run_out(*_):
        raise torch.OutOfMemoryError("of a test")

    model, tokens = tiny_model("llama", num_hidden_layers=2), random_tokens(16)
    plain, _ = quantized(model, tokens, end_to_end=EndToEnd(steps=0))
    monkeypatch.setattr(end_to_end, "take_steps", run_out)
    other, report = quantized(model, tokens, end_to_end=EndToEnd(steps=4))
    assert report.end_to_end is None and "does not fit on cpu" in report.untuned
    assert torch.equal(other(tokens).logits, plain(tokens).logits)


@pytest.mark.one_version
def test_a_curvature_is_that_of_the_loss():
    """Of a linear loss function of a linear layer it is exact for inputs and gradients that do not depend."""
    layer, generator = torch.nn.Linear(6, 4, bias=False), torch.Generator().manual_seed(0)
    inputs = torch.randn(50_000, 6, generator=generator) * torch.arange(1, 7)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    curvature = Curvature({"layer": layer, "unused": torch.nn.Linear(3, 2)}, torch.device("cpu"))
    with curvature.watching():
        # The Gauss-Newton matrix of sum((weights * output) ** 2) / 2 is the second moment of this one's gradient.
        signs = torch.randint(0, 2, (50_000, 4), generator=generator).mul(2).sub(1)
        (layer(inputs) * weights * signs).sum().backward()
    found = curvature.factors(1 / 50_000, Processes.current())
    expected = torch.autograd.functional.hessian(
        lambda w: ((inputs @ w.T * weights) ** 2).sum() / 100_000, layer.weight.detach()
    )
    diagonal = expected.view(24, 24).diagonal().view(4, 6)
    torch.testing.assert_close(torch.outer(*found["layer"]), diagonal, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.outer(*found["unused"]), torch.zeros(2, 3))


@pytest.fixture
def recordings(monkeypatch):
    """Steps are recorded as on a GPU: what a recording replays is run anew."""
    found = []

    def record(run, device):
        found.append(run)
        return run

    monkeypatch.setattr(block_gradients, "records", lambda _: True)
    monkeypatch.setattr(block_gradients, "record", record)
    return found


@pytest.mark.one_version
def test_recorded_steps_are_those_of_each_batch(recordings, monkeypatch):
    # The last batch is smaller, and runs by itself.
    model, tokens = tiny_model("llama", num_hidden_layers=2), random_tokens(36)
    settings = BlockRefinement(steps=16)
    recorded, report = quantized(model, tokens, bits=3, refinement=settings)
    assert len(recordings) == 2
    monkeypatch.setattr(block_gradients, "records", lambda _: False)
    expected, expected_report = quantized(model, tokens, bits=3, refinement=settings)
    assert report.blocks == expected_report.blocks
    for name, weight in packed(expected).items():
        assert torch.equal(packed(recorded)[name].integers, weight.integers)
        assert torch.equal(packed(recorded)[name].scales, weight.scales)


@pytest.mark.one_version
def test_steps_that_cannot_be_recorded_run_kernel_by_kernel(recordings, monkeypatch):
    def record(run, device):
        recordings.append(run)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(block_gradients, "record", record)
    model, tokens = tiny_model("llama", num_hidden_layers=1), random_tokens(32)
    _, report = quantized(model, tokens, bits=3, refinement=BlockRefinement(steps=8))
    assert len(recordings) == 1
    monkeypatch.setattr(block_gradients, "records", lambda _: False)
    _, expected = quantized(model, tokens, bits=3, refinement=BlockRefinement(steps=8))
    assert report.blocks == expected.blocks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_replays_the_steps_that_it_recorded(dtype, monkeypatch):
    model, tokens = tiny_model("llama", num_hidden_layers=2).to("cuda", dtype), random_tokens(128)
    recordings, real = [], block_gradients.record

    def record(run, device):
        recordings.append(real(run, device))
        return recordings[-1]

    monkeypatch.setattr(block_gradients, "record", record)
    settings = BlockRefinement(steps=40)
    _, recorded = quantized(model, tokens, bits=3, refinement=settings, device="cuda")
    assert len(recordings) == 2
    monkeypatch.setattr(block_gradients, "records", lambda _: False)
    _, expected = quantized(model, tokens, bits=3, refinement=settings, device="cuda")
    for found, other in zip(recorded.blocks, expected.blocks, strict=True):
        assert (found.before, found.after) == pytest.approx((other.before, other.after), rel=1e-2)
        assert found.after < found.before


@pytest.mark.one_version
@pytest.mark.parametrize("mixed", [False, True])
def test_tuning_end_to_end_in_bfloat16(mixed, monkeypatch):
    """A bfloat16 model, and a float32 model that is multiplied in bfloat16, its logits in TF32, as on a GPU."""
    from lkq_hf.quantization import end_to_end, gradient_steps

    model, tokens = tiny_model("llama", num_hidden_layers=2), random_tokens(128, length=32)
    before, logits_in = torch.get_float32_matmul_precision(), {}

    def recorded(name):
        function = getattr(end_to_end, name)

        def run(*args):
            logits_in.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return function(*args)

        monkeypatch.setattr(end_to_end, name, run)

    recorded("divergence")
    recorded("divergence_gradient")
    if mixed:
        for module in (end_to_end, gradient_steps):
            monkeypatch.setattr(module, "compute_dtype", lambda *_: torch.bfloat16)
    else:
        model = model.bfloat16()
    tuned, report = quantized(model, tokens, end_to_end=EndToEnd(steps=32, scale_rate=0.1))
    assert report.end_to_end.accepted
    assert tuned.dtype == model.dtype and tuned(tokens[:2]).logits.dtype == model.dtype
    # What decides whether the tuning is kept is measured in full precision.
    assert logits_in == {"divergence": {before}, "divergence_gradient": {"high" if mixed else before}}
    assert torch.get_float32_matmul_precision() == before


def test_the_gradient_of_the_divergence(monkeypatch):
    # Gemma 2 caps its logits; a piece is smaller than the others.
    from lkq_hf.quantization import head as heads
    from lkq_hf.quantization.end_to_end import divergence, divergence_gradient

    model = tiny_model("gemma2", num_hidden_layers=2, final_logit_softcapping=0.5)
    blocks = list(model.model.layers)
    hidden, calls = capture_block_calls(model, blocks, [random_tokens(2, length=8)])
    monkeypatch.setattr(heads, "LOGITS", 6 * model.config.vocab_size)
    head = heads.Head(model, blocks, calls)
    student, teacher = hidden[0].clone(), hidden[0] + torch.randn(2, 8, model.config.hidden_size)
    student.requires_grad_()
    predicted, wanted = (model.lm_head(model.model.norm(each)) / 0.5 for each in (student, teacher))
    predicted, wanted = ((each.tanh() * 0.5).log_softmax(-1) for each in (predicted, wanted))
    expected = F.kl_div(predicted, wanted, reduction="sum", log_target=True)
    assert divergence(head, student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(divergence_gradient(head, student, teacher), torch.autograd.grad(expected, student)[0])


def test_tuning_end_to_end_where_blocks_return_tuples():
    model = tiny.tiny_model("gpt_neo")
    _, report = quantized(model, random_tokens(32).clamp(max=127), bits=3, end_to_end=EndToEnd(steps=16))
    assert report.end_to_end.accepted


def test_linear_layers_beside_fused_experts_are_refined_and_the_experts_stay():
    model = tiny_model("mixtral", num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2)
    tokens = random_tokens(128)
    plain, _ = quantized(model, tokens, bits=3, refinement=BlockRefinement(steps=0))
    refined, report = quantized(model, tokens, bits=3, refinement=BlockRefinement(steps=40))
    assert [block.accepted for block in report.blocks] == [True] and not report.unrefined
    assert list(packed(plain)) == list(packed(refined))
    assert any(not torch.equal(w.integers, packed(refined)[name].integers) for name, w in packed(plain).items())
    experts = [
        {name: buffer for name, buffer in m.named_buffers() if ".experts." in name and "weight" in name}
        for m in (plain, refined)
    ]
    assert experts[0] and all(torch.equal(buffer, experts[1][name]) for name, buffer in experts[0].items())


def test_a_block_whose_other_results_are_used_stays_as_it_was_solved():
    # The next block takes this one's choice of keys.
    model, tokens = tiny.tiny_model("glm_moe_dsa", num_hidden_layers=2), random_tokens(16, length=32).clamp(max=127)
    exclude = ["indexer", "mlp.gate", "kv_a_proj_with_mqa"]
    plain, _ = quantized(model, tokens, exclude=exclude, refinement=BlockRefinement(steps=0))
    refined, report = quantized(model, tokens, exclude=exclude, refinement=BlockRefinement(steps=4))
    assert list(report.unrefined) == ["model.layers.0"] and "more from it" in report.unrefined["model.layers.0"]
    assert [block.name for block in report.blocks] == ["model.layers.1"]
    for name, weight in packed(plain).items():
        if name.startswith("model.layers.0."):
            assert torch.equal(packed(refined)[name].integers, weight.integers)
            assert torch.equal(packed(refined)[name].scales, weight.scales)
    plain, _ = quantized(model, tokens, exclude=exclude)
    untuned, report = quantized(model, tokens, exclude=exclude, end_to_end=EndToEnd(steps=1))
    assert report.end_to_end is None and "more than hidden states" in report.untuned
    assert torch.equal(untuned(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize(
    ("name", "exclude", "reason"),
    [
        ("prophetnet", [], "other hidden states"),
        ("gemma3n_text", ["altup", "laurel", "per_layer_input_gate", "per_layer_projection"], "other hidden states"),
        ("reformer", [], "no gradients"),
    ],
)
def test_a_model_that_gradients_do_not_pass_stays_as_it_was_solved(name, exclude, reason):
    model, tokens = tiny.tiny_model(name), random_tokens(8, length=16).clamp(max=127)
    steps = {"refinement": BlockRefinement(steps=2), "end_to_end": EndToEnd(steps=2)}
    _, report = quantized(model, tokens, exclude=exclude, **steps)
    assert not report.blocks and report.end_to_end is None
    assert reason in report.untuned and set(report.unrefined.values()) == {report.untuned}


def test_hidden_states_in_several_streams_are_refined():
    model, tokens = tiny.tiny_model("deepseek_v4"), random_tokens(32, length=16).clamp(max=127)
    steps = {"refinement": BlockRefinement(steps=8), "end_to_end": EndToEnd(steps=8)}
    _, report = quantized(model, tokens, exclude=["compressor", "kv_proj"], **steps)
    assert report.blocks and report.end_to_end.accepted


def test_refinement_leaves_no_gradients_behind():
    model, _ = quantized(
        tiny_model("llama", num_hidden_layers=1), random_tokens(8), refinement=BlockRefinement(steps=2)
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_steps_and_rates_fall_with_the_root_of_the_number_of_tokens():
    whole, less = BlockRefinement(zero_rate=0.2), BlockRefinement(zero_rate=0.2).with_tokens(32 * 512)
    assert less == replace(
        whole,
        steps=whole.steps // 4,
        offset_rate=whole.offset_rate / 4,
        scale_rate=whole.scale_rate / 4,
        zero_rate=0.05,
    )
    assert EndToEnd().with_tokens(32 * 512) == EndToEnd(steps=EndToEnd().steps // 4)
    assert whole.with_tokens(128 * 2048) == whole.with_tokens(512 * 2048) == whole
    settings = TwoStageGPTQConfig(preset="refined", num_samples=32, model_seqlen=512).solver_settings()
    assert settings.refinement == BlockRefinement().with_tokens(32 * 512)
    assert settings.end_to_end == EndToEnd().with_tokens(32 * 512)


def test_end_to_end_rates_of_scales_halve_with_each_bit_beyond_three():
    tuning, scales = EndToEnd(steps=10, scale_rate=0.08), torch.ones(2, 1)
    weights = [
        RefinedWeight(QuantizedWeight(torch.ones(2, 8), scales, torch.ones(2, 1), bits, 8, sym=False), tuning)
        for bits in (2, 3, 4, 8)
    ]
    # Of a gradient that stays, Adam makes ten steps that together go a tenth farther than the rate.
    take_steps(weights, tuning, [torch.tensor([False])], lambda batch: [-torch.ones(2, 1)] * 4, Processes.current())
    moved = [weight.factor[0, 0].item() for weight in weights]
    assert moved == pytest.approx([0.088, 0.088, 0.044, 0.00275], rel=1e-3)
    assert BlockRefinement().scale_rate_at(8) == BlockRefinement().scale_rate


@pytest.mark.one_version
def test_a_refined_checkpoint_resumes_saves_and_loads(tmp_path, tiny_llama, monkeypatch):
    from lkq_hf.quantization import refinement

    preset = {"refinement": BlockRefinement(steps=80), "end_to_end": EndToEnd(steps=8)}
    monkeypatch.setitem(REFINEMENTS, "refined", preset)
    monkeypatch.setattr(refinement, "TOKENS", 4 * 128 * 32)
    steps = {name: each.with_tokens(128 * 32) for name, each in preset.items()}
    assert (steps["refinement"].steps, steps["end_to_end"].steps) == (40, 4)
    tiny_llama.save_pretrained(tmp_path / "base")
    rows = [{"input_ids": window} for window in random_tokens(130, length=32).clamp(max=127)]
    options = {"bits": 3, "group_size": 32, "dataset": rows, "num_samples": 128, "model_seqlen": 32}

    def quantize(preset, resume_dir=None):
        config = TwoStageGPTQConfig(**options, preset=preset, resume_dir=resume_dir)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)

    real = BlockRefiner.refine

    def killed(refiner, name, *args, **kwargs):
        if name.endswith(".1"):
            raise KeyboardInterrupt
        return real(refiner, name, *args, **kwargs)

    monkeypatch.setattr(BlockRefiner, "refine", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize("refined", tmp_path / "blocks")
    monkeypatch.setattr(BlockRefiner, "refine", real)
    with pytest.raises(ValueError, match="refinement"):
        quantize("default", tmp_path / "blocks")
    resumed, whole = quantize("refined", tmp_path / "blocks"), quantize("refined")
    assert resumed.hf_quantizer.report.resumed_blocks == 1
    for name, weight in packed(whole).items():
        assert torch.equal(packed(resumed)[name].integers, weight.integers)
        assert torch.equal(packed(resumed)[name].scales, weight.scales)
    assert any(not torch.equal(w.integers, packed(whole)[n].integers) for n, w in packed(quantize("default")).items())

    resumed.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 27).view(1, -1)
    assert torch.equal(again(ids).logits, whole(ids).logits)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["preset"] == "refined"
    assert stored["meta"]["refinement"] == {**asdict(steps["refinement"]), "unrefined_blocks": {}}
    tuned = asdict(resumed.hf_quantizer.report.end_to_end)
    assert tuned["before"] > 0 and stored["meta"]["end_to_end"] == {**asdict(steps["end_to_end"]), "divergence": tuned}


@pytest.mark.one_version
def test_the_fisher_information_foretells_the_divergence_of_small_errors():
    model, tokens = tiny_model("llama", num_hidden_layers=2).double(), random_tokens(300, length=16)
    fisher = output_fisher(model, list(model.model.layers), tokens, Processes.current())[0]
    assert torch.isclose(fisher.diagonal().mean(), torch.tensor(1.0))
    with torch.no_grad():
        base = model(tokens).logits.log_softmax(-1)
    ratios = []
    for index in (0, 20, 40, 63):
        direction = torch.linalg.eigh(fisher)[1][:, index].double()
        size = 1e-2 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(index)).double()
        hook = model.model.layers[0].register_forward_hook(lambda _m, _a, o: o + size[..., None] * direction)  # noqa: B023
        with torch.no_grad():
            divergence = F.kl_div(model(tokens).logits.log_softmax(-1), base, log_target=True, reduction="sum")
        hook.remove()
        ratios.append(float(divergence) / float(direction @ fisher.double() @ direction))
    assert max(ratios) < 1.3 * min(ratios)
    mixed = error_factor(fisher, 0.5)
    torch.testing.assert_close(mixed @ mixed.T, 0.5 * torch.eye(64) + 0.5 * fisher, atol=1e-4, rtol=1e-4)
