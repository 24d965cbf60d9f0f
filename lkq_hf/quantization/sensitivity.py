"""What the model's predictions lose by each layer at each bit width, measured by quantizing one at a time."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lkq_hf.kernels.bit_stream import BITS
from lkq_hf.quantization.blocks import linear_weight
from lkq_hf.quantization.capture import BlockCall, Extras, capture_block_calls, layer_inputs, observe_order
from lkq_hf.quantization.end_to_end import divergence
from lkq_hf.quantization.experts import is_experts
from lkq_hf.quantization.head import Head
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.packing import packed_shapes
from lkq_hf.quantization.solve import SolverSettings, quantize_weight, resolve_group_size
from lkq_hf.quantization.weight import QuantizedWeight
from lkq_hf.quantization.widths import Unit

# Calibration windows of at most so many tokens: those on which predictions are compared, and those from which the
# quick solver takes its moments.
MEASURED_WINDOWS = 4
SOLVED_WINDOWS = 12
LENGTH = 512
# The width at which predictions are compared, and rows of each weight that are solved at all others.
MEASURED_BITS = 3
ROWS = 128


@torch.no_grad()
def measure_sensitivity(
    model: PreTrainedModel,
    list_name: str,
    layers: dict[str, nn.Module],
    tokens: Tensor,
    settings: SolverSettings,
    device: torch.device | str,
) -> list[Unit]:
    """Measures for all layers how much their quantization alone moves the model's predictions.

    Layers that share an input are quantized to 3 bits together, everything else being in full precision, and the
    divergence from the full-precision model is taken on a few calibration windows. At other widths it is taken to be
    in proportion to the squared error of the layers' outputs. The solver is a quick one: scales searched by their
    effect on the output, then GPTQ.

    Args:
        model: in full precision and whole; it is back on its device afterwards.
        list_name: name of the block list.
        layers: by full name; linear ones only.
        tokens: int64 `[samples, length]`, of which some are taken.
        settings: of the quantization; `bits` and what the quick solver leaves out do not matter.
        device: where the arithmetic runs; the model fits there.

    Returns:
        Units in the order in which they run.

    Raises:
        ValueError: fused experts among the layers.
    """
    if fused := [name for name, layer in layers.items() if is_experts(layer)]:
        raise ValueError(
            f"bits are chosen for linear layers only, found fused experts ({fused[0]}); give one width for all with "
            "bits, or leave the experts in full precision with modules_to_not_convert"
        )
    device = torch.device(device)
    home = model.get_input_embeddings().get_parameter("weight").device
    sample = tokens[: MEASURED_WINDOWS + SOLVED_WINDOWS, :LENGTH].to(device)
    blocks = list(model.get_submodule(list_name).children())
    nn.Module.to(model, device)
    # The first batch is measured. Where there are few windows, the same ones serve for both.
    batches = [
        sample[:MEASURED_WINDOWS],
        *(sample[MEASURED_WINDOWS:] if len(sample) > MEASURED_WINDOWS else sample).split(1),
    ]
    hidden, calls = capture_block_calls(model, blocks, batches)
    extras: list[Extras] = [() for _ in batches]
    head = Head(model, blocks, calls)
    teacher, _ = _run(blocks, calls, hidden[0], ())
    count = teacher.shape[0] * teacher.shape[1]
    units: list[Unit] = []
    for index, block in enumerate(tqdm(blocks, desc="measuring layers", unit="block")):
        prefix = f"{list_name}.{index}."
        names = [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]
        call = calls[index].with_extras(extras)
        groups = observe_order(block, names, call, hidden[0]) if names else []
        moments = [
            InputMoments(linear_weight(block.get_submodule(group.names[0])).shape[1], device, deviation=False)
            for group in groups
        ]
        for batch in range(1, len(batches)):
            inputs, _ = layer_inputs(block, groups, call, hidden[batch], batch)
            for accumulated, seen in zip(moments, inputs, strict=True):
                for x in seen:
                    accumulated.add(x)
        for group, accumulated in zip(groups, moments, strict=True):
            weights = {name: linear_weight(block.get_submodule(name)) for name in group.names}
            unit, solved = _solve(index, weights, accumulated, settings)
            loss = float("nan")
            if solved:
                dense = {name: weight.clone() for name, weight in weights.items()}
                for name, weight in weights.items():
                    weight.copy_(solved[name].dequantize())
                student, _ = _run(blocks[index:], calls[index:], hidden[0], extras[0])
                for name, weight in weights.items():
                    weight.copy_(dense[name])
                loss = float(divergence(head, student, teacher, False)[0]) / count
            scale = loss / unit.losses[MEASURED_BITS]
            units.append(replace(unit, losses={bits: error * scale for bits, error in unit.losses.items()}))
        passed = [call.results(block, hidden[batch], batch) for batch in range(len(batches))]
        hidden, extras = [state for state, _ in passed], [more for _, more in passed]
    nn.Module.to(model, home)
    return _with_unseen(units)


def _run(
    blocks: Sequence[nn.Module], calls: Sequence[BlockCall], state: Tensor, extras: Extras
) -> tuple[Tensor, Extras]:
    """The first batch's hidden states, and what comes with them, after some blocks."""
    for block, call in zip(blocks, calls, strict=True):
        first = BlockCall(call.arguments[:1], call.returns).with_extras([extras])
        state, extras = first.results(block, state, 0)
    return state, extras


def _solve(
    index: int, weights: dict[str, Tensor], moments: InputMoments, settings: SolverSettings
) -> tuple[Unit, dict[str, QuantizedWeight]]:
    """A unit with squared errors of outputs as its losses, and its weights at the width that is measured.

    Both are empty of numbers where the layers saw no token.
    """
    sizes = dict.fromkeys(BITS, 0)
    errors = dict.fromkeys(BITS, 0.0 if moments.tokens else float("nan"))
    solved: dict[str, QuantizedWeight] = {}
    for name, weight in weights.items():
        out_features, in_features = weight.shape
        group_size = resolve_group_size(in_features, settings.group_size)
        every = max(1, out_features // ROWS)
        for bits in BITS:
            shapes = packed_shapes(in_features, out_features, bits, group_size).values()
            sizes[bits] += sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes)
            if not moments.tokens:
                continue
            measured = bits == MEASURED_BITS
            solution = quantize_weight(weight if measured else weight[::every], moments, _quick(settings, bits))
            if measured:
                solved[name] = solution.weight
            errors[bits] += solution.losses["gptq"][:: every if measured else 1].mean().item() * out_features
    count = sum(weight.numel() for weight in weights.values())
    return Unit(tuple(f"{index}.{name}" for name in weights), count, sizes, errors), solved


def _quick(settings: SolverSettings, bits: int) -> SolverSettings:
    return replace(
        settings,
        bits=bits,
        stages=("stage1",),
        round_to_nearest=False,
        column_order="stored",
        alpha=0.0,
        corrected_target=False,
        corrected_residual=False,
        refinement=None,
        end_to_end=None,
        layer_bits={},
    )


def _with_unseen(units: Sequence[Unit]) -> list[Unit]:
    """Units that saw no token count, weight by weight, as the others do on average."""
    seen = [unit for unit in units if unit.losses[BITS[0]] == unit.losses[BITS[0]]]
    mean = {bits: statistics.fmean(unit.losses[bits] / unit.weights for unit in seen) for bits in BITS}
    return [
        unit if unit in seen else replace(unit, losses={bits: loss * unit.weights for bits, loss in mean.items()})
        for unit in units
    ]
