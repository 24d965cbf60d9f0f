"""The calibration walk: block after block, and inside a block in the order in which its layers run."""

import copy
import logging
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lkq_hf.quantization.activations import Activations
from lkq_hf.quantization.blocks import linear_weight, weights_of
from lkq_hf.quantization.capture import (
    BlockCall,
    Extras,
    InputGroup,
    capture_block_calls,
    find_sum,
    layer_inputs,
    observe_order,
)
from lkq_hf.quantization.coverage import Coverage
from lkq_hf.quantization.dry_run import check_that_blocks_run_packed, first_of_each_kind, reason_against_gradients
from lkq_hf.quantization.end_to_end import EndToEndReport, tune_end_to_end
from lkq_hf.quantization.expert_inputs import ExpertInputs, calls_of_experts
from lkq_hf.quantization.expert_solver import ExpertCounts, quantize_experts
from lkq_hf.quantization.experts import is_experts, projections, use_packed_experts
from lkq_hf.quantization.finished_blocks import FinishedBlocks, walk_arguments
from lkq_hf.quantization.fisher import error_factor, output_fisher
from lkq_hf.quantization.gradient_steps import held_out_windows
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.install import install_packed
from lkq_hf.quantization.on_device import on_device
from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.refine import BlockPaths, BlockReport, refine_block
from lkq_hf.quantization.solve import Solution, SolverSettings, quantize_weight
from lkq_hf.quantization.weight import QuantizedWeight

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """One layer's error after each step, relative to the energy of its output: `(t - w^) H (t - w^)^T / w H w^T`."""

    name: str
    losses: dict[str, float]
    tokens: int


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
    quantized = Activations(device, offload, size)
    full = Activations(device, offload, size) if settings.needs_full_path else None
    for state in hidden:
        quantized.append(state)
        if full is not None:
            full.append(state)
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
    progress = tqdm(range(len(blocks)), desc="quantizing", unit="block", disable=not processes.is_main)
    for index in progress:
        ensure_loaded(index)
        block, call = blocks[index], calls[index].with_extras(extras)
        full_call = calls[index].with_extras(full_extras) if full is not None else call
        prefix = f"{list_name}.{index}."
        names = [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]
        block.to(device)
        twin = copy.deepcopy(block) if full is not None else None
        dense = {key: weight for name in names for key, weight in weights_of(name, block.get_submodule(name)).items()}
        bits = {
            key: settings.bits_of(f"{index}.{name}")
            for name in names
            for key in weights_of(name, block.get_submodule(name))
        }
        checksums = finished_blocks.checksums(dense)
        keep_extras = index < len(blocks) - 1 and calls[index + 1].takes_extras
        reason = without_gradients or _reason_against_refining(block, names, keep_extras)
        if settings.refinement is not None and reason is not None:
            report.unrefined[prefix.rstrip(".")] = reason
        finished = finished_blocks.read(index, checksums, bits)
        if finished is None:
            paths = _Paths(block, twin, call, full_call, quantized, full, processes, offload, solved_from)
            block_report = None
            weights, reports, experts, offsets = _quantize_block(
                paths, names, list_name, index, settings, true_sequential
            )
            if settings.refinement is not None and reason is None and twin is not None and full is not None:
                factor = None if fisher is None else error_factor(fisher[index], settings.refinement.fisher_share)
                block_paths = BlockPaths(block, twin, call, full_call, quantized, full, held_out, processes)
                targets = Activations(device, offload, size)
                linear = {name: weights[name] for name in names if name in weights}
                refined, block_report = refine_block(
                    block_paths, prefix.rstrip("."), linear, offsets, settings.refinement, targets, factor
                )
                for name, weight in refined.items():
                    dense[name].copy_(weight.dequantize())
                weights.update(refined)
                report.blocks.append(block_report)
                del targets, block_paths
            del paths
            finished_blocks.write(index, checksums, weights, experts)
            report.layers.extend(reports)
            progress.set_postfix_str(_summary(reports, block_report))
        else:
            weights, experts = finished
            report.resumed_blocks += 1
            for name, weight in weights.items():
                dense[name].copy_(weight.dequantize())
        report.experts.update({prefix + name: counts for name, counts in experts.items()})
        if index < len(blocks) - 1 or tuning is not None:
            extras = _pass(block, call, quantized, keep_extras)
            if full is not None and twin is not None:
                full_extras = _pass(twin, full_call, full, keep_extras)
        del twin, dense
        for name in names:
            install_packed(block, name, weights)
        block.to(home)
        if load_block is not None and not processes.is_main:
            block.to("meta")
        calls[index].arguments.clear()
    use_packed_experts(model)
    if tuning is not None and full is not None:
        try:
            with on_device(model, device):
                moved = [batch.to(device) for batch in batches]
                report.end_to_end = tune_end_to_end(model, blocks, moved, quantized, full, held_out, tuning, processes)
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


