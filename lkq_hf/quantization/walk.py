"""The calibration walk, block after block."""

import copy
import logging
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lkq_hf.quantization.activations import Activations
from lkq_hf.quantization.block_path import BlockPath
from lkq_hf.quantization.block_solver import BlockSolver, LayerReport
from lkq_hf.quantization.blocks import weights_of
from lkq_hf.quantization.capture import BlockCall, Extras, capture_block_calls
from lkq_hf.quantization.coverage import Coverage
from lkq_hf.quantization.dry_run import check_that_blocks_run_packed, first_of_each_kind, reason_against_gradients
from lkq_hf.quantization.end_to_end import EndToEndReport, tune_end_to_end
from lkq_hf.quantization.expert_solver import ExpertCounts
from lkq_hf.quantization.experts import is_experts, use_packed_experts
from lkq_hf.quantization.finished_blocks import FinishedBlocks, walk_arguments
from lkq_hf.quantization.fisher import error_factor, output_fisher
from lkq_hf.quantization.gradient_steps import held_out_windows
from lkq_hf.quantization.install import install_packed
from lkq_hf.quantization.on_device import on_device
from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.refine import BlockRefiner, BlockReport
from lkq_hf.quantization.solve import SolverSettings

logger = logging.getLogger(__name__)


@dataclass
class WalkReport:
    """What a walk did. `peak_memory` is in bytes: of the GPU if the walk ran on one, else of the process.

    `experts` says of every module of fused experts on how many tokens they were calibrated, also of resumed blocks.
    `blocks` are the refined blocks of this run; `unrefined` says of others, by name, why they are not refined, and
    `untuned` why the model is not tuned end to end.
    `coverage` is set by `calibrate`, which knows the whole model. It also counts what comes before the walk, such as
    writing text, in `seconds` and `peak_memory`.
    """

    layers: list[LayerReport] = field(default_factory=list)
    experts: dict[str, ExpertCounts] = field(default_factory=dict)
    blocks: list[BlockReport] = field(default_factory=list)
    unrefined: dict[str, str] = field(default_factory=dict)
    end_to_end: EndToEndReport | None = None
    untuned: str | None = None
    coverage: Coverage = field(default_factory=lambda: Coverage(0, {}))
    device: str = "cpu"
    resumed_blocks: int = 0
    seconds: float = 0.0
    peak_memory: int = 0


