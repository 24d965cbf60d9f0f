"""What the model's predictions lose by the bit widths of its layers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lkq_hf.kernels.bit_stream import BITS
from lkq_hf.quantization.blocks import linear_weight
from lkq_hf.quantization.capture import BlockCall, Extras, InputGroup, capture_block_calls, layer_inputs, observe_order
from lkq_hf.quantization.end_to_end import divergence
from lkq_hf.quantization.experts import is_experts
from lkq_hf.quantization.head import Head
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.on_device import on_device
from lkq_hf.quantization.packing import packed_shapes
from lkq_hf.quantization.solve import SolverSettings, quantize_weight, resolve_group_size
from lkq_hf.quantization.widths import Unit

# Calibration windows of at most so many tokens: those on which units are measured, those on which whole choices are
# compared, and those from which a solver takes its moments.
MEASURED_WINDOWS = 4
COMPARED_WINDOWS = 8
SOLVED_WINDOWS = 12
LENGTH = 512
# Places of the batches of windows.
MEASURED, COMPARED, SOLVED = 0, 1, 2


@dataclass(frozen=True)
class _Group:
    """Layers of one block that share their input: `unit` tells of them what does not depend on measuring."""

    block: int
    inputs: InputGroup
    unit: Unit

    @property
    def layers(self) -> list[tuple[str, str]]:
        """Each layer's name inside its block, and inside the list of blocks."""
        return list(zip(self.inputs.names, self.unit.layers, strict=True))


class TrialQuantization:
    """Quantizes layers of a model in place and measures the divergence of its predictions.

    Use it as `trial_quantization` gives it: that puts the full-precision weights back.

    Args:
        model: in full precision, whole and on the device.
        list_name: name of the block list.
        layers: by full name; linear ones only.
        tokens: int64 `[samples, length]`, on the device, of which some are taken.
        settings: of the quantization; `bits` do not matter.

    Attributes:
        units: in the order in which they run, without losses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        list_name: str,
        layers: dict[str, nn.Module],
        tokens: Tensor,
        settings: SolverSettings,
    ) -> None:
        self.settings = settings
        self.blocks = list(model.get_submodule(list_name).children())
        batches = _batches(tokens)
        self.hidden, self.calls = capture_block_calls(model, self.blocks, batches)
        self.head = Head(model, self.blocks, self.calls)
        self.dense = {
            name.removeprefix(f"{list_name}."): linear_weight(layer).detach().cpu().clone()
            for name, layer in layers.items()
        }
        self.groups: list[_Group] = []
        states, extras = self._start()
        for index, block in enumerate(self.blocks):
            call = self.calls[index].with_extras(extras)
            names = [name.removeprefix(f"{index}.") for name in self.dense if name.startswith(f"{index}.")]
            for group in observe_order(block, names, call, states[MEASURED]) if names else []:
                self.groups.append(_Group(index, group, self._unit(index, group)))
            states, extras = _pass(block, call, states)
        self.teacher = states[:SOLVED]
        self.units = [group.unit for group in self.groups]

    def divergence(self, bits: Mapping[str, int]) -> float:
        """Quantizes everything, each layer with its input from those before it, as in the calibration walk.

        The solver is a quick one: scales searched by their effect on the output, then GPTQ.

        Args:
            bits: of each layer, by its name inside the list of blocks.

        Returns:
            The divergence from the full-precision model's predictions on windows of their own, in nats per token.
        """
        return self._divergence(self._quantize(bits)[COMPARED], COMPARED)

    def measure(self, bits: int) -> list[Unit]:
        """Measures what each unit loses at the smallest width, with all other layers in full precision.

        There its effect is largest beside the noise. Each bit more quarters a weight's squared error, and with it the
        loss. The solver is the walk's own: the quick one doubles what some layers lose. Units that saw no token keep
        `bits`.
        """
        self.restore()
        states, extras = self._start()
        units: list[Unit] = []
        for index, block in enumerate(tqdm(self.blocks, desc="measuring layers", unit="block")):
            call = self.calls[index].with_extras(extras)
            groups = self._groups_of(index)
            for group, moments in zip(groups, self._moments(groups, call, states), strict=True):
                losses = {bits: 0.0}
                if moments.tokens:
                    with _changed(block, self._solve(group, moments, _of_one_layer(self.settings, BITS[0]))):
                        alone = self._divergence(self._finish(index, states[MEASURED], extras[MEASURED]))
                    losses = {width: alone / 4 ** (width - BITS[0]) for width in BITS}
                units.append(replace(group.unit, losses=losses))
            states, extras = _pass(block, call, states)
        return units

    def restore(self) -> None:
        """Puts the full-precision weights back."""
        for name, weight in self.dense.items():
            index, _, inside = name.partition(".")
            linear_weight(self.blocks[int(index)].get_submodule(inside)).copy_(weight)

    def _start(self) -> tuple[list[Tensor], list[Extras]]:
        return list(self.hidden), [() for _ in self.hidden]

    def _divergence(self, state: Tensor, batch: int = MEASURED) -> float:
        total = divergence(self.head, state, self.teacher[batch])
        return float(total) / (state.shape[0] * state.shape[1])

    def _quantize(self, bits: Mapping[str, int]) -> list[Tensor]:
        """Quantizes everything; the hidden states after the last block."""
        self.restore()
        states, extras = self._start()
        for index, block in enumerate(tqdm(self.blocks, desc="comparing widths", unit="block")):
            call = self.calls[index].with_extras(extras)
            for group in self._groups_of(index):
                (moments,) = self._moments([group], call, states)
                settings = _quick(self.settings, bits[group.unit.layers[0]])
                for name, weight in self._solve(group, moments, settings).items():
                    linear_weight(block.get_submodule(name)).copy_(weight)
            states, extras = _pass(block, call, states)
        return states

    def _groups_of(self, index: int) -> list[_Group]:
        return [group for group in self.groups if group.block == index]

    def _moments(self, groups: Sequence[_Group], call: BlockCall, states: Sequence[Tensor]) -> list[InputMoments]:
        """Input moments of groups of one block, with the block's weights as they are."""
        if not groups:
            return []
        block, device = self.blocks[groups[0].block], states[MEASURED].device
        inputs = [group.inputs for group in groups]
        found = [InputMoments(self.dense[group.unit.layers[0]].shape[1], device, deviation=False) for group in groups]
        for batch in range(SOLVED, len(states)):
            for moments, seen in zip(found, layer_inputs(block, inputs, call, states[batch], batch)[0], strict=True):
                for x in seen:
                    moments.add(x)
        return found

    def _solve(self, group: _Group, moments: InputMoments, settings: SolverSettings) -> dict[str, Tensor]:
        """A group's dequantized weights, by their names inside the block."""
        device = moments.hessian.device
        return {
            name: quantize_weight(self.dense[full].to(device), moments, settings).weight.dequantize()
            for name, full in group.layers
        }

    def _finish(self, index: int, state: Tensor, extras: Extras) -> Tensor:
        """The measured batch's hidden states after the last block, from those that enter block `index`."""
        for block, call in zip(self.blocks[index:], self.calls[index:], strict=True):
            first = BlockCall(call.arguments[: MEASURED + 1], call.returns).with_extras([extras])
            state, extras = first.results(block, state, MEASURED)
        return state

    def _unit(self, index: int, group: InputGroup) -> Unit:
        names = tuple(f"{index}.{name}" for name in group.names)
        sizes = dict.fromkeys(BITS, 0)
        for out_features, in_features in (self.dense[name].shape for name in names):
            group_size = resolve_group_size(in_features, self.settings.group_size)
            for bits in BITS:
                shapes = packed_shapes(in_features, out_features, bits, group_size).values()
                sizes[bits] += sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes)
        return Unit(names, sum(self.dense[name].numel() for name in names), sizes, {})


