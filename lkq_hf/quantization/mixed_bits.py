"""From a mean of bits or a size to a bit width for each layer, in the configuration."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lkq_hf.files import read_json
from lkq_hf.kernels.bit_stream import BITS
from lkq_hf.quantization.blocks import weights_of
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.finished_blocks import walk_arguments
from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.sensitivity import TrialQuantization, trial_quantization
from lkq_hf.quantization.widths import Unit, choose_widths
from lkq_hf.runs import Run

logger = logging.getLogger(__name__)

WIDTHS = "widths"
"""Name of the folder beside a run's finished blocks that holds the chosen widths, and of the file in it."""

# What a tensor takes in a file's header besides its name.
HEADER = 128


def set_widths(
    model: PreTrainedModel,
    config: TwoStageGPTQConfig,
    list_name: str,
    layers: dict[str, nn.Module],
    tokens: Tensor,
    device: torch.device | str,
) -> None:
    """Chooses a width for each layer by `config.mean_bits` or `config.target_size`; sets `bits` and `layer_bits`.

    `bits` becomes the width of most weights. Widths that an interrupted run has chosen are taken from its directory.

    Args:
        model: in full precision and whole.
        layers: by full name.
        tokens: int64 `[samples, length]`.

    Raises:
        ValueError: the smallest widths are too large, or layers that are not measured (`trial_quantization`).
    """
    processes = Processes.current()
    settings = config.solver_settings()
    arguments = walk_arguments(model, layers, tokens, settings, config.true_sequential, config.batch_size)
    arguments |= {"mean_bits": config.mean_bits, "target_size": config.target_size}
    directory, name = None if config.resume_dir is None else Path(config.resume_dir) / WIDTHS, f"{WIDTHS}.json"
    run = Run(directory, arguments, name, writes=processes.is_main)
    if name in run:
        plan = run.read(name, read_json)
    else:
        with trial_quantization(model, list_name, layers, tokens, settings, device) as trial:
            costs, budget = _costs(model, config, layers, trial.units)
            bits, loss = _best(trial, costs, budget)
        plan = {"bits": bits, "loss": loss}
        logger.info("widths of layers: %s; estimated divergence %.3g nats", Counter(bits.values()), loss)
        plan = processes.first(plan)
        run.write(name, lambda path: path.write_text(json.dumps(plan), encoding="utf-8"))
    weights: Counter[int] = Counter()
    for name, layer in layers.items():
        weights[plan["bits"][name.removeprefix(f"{list_name}.")]] += _weights(name, layer)
    config.bits = weights.most_common(1)[0][0]
    config.layer_bits = {layer: bits for layer, bits in plan["bits"].items() if bits != config.bits}


def describe_widths(config: TwoStageGPTQConfig, list_name: str, layers: dict[str, nn.Module]) -> dict[str, Any]:
    """What a checkpoint's `meta` says of widths that differ.

    Returns:
        `"mean_bits"`, the mean over all quantized weights, without scales and zero points; `"layers_by_bits"`, how
        many layers have each width.
    """
    counts: Counter[int] = Counter()
    weights: Counter[int] = Counter()
    for name, layer in layers.items():
        bits = config.bits_of(name.removeprefix(f"{list_name}."))
        counts[bits] += 1
        weights[bits] += _weights(name, layer)
    mean = sum(bits * count for bits, count in weights.items()) / weights.total()
    return {"mean_bits": round(mean, 4), "layers_by_bits": {str(bits): counts[bits] for bits in sorted(counts)}}


def _weights(name: str, layer: nn.Module) -> int:
    return sum(weight.numel() for weight in weights_of(name, layer).values())


def _costs(
    model: PreTrainedModel, config: TwoStageGPTQConfig, layers: dict[str, nn.Module], units: Sequence[Unit]
) -> tuple[list[dict[int, float]], float]:
    """What each unit costs by width, in bits or bytes, and what all may cost together."""
    if config.mean_bits is not None:
        costs: list[dict[int, float]] = [{bits: bits * unit.weights for bits in unit.sizes} for unit in units]
        return costs, config.mean_bits * sum(unit.weights for unit in units)
    others, target = _bytes_of_the_rest(model, layers), config.target_size or 0
    sizes: list[dict[int, float]] = [dict(unit.sizes) for unit in units]
    least = others + sum(size[BITS[0]] for size in sizes)
    if least > target:
        raise ValueError(
            f"target_size={config.target_size} is too little: with {BITS[0]} bits in all layers the checkpoint takes "
            f"{least:.0f} bytes, {others} of which are not quantized. A larger group_size takes less"
        )
    return sizes, target - others


def _best(trial: TrialQuantization, costs: Sequence[dict[int, float]], budget: float) -> tuple[dict[str, int], float]:
    """Of the choice that should lose least, and of the one that makes no layer smaller than the largest width that all
    layers can have, the one that loses less.

    Returns:
        Bits of each layer, and the divergence of the quick solver's model.
    """
    fitting = [bits for bits in BITS if sum(cost[bits] for cost in costs) <= budget]
    uniform = max(fitting)
    units = trial.measure(uniform)
    tried: list[tuple[float, dict[str, int]]] = []
    for among in (units, [unit.at_least(uniform) for unit in units]):
        choice = choose_widths(among, costs, budget)
        bits = {layer: width for unit, width in zip(units, choice, strict=True) for layer in unit.layers}
        if bits not in [found for _, found in tried]:
            tried.append((trial.divergence(bits), bits))
    logger.info("divergence of choices: %s nats", ", ".join(f"{loss:.4g}" for loss, _ in tried))
    loss, best = min(tried, key=lambda each: each[0])
    return best, loss


def _bytes_of_the_rest(model: PreTrainedModel, layers: dict[str, nn.Module]) -> int:
    """What a checkpoint holds besides packed weights: tensors in full precision, and the files' headers."""
    packed = {id(layer.get_parameter("weight")) for layer in layers.values()}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    unique = {id(tensor): (name, tensor) for name, tensor in state.items() if id(tensor) not in packed}
    dense = sum(len(name) + HEADER + tensor.numel() * tensor.element_size() for name, tensor in unique.values())
    return dense + sum(4 * (len(name) + HEADER) for name in layers)
