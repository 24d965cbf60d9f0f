"""Refinement and end-to-end tuning in several processes, and of models whose blocks are read one at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from models import tiny_model
from safetensors.torch import load_file
from workers import Group, _kill_at, launch

from lkq_hf.quantization import QuantizedLinear, TwoStageGPTQConfig, TwoStageQuantizer
from lkq_hf.quantization.base_weights import open_base
from lkq_hf.quantization.calibrate import find_layers
from lkq_hf.quantization.config import REFINEMENTS
from lkq_hf.quantization.refinement import BlockRefinement, EndToEnd
from lkq_hf.quantization.walk import quantize_blocks

# The windows and the batches of processes differ in number.
TOKENS = torch.randint(3, 160, (82, 32), generator=torch.Generator().manual_seed(0))


def _refined(resume_dir=None, tokens=TOKENS, batch_size=8, device="cpu", **settings):
    """The packed tensors, the errors of blocks before and after, and those of the tuning."""
    PartialState(cpu=device == "cpu")
    torch.set_num_threads(1)
    config = TwoStageGPTQConfig(bits=2, group_size=32, sym=False)
    model = tiny_model("llama", num_hidden_layers=2)
    name, layers = find_layers(model, config)
    chosen = replace(config.solver_settings(), **settings)
    report = quantize_blocks(
        model, name, layers, tokens, chosen, batch_size=batch_size, resume_dir=resume_dir, device=device
    )
    state = {
        f"{name}.{kind}": getattr(module, kind).cpu().numpy()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
        for kind in ("qweight", "scales", "qzeros")
    }
    errors = [error for block in report.blocks for error in (block.before, block.after)]
    tuned = report.end_to_end
    return state, errors, None if tuned is None else (tuned.before, tuned.after)


def run(settings, resume_dir=None, kill=None, **options):
    if kill is not None and PartialState(cpu=True).process_index == kill:
        _kill_at("lkq_hf.quantization.block_solver:BlockSolver", "solve", 1, resume_dir / "block-00000.safetensors")
    return _refined(resume_dir, **settings, **options)


def run_in_parts(settings, device, batch_size, interleaved):
    """Of windows such that two processes with batches of 8, or one with batches of 16, step through the same ones."""
    tokens = TOKENS[:80]
    if interleaved:
        tokens = tokens.view(2, 5, 8, -1).transpose(0, 1).flatten(0, 2)
    return _refined(tokens=tokens, batch_size=batch_size, device=device, **settings)


def assert_gradients_are_those_of_all(groups, device="cpu"):
    """The same steps, to rounding, as one process takes over the batches of both."""
    settings = {"refinement": BlockRefinement(steps=12, offset_rate=0.0)}
    ((_, alone, _),) = groups["one"](run_in_parts, settings, device, 16, True)
    runs = groups["two"](run_in_parts, settings, device, 8, False)
    # A GPU's sums of other batches differ in their last bits, and after the first block in what is rounded.
    assert runs[0][1] == runs[1][1] == pytest.approx(alone, rel=1e-4 if device == "cpu" else 2e-3)
    assert all(after < 0.98 * before for before, after in zip(alone[::2], alone[1::2], strict=True))


def test_gradients_are_those_of_all_processes():
    with Group(1) as one, Group(2) as two:
        assert_gradients_are_those_of_all({"one": one, "two": two})


@pytest.mark.parametrize("processes", [1, 3])
def test_a_killed_refinement_goes_on_in_another_number_of_processes(tmp_path, processes):
    settings = {"refinement": BlockRefinement(steps=6)}
    whole = launch(run, settings)[0]
    with pytest.raises(RuntimeError, match="process 1 was killed"):
        launch(run, settings, tmp_path, 1)
    for state, errors, _ in launch(run, settings, tmp_path, processes=processes):
        first = [name for name in state if name.startswith("model.layers.0.")]
        assert first and all(np.array_equal(state[name], whole[0][name]) for name in first)
        # Other windows are held out of the second block.
        assert errors == pytest.approx(whole[1][2:], rel=0.2)


@pytest.mark.parametrize(
    "settings",
    [
        {"refinement": BlockRefinement(steps=12)},
        {"refinement": BlockRefinement(steps=6, fisher_share=0.3), "end_to_end": EndToEnd(steps=6)},
    ],
)
def test_processes_refine_as_one_does(settings):
    ((_, alone, tuned_alone),) = launch(run, settings, processes=1)
    runs = launch(run, settings, processes=3)
    for state, errors, tuned in runs:
        assert errors == runs[0][1] and tuned == runs[0][2]
        assert state.keys() == runs[0][0].keys()
        assert all(np.array_equal(value, runs[0][0][name]) for name, value in state.items())
    # Other windows are held out, in other batches.
    assert runs[0][1] == pytest.approx(alone, rel=0.2)
    if tuned_alone is not None:
        assert runs[0][2] == pytest.approx(tuned_alone, rel=0.2)


@pytest.fixture
def files(tmp_path):
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "base")
    return tmp_path


def _block_by_block(files, out, by_block):
    PartialState(cpu=True)
    torch.set_num_threads(1)
    REFINEMENTS["refined"] = {"refinement": BlockRefinement(steps=8)}  # in this process, which is not used again
    rows = [{"input_ids": window} for window in TOKENS.tolist()]
    quantizer = TwoStageQuantizer(str(files / "base"))
    quantizer.quantize(
        files / out, bits=3, group_size=32, dataset=rows, num_samples=80, model_seqlen=32, preset="refined",
        block_by_block=by_block, advanced={"own_text": 0}, device="cpu",
    )  # fmt: skip
    return [block.accepted for block in quantizer.report.blocks]


@pytest.mark.parametrize("processes", [1, 2])
def test_blocks_read_one_at_a_time_are_refined_alike(files, processes):
    whole = launch(_block_by_block, files, "whole", False, processes=processes)
    read = launch(_block_by_block, files, "read", True, processes=processes)
    assert whole == read and len(read[0]) == 2
    one, two = (load_file(files / name / "model.safetensors") for name in ("whole", "read"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def read_one_at_a_time(files, **settings):
    config = TwoStageGPTQConfig(bits=2, group_size=32, sym=False)
    model, weights = open_base(files / "base")
    name, layers = find_layers(model, config)
    chosen = replace(config.solver_settings(), **settings)
    report = quantize_blocks(model, name, layers, TOKENS, chosen, batch_size=8, load_block=weights.load)
    return model, report


def test_what_needs_the_whole_model_is_refused_where_blocks_are_read_one_at_a_time(files):
    with pytest.raises(ValueError, match="set fisher_share=0, or load the whole model"):
        read_one_at_a_time(files, refinement=BlockRefinement(steps=2, fisher_share=0.1))


def _untuned(files):
    PartialState(cpu=True)
    return read_one_at_a_time(files, end_to_end=EndToEnd(steps=2))[1].untuned


def test_processes_do_not_tune_what_only_the_first_of_them_has(files):
    assert all("only the first of 2 processes" in reason for reason in launch(_untuned, files))


def test_one_process_tunes_end_to_end_what_it_read_block_by_block(files):
    settings = {"end_to_end": EndToEnd(steps=4)}
    model, report = read_one_at_a_time(files, **settings)
    state, _, tuned = _refined(**settings)
    # Where a weight lies in memory decides how products are summed, in the last bit.
    assert (report.end_to_end.before, report.end_to_end.after) == pytest.approx(tuned, rel=1e-3)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert np.mean(module.qweight.numpy() == state[f"{name}.qweight"]) > 0.98
            np.testing.assert_allclose(module.scales.numpy(), state[f"{name}.scales"], rtol=0.02)
