"""Quantizes the layers of one block, in the order in which they run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lkq_hf.quantization.block_path import BlockPath
from lkq_hf.quantization.blocks import linear_weight
from lkq_hf.quantization.capture import InputGroup, find_sum, layer_inputs, observe_order
from lkq_hf.quantization.expert_inputs import ExpertInputs, calls_of_experts
from lkq_hf.quantization.expert_solver import ExpertCounts, quantize_experts
from lkq_hf.quantization.experts import is_experts, projections
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.processes import Processes
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
class SolvedBlock:
    """A block's quantized weights, the errors of its layers, and the tokens that its experts saw, all by name.

    `offsets` are those of its linear layers' solutions, if they have any (`Solution.offsets`).
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    experts: dict[str, ExpertCounts] = field(default_factory=dict)
    offsets: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockSolver:
    """Quantizes one block after another; holds what they have in common.

    Args:
        list_name: name of the block list.
        settings: of the solver.
        true_sequential: `False` takes all inputs of a block before its first layer is quantized.
        offload: where what enters experts is kept, see `Activations`.
        windows: which windows of each batch make the moments, bool `[windows]`; `None` takes all.
        processes: who shares the work.
    """

    list_name: str
    settings: SolverSettings
    true_sequential: bool
    offload: str
    windows: Sequence[Tensor] | None
    processes: Processes

    def solve(self, index: int, names: Sequence[str], path: BlockPath, full: BlockPath | None) -> SolvedBlock:
        """Quantizes the layers `names` of a block; afterwards the block computes with the quantized weights.

        Args:
            index: of the block in the list.
            names: of linear layers and fused experts inside the block.
            path: the block.
            full: its full-precision twin, where the settings use it.
        """
        solved = SolvedBlock()
        groups = observe_order(path.block, names, path.call, path.states.get(0)) if names else []
        if self.settings.needs_deviation and self.settings.corrected_residual:
            groups = [_with_sum(group, path) for group in groups]
        # Which experts saw a token, and so the order, may differ between processes.
        groups = self.processes.first(groups)
        for step in [[group] for group in groups] if self.true_sequential else [groups]:
            linear = [group for group in step if not _of_experts(group, path)]
            # All inputs are taken before anything in this step is quantized.
            expert_inputs = {
                group.names[0]: self._expert_inputs(group, path, full) for group in step if group not in linear
            }
            for group, moments in zip(linear, self._input_moments(linear, path, full), strict=True):
                self._solve_linear(solved, index, group.names, path.block, moments)
            for name, inputs in expert_inputs.items():
                twin = None if full is None else full.block.get_submodule(name)
                self._solve_experts(solved, index, name, path.block.get_submodule(name), twin, inputs)
        return solved

    def _solve_linear(
        self, solved: SolvedBlock, index: int, names: Sequence[str], block: nn.Module, moments: InputMoments
    ) -> None:
        """Quantizes layers that share an input."""
        prefix = f"{self.list_name}.{index}."
        if moments.tokens == 0:
            logger.warning("%s saw no calibration token and is rounded to nearest", prefix + names[0])
        for settings, same in _by_settings(names, index, self.settings):
            modules = {name: block.get_submodule(name) for name in same}
            solution = _solve_group(modules, moments, prefix, settings, self.processes)
            rows = [linear_weight(module).shape[0] for module in modules.values()]
            for (name, module), part in zip(modules.items(), _split(solution, rows), strict=True):
                solved.weights[name] = part.weight
                if part.offsets is not None:
                    solved.offsets[name] = part.offsets
                linear_weight(module).copy_(part.weight.dequantize())
                solved.reports.append(_layer_report(prefix + name, [part], moments.tokens))

    def _solve_experts(
        self,
        solved: SolvedBlock,
        index: int,
        name: str,
        experts: nn.Module,
        twin: nn.Module | None,
        inputs: ExpertInputs,
    ) -> None:
        """Quantizes one module of fused experts."""
        prefix, settings = f"{self.list_name}.{index}.{name}.", self.settings.of(f"{index}.{name}")
        solutions, counts = quantize_experts(experts, twin, inputs, prefix, settings, self.processes)
        solved.experts[name] = counts
        for projection, each in solutions.items():
            solved.weights.update({f"{name}.{projection}.{expert}": part.weight for expert, part in enumerate(each)})
            solved.reports.append(_layer_report(prefix + projection, each, counts.tokens))

    def _expert_inputs(self, group: InputGroup, path: BlockPath, full: BlockPath | None) -> ExpertInputs:
        name = group.names[0]
        experts = path.block.get_submodule(name)
        size = sum(x.numel() * x.element_size() for x in map(path.states.get, path.batches))
        deviation = self.settings.needs_deviation
        count = len(experts.get_parameter(projections(experts)[0]))
        inputs = ExpertInputs(count, path.device, self.offload, deviation, size)

        def calls_on(path: BlockPath, batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
            return calls_of_experts(path.block, name, path.call, path.states.get(batch), batch, group.called_once)

        for batch in path.batches:
            calls = calls_on(path, batch)
            full_calls = calls_on(full, batch) if deviation and full is not None else []
            same = len(full_calls) == len(calls)
            for position, (hidden, index, gates) in enumerate(calls):
                inputs.add(hidden, index, gates, full_calls[position][0] if same else None)
        return inputs

    def _input_moments(
        self, groups: Sequence[InputGroup], path: BlockPath, full: BlockPath | None
    ) -> list[InputMoments]:
        """The moments of what each group of layers receives, from `windows`.

        A layer that sees only some tokens has the moments of all of them: their windows are not known.
        """
        deviation = self.settings.needs_deviation
        moments = []
        for group in groups:
            out_features, in_features = linear_weight(path.block.get_submodule(group.names[0])).shape
            outputs = None if group.added_at is None else out_features
            moments.append(InputMoments(in_features, path.device, deviation, outputs))
        for batch in path.batches:
            windows = None if self.windows is None else self.windows[batch]
            if windows is not None and not bool(windows.any()):
                continue
            hidden = path.states.get(batch)
            seen, sums = layer_inputs(path.block, groups, path.call, hidden, batch)
            if full is None or not deviation:
                full_seen: list[list[Tensor]] = [[] for _ in groups]
                full_sums: list[Tensor | None] = [None for _ in groups]
            else:
                full_seen, full_sums = layer_inputs(full.block, groups, full.call, full.states.get(batch), batch)
            count = len(hidden)
            tokens = count * hidden.shape[1]
            chosen = None if windows is None or bool(windows.all()) else windows.nonzero().flatten().to(path.device)
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
            self.processes.reduce(accumulated)
        return moments


def _by_settings(names: Sequence[str], index: int, settings: SolverSettings) -> list[tuple[SolverSettings, list[str]]]:
    """The layers of a block that share an input, those with the same bits together."""
    found: dict[int, tuple[SolverSettings, list[str]]] = {}
    for name in names:
        own = settings.of(f"{index}.{name}")
        found.setdefault(own.bits, (own, []))[1].append(name)
    return list(found.values())


def _of_experts(group: InputGroup, path: BlockPath) -> bool:
    return is_experts(path.block.get_submodule(group.names[0]))


def _with_sum(group: InputGroup, path: BlockPath) -> InputGroup:
    """The group, with where its layer's output is added to something, if that is to be found."""
    if len(group.names) > 1 or not group.called_once or _of_experts(group, path):
        return group
    return replace(group, added_at=find_sum(path.block, group.names[0], path.call, path.states.get(0)))


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