def _pass(block: nn.Module, call: BlockCall, states: Activations, keep_extras: bool) -> list[Extras]:
    """Replaces hidden states by what a block makes of them; what else it returns, batch by batch, if that is kept."""
    kept = []
    for batch in range(len(states)):
        hidden, extras = call.results(block, states.get(batch), batch)
        states.replace(batch, hidden)
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


@dataclass(frozen=True)
class _Paths:
    """A block as it is being quantized, its full-precision twin, the calls of both, the hidden states that enter them,
    who shares the work, and the windows of each batch that make the moments, if not all do."""

    block: nn.Module
    twin: nn.Module | None
    call: BlockCall
    full_call: BlockCall
    quantized: Activations
    full: Activations | None
    processes: Processes
    offload: str
    windows: Sequence[Tensor] | None


def _quantize_block(
    paths: _Paths, names: Sequence[str], list_name: str, index: int, settings: SolverSettings, true_sequential: bool
) -> tuple[dict[str, QuantizedWeight], list[LayerReport], dict[str, ExpertCounts], dict[str, Tensor]]:
    """Quantizes the layers `names` of a block; afterwards the block computes with the quantized weights.

    Returns:
        The weights, the reports, the counts of experts, and for linear layers the `Solution.offsets`, if any.
    """
    prefix = f"{list_name}.{index}."
    weights: dict[str, QuantizedWeight] = {}
    offsets: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    counts: dict[str, ExpertCounts] = {}
    groups = observe_order(paths.block, names, paths.call, paths.quantized.get(0)) if names else []
    if settings.needs_deviation and settings.corrected_residual:
        groups = [_with_sum(group, paths) for group in groups]
    # Which experts saw a token, and so the order, may differ between processes.
    groups = paths.processes.first(groups)
    for step in [[group] for group in groups] if true_sequential else [groups]:
        linear = [group for group in step if not _of_experts(group, paths)]
        # All inputs are taken before anything in this step is quantized.
        expert_inputs = {
            group.names[0]: _expert_inputs(paths, group, settings) for group in step if group not in linear
        }
        for group, moments in zip(linear, _input_moments(paths, linear, settings), strict=True):
            if moments.tokens == 0:
                logger.warning("%s saw no calibration token and is rounded to nearest", prefix + group.names[0])
            for same, names_inside in _by_settings(group.names, index, settings):
                modules = {name: paths.block.get_submodule(name) for name in names_inside}
                solution = _solve_group(modules, moments, prefix, same, paths.processes)
                rows = [linear_weight(module).shape[0] for module in modules.values()]
                for (name, module), part in zip(modules.items(), _split(solution, rows), strict=True):
                    weights[name] = part.weight
                    if part.offsets is not None:
                        offsets[name] = part.offsets
                    linear_weight(module).copy_(part.weight.dequantize())
                    reports.append(_layer_report(prefix + name, [part], moments.tokens))
        for name, inputs in expert_inputs.items():
            experts = paths.block.get_submodule(name)
            twin = None if paths.twin is None else paths.twin.get_submodule(name)
            solutions, counts[name] = quantize_experts(
                experts, twin, inputs, f"{prefix}{name}.", settings.of(f"{index}.{name}"), paths.processes
            )
            for projection, each in solutions.items():
                weights.update({f"{name}.{projection}.{expert}": part.weight for expert, part in enumerate(each)})
                reports.append(_layer_report(f"{prefix}{name}.{projection}", each, counts[name].tokens))
    return weights, reports, counts, offsets


def _by_settings(names: Sequence[str], index: int, settings: SolverSettings) -> list[tuple[SolverSettings, list[str]]]:
    """The layers of a block that share an input, those with the same bits together."""
    found: dict[int, tuple[SolverSettings, list[str]]] = {}
    for name in names:
        own = settings.of(f"{index}.{name}")
        found.setdefault(own.bits, (own, []))[1].append(name)
    return list(found.values())


def _of_experts(group: InputGroup, paths: _Paths) -> bool:
    return is_experts(paths.block.get_submodule(group.names[0]))


def _expert_inputs(paths: _Paths, group: InputGroup, settings: SolverSettings) -> ExpertInputs:
    name = group.names[0]
    experts = paths.block.get_submodule(name)
    size = sum(x.numel() * x.element_size() for x in map(paths.quantized.get, range(len(paths.quantized))))
    inputs = ExpertInputs(
        len(experts.get_parameter(projections(experts)[0])),
        paths.quantized.device,
        paths.offload,
        settings.needs_deviation,
        size,
    )
    for batch in range(len(paths.quantized)):
        calls = calls_of_experts(paths.block, name, paths.call, paths.quantized.get(batch), batch, group.called_once)
        full_calls = []
        if settings.needs_deviation and paths.full is not None and paths.twin is not None:
            full_calls = calls_of_experts(
                paths.twin, name, paths.full_call, paths.full.get(batch), batch, group.called_once
            )
        same = len(full_calls) == len(calls)
        for position, (hidden, index, gates) in enumerate(calls):
            inputs.add(hidden, index, gates, full_calls[position][0] if same else None)
    return inputs


