"""Quantizing in several processes: the solver's inputs, its result, resuming, and blocks read from disk."""

import copy
import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from models import prompt_ids, tiny_model
from transformers import AutoModelForCausalLM
from workers import _kill_at, command_line, launch

from lkq_hf.quantization import QuantizedLinear, TwoStageGPTQConfig
from lkq_hf.quantization.base_weights import open_base
from lkq_hf.quantization.calibrate import calibrate, find_layers
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.own_text import write_windows
from lkq_hf.quantization.packed_module import PackedModule
from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.quantizer import restore_linear
from lkq_hf.quantization.solve import quantize_weight
from lkq_hf.quantization.walk import quantize_blocks

TOKENS = prompt_ids(14, 24)


def join(device="cpu"):
    """Makes this process one of its group, if it has one."""
    PartialState(cpu=device == "cpu")


class Routed(torch.nn.Module):
    """Two experts, which see different tokens, and run in an order that depends on what the batch begins with."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = torch.nn.ModuleList([mlp, copy.deepcopy(mlp)])

    def forward(self, x):
        flat = x.flatten(0, -2)
        result = torch.zeros_like(flat)
        chosen = flat[:, 0] > 0
        for index in (0, 1) if chosen[0] else (1, 0):
            mine = chosen == bool(index)
            if mine.any():
                result[mine] = self.experts[index](flat[mine])
        return result.view_as(x)


def build(architecture):
    if architecture == "mixtral":
        return tiny_model("mixtral", num_local_experts=4, num_hidden_layers=2)
    if architecture != "routed":
        return tiny_model(architecture)
    model = tiny_model()
    model.model.layers[1].mlp = Routed(model.model.layers[1].mlp)
    return model


def walk(architecture="llama", resume_dir=None, kill=None, device="cpu", **changes):
    """The packed state of a walk over a tiny model, the reported errors, and the blocks that were found finished."""
    join(device)
    torch.set_num_threads(1)
    if kill is not None and torch.distributed.get_rank() == kill:
        _kill_at("lkq_hf.quantization.block_solver:BlockSolver", "solve", 2, resume_dir / "block-00001.safetensors")
    config = TwoStageGPTQConfig(**{"bits": 4, "group_size": 32, "sym": False, **changes})
    model = build(architecture)
    name, layers = find_layers(model, config)
    report = quantize_blocks(
        model, name, layers, TOKENS, config.solver_settings(), batch_size=3,
        true_sequential=config.true_sequential,
        resume_dir=resume_dir, device=device,
    )  # fmt: skip
    state = {
        f"{name}.{kind}": getattr(module, kind).numpy()
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
        for kind in ("qweight", "scales", "qzeros")
    }
    dense = {
        name: parameter.detach().numpy()
        for name, parameter in restore_linear(model, torch.float32).named_parameters()
        if parameter.dim() > 1 and name.startswith("model.layers.")
    }
    return state, dense, report.layers, report.resumed_blocks


def assert_nearly_equal_walks(found, expected):
    """Moments are summed in another order: a weight half-way between two integers may go the other way, and what
    comes after it is rounded accordingly."""
    _, dense, layers, _ = found
    assert [(layer.name, layer.tokens) for layer in layers] == [(layer.name, layer.tokens) for layer in expected[2]]
    for layer, other in zip(layers, expected[2], strict=True):
        assert layer.losses == pytest.approx(other.losses, rel=0.02)
    same = np.mean([np.mean(np.abs(value - expected[1][name]) < 1e-3) for name, value in dense.items()])
    assert same > 0.99, same


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    assert all(np.array_equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        pytest.param("llama", {"preset": "paper"}, marks=pytest.mark.slow),
        pytest.param(
            "llama", {"bits": 3, "advanced": {"true_sequential": False, "alpha": 0.0}}, marks=pytest.mark.slow
        ),
        ("gemma3", {"sym": True}),
        ("routed", {}),
        ("mixtral", {}),
    ],
)
def test_processes_make_the_checkpoint_of_one(architecture, changes):
    (alone,) = launch(_walk, architecture, changes, processes=1)
    runs = launch(_walk, architecture, changes, processes=3)
    for run in runs:
        assert_equal_states(run[0], runs[0][0])
        assert_nearly_equal_walks(run, alone)
    again = launch(_walk, architecture, changes, processes=3)
    assert_equal_states(again[0][0], runs[0][0])


def _walk(architecture, changes, resume_dir=None, kill=None):
    return walk(architecture, resume_dir, kill, **changes)


def reduced_moments(device="cpu"):
    join(device)
    processes = Processes.current()
    moments = moments_of(processes.part(_inputs()), device)
    processes.reduce(moments)
    return moments.tokens, moments.hessian.cpu().numpy(), moments.deviation.cpu().numpy()


def moments_of(part, device="cpu"):
    moments = InputMoments(16, device)
    for batch in part.to(device).split(2):
        moments.add(batch, batch + 0.1 * batch.roll(1, -1))
    return moments


def _inputs():
    return torch.randn(7, 5, 16, generator=torch.Generator().manual_seed(0))


def assert_moments_of_all_tokens(found, device="cpu"):
    """To the last bit the sum, in order of rank, of each process's mean times its share of the tokens."""
    parts = [moments_of(part, device) for part in _inputs().tensor_split(2)]
    hessian = sum(moments.hessian * (moments.tokens / 35) for moments in parts).cpu()
    deviation = sum(moments.deviation * (moments.tokens / 35) for moments in parts).cpu()
    x = _inputs().flatten(0, 1)
    torch.testing.assert_close(hessian, x.T @ x / 35)
    for tokens, found_hessian, found_deviation in found:
        assert tokens == 35
        assert np.array_equal(found_hessian, hessian.numpy()) and np.array_equal(found_deviation, deviation.numpy())