@contextmanager
def trial_quantization(
    model: PreTrainedModel,
    list_name: str,
    layers: dict[str, nn.Module],
    tokens: Tensor,
    settings: SolverSettings,
    device: torch.device | str,
) -> Iterator[TrialQuantization]:
    """A `TrialQuantization` with the model on `device`; at the end the model is as and where it was.

    Raises:
        ValueError: fused experts among the layers.
    """
    if fused := [name for name, layer in layers.items() if is_experts(layer)]:
        raise ValueError(
            f"bits are chosen for linear layers only, found fused experts ({fused[0]}); give one width for all with "
            "bits, or leave the experts in full precision with modules_to_not_convert"
        )
    with on_device(model, device), torch.no_grad():
        trial = TrialQuantization(model, list_name, layers, tokens.to(device), settings)
        try:
            yield trial
        finally:
            trial.restore()


def _batches(tokens: Tensor) -> list[Tensor]:
    """Windows to measure on, windows to compare on, and those of the moments, one by one; all, where there are few."""
    start, batches = 0, []
    for count in (MEASURED_WINDOWS, COMPARED_WINDOWS, SOLVED_WINDOWS):
        part = tokens[start : start + count, :LENGTH]
        batches.append(part if len(part) else tokens[:count, :LENGTH])
        start += count
    return [*batches[:SOLVED], *batches[SOLVED].split(1)]


def _pass(block: nn.Module, call: BlockCall, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Extras]]:
    passed = [call.results(block, state, batch) for batch, state in enumerate(states)]
    return [state for state, _ in passed], [extras for _, extras in passed]


@contextmanager
def _changed(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A block with other weights in some of its layers."""
    inside = {name: linear_weight(block.get_submodule(name)) for name in weights}
    before = {name: weight.clone() for name, weight in inside.items()}
    for name, weight in inside.items():
        weight.copy_(weights[name])
    yield
    for name, weight in inside.items():
        weight.copy_(before[name])


def _of_one_layer(settings: SolverSettings, bits: int) -> SolverSettings:
    """Without what needs the layers before, or comes after the layers."""
    return replace(
        settings,
        bits=bits,
        alpha=0.0,
        corrected_target=False,
        corrected_residual=False,
        refinement=None,
        end_to_end=None,
        layer_bits={},
    )


def _quick(settings: SolverSettings, bits: int) -> SolverSettings:
    alone = _of_one_layer(settings, bits)
    return replace(alone, stages=("stage1",), round_to_nearest=False, column_order="stored")