def _with_sum(group: InputGroup, paths: _Paths) -> InputGroup:
    if len(group.names) > 1 or not group.called_once or _of_experts(group, paths):
        return group
    return replace(group, added_at=find_sum(paths.block, group.names[0], paths.call, paths.quantized.get(0)))


def _input_moments(paths: _Paths, groups: Sequence[InputGroup], settings: SolverSettings) -> list[InputMoments]:
    """The moments of what each group of layers receives, from the windows that `paths` names.

    A layer that sees only some tokens has the moments of all of them: their windows are not known.
    """
    device = paths.quantized.device
    moments = []
    for group in groups:
        out_features, in_features = linear_weight(paths.block.get_submodule(group.names[0])).shape
        outputs = None if group.added_at is None else out_features
        moments.append(InputMoments(in_features, device, settings.needs_deviation, outputs))
    for batch in range(len(paths.quantized)):
        windows = None if paths.windows is None else paths.windows[batch]
        if windows is not None and not bool(windows.any()):
            continue
        hidden = paths.quantized.get(batch)
        seen, sums = layer_inputs(paths.block, groups, paths.call, hidden, batch)
        if paths.full is None or paths.twin is None or not settings.needs_deviation:
            full_seen: list[list[Tensor]] = [[] for _ in groups]
            full_sums: list[Tensor | None] = [None for _ in groups]
        else:
            full_seen, full_sums = layer_inputs(paths.twin, groups, paths.full_call, paths.full.get(batch), batch)
        count = len(hidden)
        tokens = count * hidden.shape[1]
        chosen = None if windows is None or bool(windows.all()) else windows.nonzero().flatten().to(device)
        for index, accumulated in enumerate(moments):
            inputs, full_inputs = seen[index], full_seen[index]
            # A layer that sees only some tokens (an expert) may see other ones in the full-precision model: then
            # its two inputs have no common rows, and it is quantized without the deviation term.
            sees_all = all(x.numel() == tokens * x.shape[-1] for x in inputs)
            if not sees_all or len(inputs) != len(full_inputs):
                accumulated.deviation = None
            rows = chosen if sees_all else None
            for position, x in enumerate(inputs):
                others: list[Tensor | None] = []
                if accumulated.deviation is not None:
                    of_output = accumulated.of_output
                    others = [full_sums[index], sums[index]] if of_output else [full_inputs[position]]
                cut = [None if each is None else _of_windows(each, count, rows) for each in others]
                accumulated.add(_of_windows(x, count, rows), *cut)
    for accumulated in moments:
        paths.processes.reduce(accumulated)
    return moments


def _of_windows(values: Tensor, count: int, chosen: Tensor | None) -> Tensor:
    """What a layer sees of the chosen ones of `count` windows, `[windows, tokens, width]`; of all if `None`."""
    return values if chosen is None else values.reshape(count, -1, values.shape[-1])[chosen]


def _solve_group(
    modules: dict[str, nn.Module],
    moments: InputMoments,
    prefix: str,
    settings: SolverSettings,
    processes: Processes,
) -> Solution:
    for name, module in modules.items():
        if not bool(torch.isfinite(linear_weight(module)).all()):
            raise ValueError(f"{prefix}{name}: the weight contains NaN or infinity; the base checkpoint is damaged")
    rows = torch.cat([linear_weight(module).float() for module in modules.values()])
    try:
        return processes.solve(len(rows), lambda part: quantize_weight(rows[part], moments.of_rows(part), settings))
    except ValueError as error:
        raise ValueError(f"{prefix}{', '.join(modules)}: {error}") from error


def _split(solution: Solution, rows: Sequence[int]) -> list[Solution]:
    whole = solution.weight
    parts = zip(whole.integers.split(rows), whole.scales.split(rows), whole.zeros.split(rows), strict=True)
    losses = {step: loss.split(rows) for step, loss in solution.losses.items()}
    offsets = None if solution.offsets is None else solution.offsets.split(rows)
    return [
        Solution(
            QuantizedWeight(integers, scales, zeros, whole.bits, whole.group_size, whole.sym),
            {step: loss[index] for step, loss in losses.items()},
            solution.energy.split(rows)[index],
            None if offsets is None else offsets[index],
        )
        for index, (integers, scales, zeros) in enumerate(parts)
    ]


def _layer_report(name: str, solutions: Sequence[Solution], tokens: int) -> LayerReport:
    energy = max(sum(float(solution.energy.sum()) for solution in solutions), torch.finfo(torch.float32).tiny)
    losses = {
        step: sum(float(solution.losses[step].sum()) for solution in solutions) / energy
        for step in solutions[0].losses
    }
    logger.info("%s: relative error %s", name, ", ".join(f"{step} {loss:.3g}" for step, loss in losses.items()))
    return LayerReport(name, losses, tokens)


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