def test_moments_are_those_of_all_tokens():
    assert_moments_of_all_tokens(launch(reduced_moments))


def _divided_solution(rows):
    join()
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(rows, 64, generator=generator), torch.randn(200, 64, generator=generator)
    moments = InputMoments(64)
    moments.add(x, x + 0.1)
    settings = TwoStageGPTQConfig(bits=3, group_size=32, sym=False).solver_settings()
    solution = Processes.current().solve(len(weight), lambda rows: quantize_weight(weight[rows], moments, settings))
    quantized = solution.weight
    tensors = [quantized.integers, quantized.scales, quantized.zeros, *solution.losses.values(), solution.energy]
    return list(solution.losses), [tensor.numpy() for tensor in tensors]


@pytest.mark.parametrize("rows", [2, 32, 37])
def test_rows_may_be_solved_anywhere(rows):
    """Also where there are fewer rows than processes."""
    ((steps, expected),) = launch(_divided_solution, rows, processes=1)
    for found_steps, found in launch(_divided_solution, rows, processes=3):
        assert found_steps == steps == ["nearest", "gptq", "descent"]
        for value, other in zip(found, expected, strict=True):
            assert value.dtype == other.dtype
            np.testing.assert_allclose(value, other, rtol=1e-4)


def test_a_killed_walk_goes_on_in_any_number_of_processes(tmp_path):
    expected = launch(_walk, "gemma3", {})[0][0]
    for directory, processes in (("same", 2), ("more", 3), ("one", 1)):
        with pytest.raises(RuntimeError, match="process 1 was killed"):
            launch(_walk, "gemma3", {}, tmp_path / directory, 1)
        runs = launch(_walk, "gemma3", {}, tmp_path / directory, processes=processes)
        assert {run[3] for run in runs} == {2}
        assert_equal_states(runs[-1][0], runs[0][0])
        if processes == 2:
            assert_equal_states(runs[0][0], expected)


def _written(resume_dir=None):
    join()
    return write_windows(tiny_model(), None, 100, 12, resume_dir=resume_dir).numpy()


