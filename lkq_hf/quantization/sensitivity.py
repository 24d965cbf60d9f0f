"""What the model's predictions lose by each layer at each bit width, estimated without quantizing the model."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lkq_hf.kernels.bit_stream import BITS
from lkq_hf.quantization.blocks import linear_weight
from lkq_hf.quantization.capture import Extras, capture_block_calls, layer_inputs, observe_order
from lkq_hf.quantization.experts import is_experts
from lkq_hf.quantization.fisher import layer_fisher
from lkq_hf.quantization.hessian import InputMoments
from lkq_hf.quantization.packing import packed_shapes
from lkq_hf.quantization.solve import SolverSettings, quantize_weight, resolve_group_size
from lkq_hf.quantization.widths import Unit

logger = logging.getLogger(__name__)

# Windows that are looked at, of at most so many tokens, and rows of each weight: rows are solved independently.
WINDOWS = 16
LENGTH = 512
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
    """Estimates for all layers and widths how much the divergence from the full-precision model grows.

    To second order an error `e` in a layer's output adds `E[(g e)^2] / 2` nats per token, with the gradient `g` of the
    log-likelihood of tokens that the model itself predicts. For an error `D` of the weight, `e = D x`. Gradients are
    taken as independent of inputs and of each other (K-FAC, arXiv 1503.05671, with a diagonal second factor), which
    leaves `sum over rows r of E[g_r^2] D_r E[x x^T] D_r^T / 2`. `D` comes from a quick solver: scales searched by
    their effect on the output, then GPTQ, for some rows of each weight.

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
    sample = tokens[:WINDOWS, :LENGTH]
    blocks = list(model.get_submodule(list_name).children())
    nn.Module.to(model, device)
    fisher = layer_fisher(model, layers, sample.to(device))
    nn.Module.to(model, home)
    hidden, calls = capture_block_calls(model, blocks, [window.to(home) for window in sample.split(1)])
    extras: list[Extras] = []
    units: list[Unit] = []
    for index, block in enumerate(tqdm(blocks, desc="measuring layers", unit="block")):
        prefix = f"{list_name}.{index}."
        names = [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]
        block.to(device)
        call = calls[index].with_extras(extras)
        groups = observe_order(block, names, call, hidden[0].to(device)) if names else []
        moments = [
            InputMoments(linear_weight(block.get_submodule(group.names[0])).shape[1], device, deviation=False)
            for group in groups
        ]
        extras = []
        for batch, state in enumerate(hidden):
            inputs, _ = layer_inputs(block, groups, call, state.to(device), batch)
            for accumulated, seen in zip(moments, inputs, strict=True):
                for x in seen:
                    accumulated.add(x)
            result, more = call.results(block, state.to(device), batch)
            hidden[batch] = result.to(home)
            extras.append(more)
        for group, accumulated in zip(groups, moments, strict=True):
            weights = {name: linear_weight(block.get_submodule(name)) for name in group.names}
            gradients = {name: fisher[prefix + name] for name in group.names}
            units.append(_unit(index, weights, gradients, accumulated, settings))
        block.to(home)
        calls[index].arguments.clear()
    return _with_unseen(units)


def _unit(
    index: int,
    weights: dict[str, Tensor],
    gradients: dict[str, Tensor],
    moments: InputMoments,
    settings: SolverSettings,
) -> Unit:
    sizes = dict.fromkeys(BITS, 0)
    losses = dict.fromkeys(BITS, 0.0 if moments.tokens else float("nan"))
    for name, weight in weights.items():
        out_features, in_features = weight.shape
        group_size = resolve_group_size(in_features, settings.group_size)
        rows = slice(None, None, max(1, out_features // ROWS))
        importance = gradients[name][rows]
        share = gradients[name].sum() / importance.sum().clamp(min=torch.finfo(torch.float32).tiny)
        for bits in BITS:
            shapes = packed_shapes(in_features, out_features, bits, group_size).values()
            sizes[bits] += sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes)
            if moments.tokens:
                errors = quantize_weight(weight[rows], moments, _quick(settings, bits)).losses["gptq"]
                losses[bits] += (errors @ importance * share / 2).item()
    return Unit(
        tuple(f"{index}.{name}" for name in weights), sum(weight.numel() for weight in weights.values()), sizes, losses
    )


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