@torch.no_grad()
def quantize_blocks(
    model: PreTrainedModel,
    list_name: str,
    layers: dict[str, nn.Module],
    tokens: Tensor,
    settings: SolverSettings,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    true_sequential: bool = True,
    offload: str = "auto",
    resume_dir: str | Path | None = None,
    load_block: Callable[[str, nn.Module], None] | None = None,
) -> WalkReport:
    """Replaces `layers` of `model` by `QuantizedLinear` modules, calibrated on `tokens`.

    Two sets of hidden states travel through the blocks: `X`, of the full-precision model, and `X~`, of the model
    quantized so far (`X` only where the settings use it). In every block, layers that share their input are solved
    together from the moments of that input, written back, and only then the next layers' inputs are taken. On the
    compute device are one block, its full-precision twin, and one group's moments.

    In a group of processes all must make the same call; they share the work (see `Processes`), and the first one keeps
    finished blocks, in a directory that all of them see. With `load_block`, only the first one has the blocks at the
    end: in the others they are on the meta device.

    Args:
        model: on one device, usually the CPU; blocks may be on the meta device if `load_block` fills them.
        list_name: name of the block list (`blocks.find_blocks`).
        layers: the layers to replace, by full name (`blocks.layers_to_quantize`).
        tokens: int64 `[samples, length]`.
        device: where the arithmetic runs, one block at a time.
        batch_size: samples that run through a block at once.
        true_sequential: `False` takes all inputs of a block before its first layer is quantized.
        offload: where hidden states are kept, see `Activations`.
        resume_dir: finished blocks are written here, and found again when the same walk starts anew; quantized
            weights only, since the hidden states follow from them.
        load_block: called with a block and its name before its weights are needed.

    Raises:
        ValueError: a layer that cannot be quantized, by name, a `resume_dir` of another walk, or a refinement that
            needs the whole model together with `load_block`.
    """
    start = time.perf_counter()
    processes = Processes.current()
    device = torch.device(device)
    _refuse_what_needs_the_model(settings, load_block is not None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    blocks = list(model.get_submodule(list_name).children())
    arguments = walk_arguments(model, layers, tokens, settings, true_sequential, batch_size)
    finished_blocks = FinishedBlocks(resume_dir, arguments, settings, writes=processes.is_main)
    loaded: set[int] = set()

    def ensure_loaded(index: int) -> None:
        if load_block is not None and index not in loaded:
            load_block(f"{list_name}.{index}", blocks[index])
            loaded.add(index)

    # The checks and the capture make real calls of one block of each kind, which need its weights.
    for first in first_of_each_kind(list_name, blocks, layers):
        ensure_loaded(first)
    home = model.get_input_embeddings().get_parameter("weight").device
    check_that_blocks_run_packed(model, list_name, blocks, layers, tokens.to(home), settings, device)
    batches = [batch.to(home) for batch in processes.part(tokens).split(batch_size)]
    hidden, calls = capture_block_calls(model, blocks, batches)
    size = sum(state.numel() * state.element_size() for state in hidden)
    states = Activations(device, offload, size)
    full_states = Activations(device, offload, size) if settings.needs_full_path else None
    for state in hidden:
        states.append(state)
        if full_states is not None:
            full_states.append(state)
    del hidden

    # What each path's last block returned besides its hidden states, where the next one takes it.
    extras: list[Extras] = []
    full_extras: list[Extras] = []
    fisher = _fisher(model, blocks, batches, settings, device, processes)
    report = WalkReport(device=str(device))
    without_gradients = None
    if settings.refinement is not None or settings.end_to_end is not None:
        without_gradients = reason_against_gradients(model, blocks, batches[0])
    if settings.end_to_end is not None:
        report.untuned = without_gradients or _reason_against_tuning(calls, load_block is not None, processes)
    tuning = settings.end_to_end if report.untuned is None else None
    held_out = processes.part(held_out_windows(len(tokens))).split(batch_size)
    # Windows that the weights are solved from would favor these over what is made of them.
    judged = tuning is not None or (settings.refinement is not None and without_gradients is None)
    solved_from = [~chosen for chosen in held_out] if judged else None
    solver = BlockSolver(list_name, settings, true_sequential, offload, solved_from, processes)
    refiner = None if settings.refinement is None else BlockRefiner(settings.refinement, held_out, processes)
    progress = tqdm(range(len(blocks)), desc="quantizing", unit="block", disable=not processes.is_main)
    for index in progress:
        ensure_loaded(index)
        block = blocks[index]
        prefix = f"{list_name}.{index}."
        names = [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]
        block.to(device)
        path, full = BlockPath(block, calls[index].with_extras(extras), states), None
        if full_states is not None:
            full = BlockPath(copy.deepcopy(block), calls[index].with_extras(full_extras), full_states)
        dense = {key: weight for name in names for key, weight in weights_of(name, block.get_submodule(name)).items()}
        bits = {
            key: settings.bits_of(f"{index}.{name}")
            for name in names
            for key in weights_of(name, block.get_submodule(name))
        }
        checksums = finished_blocks.checksums(dense)
        keep_extras = index < len(blocks) - 1 and calls[index + 1].takes_extras
        reason = without_gradients or _reason_against_refining(block, names, keep_extras)
        if refiner is not None and reason is not None:
            report.unrefined[prefix.rstrip(".")] = reason
        finished = finished_blocks.read(index, checksums, bits)
        if finished is None:
            solved, block_report = solver.solve(index, names, path, full), None
            weights, experts = solved.weights, solved.experts
            if refiner is not None and reason is None and full is not None:
                factor = None if fisher is None else error_factor(fisher[index], refiner.settings.fisher_share)
                linear = {name: weights[name] for name in names if name in weights}
                targets = Activations(device, offload, size)
                refined, block_report = refiner.refine(
                    prefix.rstrip("."), path, full, linear, solved.offsets, targets, factor
                )
                for name, weight in refined.items():
                    dense[name].copy_(weight.dequantize())
                weights.update(refined)
                report.blocks.append(block_report)
                del targets
            finished_blocks.write(index, checksums, weights, experts)
            report.layers.extend(solved.reports)
            progress.set_postfix_str(_summary(solved.reports, block_report))
            del solved
        else:
            weights, experts = finished
            report.resumed_blocks += 1
            for name, weight in weights.items():
                dense[name].copy_(weight.dequantize())
        report.experts.update({prefix + name: counts for name, counts in experts.items()})
        if index < len(blocks) - 1 or tuning is not None:
            extras = _pass(path, keep_extras)
            if full is not None:
                full_extras = _pass(full, keep_extras)
        del path, full, dense
        for name in names:
            install_packed(block, name, weights)
        block.to(home)
        if load_block is not None and not processes.is_main:
            block.to("meta")
        calls[index].arguments.clear()
    use_packed_experts(model)
    if tuning is not None and full_states is not None:
        try:
            with on_device(model, device):
                moved = [batch.to(device) for batch in batches]
                report.end_to_end = tune_end_to_end(
                    model, blocks, moved, states, full_states, held_out, tuning, processes
                )
        except torch.OutOfMemoryError:
            if processes.size > 1:  # the others wait for this one
                raise
            report.untuned = f"the quantized model does not fit on {device}"
    if report.untuned is not None:
        logger.warning("the scales of the whole model are not tuned end to end: %s", report.untuned)
    report.seconds = time.perf_counter() - start
    report.peak_memory = peak_memory(device)
    logger.info(
        "quantized %d layers in %.0f s on %s, peak memory %.2f GiB",
        len(layers),
        report.seconds,
        device,
        report.peak_memory / 2**30,
    )
    return report


def _pass(path: BlockPath, keep_extras: bool) -> list[Extras]:
    """Replaces hidden states by what a block makes of them; what else it returns, batch by batch, if that is kept."""
    kept = []
    for batch in path.batches:
        hidden, extras = path.call.results(path.block, path.states.get(batch), batch)
        path.states.replace(batch, hidden)
        kept.append(extras if keep_extras else ())
    return kept


def _reason_against_refining(block: nn.Module, names: Sequence[str], keep_extras: bool) -> str | None:
    """Why a block is left as it was solved, if it is. Of a block with fused experts the other layers are refined."""
    if all(is_experts(block.get_submodule(name)) for name in names):
        return "it has no linear layers to quantize besides fused experts" if names else "it has no layers to quantize"
    if keep_extras:
        return "the next block takes more from it than hidden states, and the error of that is not seen"
    return None


def _reason_against_tuning(calls: Sequence[BlockCall], by_block: bool, processes: Processes) -> str | None:
    """Why the model's scales are not tuned end to end, if they are not."""
    if any(call.takes_extras for call in calls):
        return "its blocks take more than hidden states from the one before"
    if by_block and processes.size > 1:
        return f"blocks are read one at a time, so that only the first of {processes.size} processes has them all"
    return None


def _refuse_what_needs_the_model(settings: SolverSettings, by_block: bool) -> None:
    if by_block and settings.refinement is not None and settings.refinement.fisher_share:
        raise ValueError(
            "refinement weighted by the Fisher information (fisher_share) runs the whole model backwards, and blocks "
            "are read one at a time here: set fisher_share=0, or load the whole model"
        )


def _fisher(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batches: Sequence[Tensor],
    settings: SolverSettings,
    device: torch.device,
    processes: Processes,
) -> list[Tensor] | None:
    refinement = settings.refinement
    if refinement is None or not refinement.fisher_share:
        return None
    tokens = torch.cat(list(batches))[: -(-refinement.fisher_windows // processes.size)].to(device)
    with on_device(model, device):
        return output_fisher(model, blocks, tokens, processes)


def _summary(reports: Sequence[LayerReport], block: BlockReport | None) -> str:
    if not reports:
        return ""
    if block is not None:
        return f"block error: {block.before:.3g}, refined {block.after:.3g}{'' if block.accepted else ' (not kept)'}"
    steps = reports[0].losses
    means = (f"{step} {sum(report.losses[step] for report in reports) / len(reports):.3g}" for step in steps)
    return "relative error: " + ", ".join(means)


def peak_memory(device: torch.device) -> int:
    """Bytes of the GPU since its statistics were reset, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