def test_processes_write_the_windows_of_one(tmp_path):
    (alone,) = launch(_written, processes=1)
    for found in [*launch(_written, tmp_path, processes=3), *launch(_written, tmp_path)]:
        assert np.array_equal(found, alone)


def test_more_processes_than_samples_are_refused():
    with pytest.raises(ValueError, match="2 calibration samples cannot be divided among 3 processes"):
        Processes(1, 3).part(TOKENS[:2])


def quantize(files, out, *options):
    return [
        "quantize", files / "base", "--dataset", files / "texts.jsonl", "--out", out, "--bits", "4", "--group-size",
        "32", "--no-sym", "--num-samples", "6", "--model-seqlen", "32", "--batch-size", "2", "--device", "cpu",
        *options,
    ]  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--block-by-block"], ["--bits", "3.3"]])
def test_the_command_writes_one_checkpoint(files, tmp_path, options):
    (one,) = launch(command_line, *quantize(files, tmp_path / "one", *options), processes=1)
    two = launch(command_line, *quantize(files, tmp_path / "two", *options))
    assert [code for code, _ in (one, *two)] == [0, 0, 0], two
    assert ["peak memory" in printed for _, printed in two] == [True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]  # and nothing of an unfinished run
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two")]
    ids = prompt_ids(2, 20, vocabulary=150)
    with torch.no_grad():
        one, two = (model(ids).logits for model in models)
        base = AutoModelForCausalLM.from_pretrained(files / "base")(ids).logits
    assert (two - one).norm() < 0.3 * (base - one).norm()


def _load_cut(directory):
    AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto")


def test_packed_layers_are_not_cut_for_tensor_parallelism(files, tmp_path):
    """transformers would load them without a word, and answer nonsense."""
    assert launch(command_line, *quantize(files, tmp_path / "out"), processes=1)[0][0] == 0
    with pytest.raises(RuntimeError, match="cannot be cut for tensor parallelism"):
        launch(_load_cut, tmp_path / "out")


def test_block_by_block_holds_one_block_in_full_precision(files):
    """Of a model on disk: later blocks are not there yet, earlier ones are packed."""
    model, weights = open_base(files / "base")
    config = TwoStageGPTQConfig(bits=4, group_size=32, sym=False)
    name, layers = find_layers(model, config)
    held = []

    def load(block_name, block):
        weights.load(block_name, block)
        held.append([
            "full" if any(type(m) is torch.nn.Linear and not m.weight.is_meta for m in other.modules())
            else "packed" if any(isinstance(m, QuantizedLinear) for m in other.modules()) else "on disk"
            for other in model.model.layers
        ])  # fmt: skip

    quantize_blocks(model, name, layers, TOKENS[:, :20].remainder(150), config.solver_settings(), load_block=load)
    assert held == [["full", "on disk"], ["packed", "full"]]


def test_a_model_spread_over_devices_is_refused(files, tmp_path):
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    device_map = {f"model.{part}": "disk" if part == "layers.1" else "cpu" for part in parts} | {"lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(files / "base", device_map=device_map, offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"spread over .*without device_map, or with block_by_block"):
        calibrate(model, TwoStageGPTQConfig(dataset=["w1 w2"], tokenizer=str(files / "base"), device="cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_holds_one_block_and_not_the_model():
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "head_dim": 64}
    peaks = {}
    for blocks in (2, 12):
        model = tiny_model(**sizes, num_hidden_layers=blocks)
        config = TwoStageGPTQConfig(bits=4, group_size=128)
        name, layers = find_layers(model, config)
        report = quantize_blocks(model, name, layers, TOKENS, config.solver_settings(), device="cuda", offload="cpu")
        peaks[blocks] = report.peak_memory
    block = sum(
        p.numel() * p.element_size() for p in tiny_model(**sizes, num_hidden_layers=1).model.layers.parameters()
    )
    assert peaks[12] < peaks[2] + block / 2
