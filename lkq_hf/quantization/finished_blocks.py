"""The blocks that a calibration walk has finished, on disk."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lkq_hf.quantization.blocks import weights_of
from lkq_hf.quantization.calibration_data import digest
from lkq_hf.quantization.expert_solver import ExpertCounts
from lkq_hf.quantization.solve import SolverSettings, resolve_group_size
from lkq_hf.quantization.weight import QuantizedWeight
from lkq_hf.runs import Run

# No layer's name: names of weights have no space.
_EXPERTS = "tokens of experts"


def walk_arguments(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    tokens: Tensor,
    settings: SolverSettings,
    true_sequential: bool,
    batch_size: int,
) -> dict[str, Any]:
    """All that a walk's result depends on, except the weights, which are checked block by block."""
    samples, length = tokens.shape
    return {
        **asdict(settings),
        "num_samples": samples,
        "model_seqlen": length,
        "batch_size": batch_size,
        "true_sequential": true_sequential,
        "model": type(model).__name__,
        "dtype": str(model.dtype),
        "layers": {
            weight_name: list(weight.shape)
            for name, layer in layers.items()
            for weight_name, weight in weights_of(name, layer).items()
        },
        "calibration tokens": digest(tokens.cpu())[:16],
    }


class FinishedBlocks:
    """The run of a walk: one safetensors file for each finished block.

    Args:
        directory: `None` keeps nothing.
        arguments: of the walk (`walk_arguments`).
        settings: of the walk.
        writes: whether this process writes; others only read.

    Raises:
        ValueError: the directory holds another walk's blocks, or blocks without a note of their walk (`Run`).
    """

    def __init__(
        self, directory: str | Path | None, arguments: dict[str, Any], settings: SolverSettings, writes: bool = True
    ) -> None:
        self._run = Run(directory, arguments, "block-*.safetensors", writes)
        self.settings = settings

    def checksums(self, weights: dict[str, Tensor]) -> dict[str, str]:
        """The SHA-256 of each weight of a block, by name; none where nothing is kept."""
        sums: dict[str, str] = {}
        if self._run.directory is None:
            return sums
        for name, weight in weights.items():
            stored = weight.detach().cpu().contiguous()
            sums[name] = hashlib.sha256(stored.view(torch.uint8).numpy().data).hexdigest()
        return sums

    def write(
        self,
        index: int,
        checksums: dict[str, str],
        weights: dict[str, QuantizedWeight],
        experts: dict[str, ExpertCounts],
    ) -> None:
        """Keeps a block: its quantized weights, the checksums of what they were made from, and on how many tokens its
        experts were calibrated."""
        counts = {name: count.to_dict() for name, count in experts.items()}
        metadata = {**checksums, **({_EXPERTS: json.dumps(counts)} if counts else {})}
        self._run.write(_name(index), _writer(weights, metadata))

    def read(
        self, index: int, checksums: dict[str, str], bits: dict[str, int]
    ) -> tuple[dict[str, QuantizedWeight], dict[str, ExpertCounts]] | None:
        """A block finished earlier, or `None`.

        Args:
            index: of the block.
            checksums: of the base weights.
            bits: of each weight.

        Raises:
            ValueError: it was made from other base weights, or is damaged.
        """
        if _name(index) not in self._run:
            return None
        metadata, tensors = self._run.read(_name(index), _read)
        counts = json.loads(metadata.pop(_EXPERTS, "{}"))
        if metadata != checksums:
            raise ValueError(
                f"{self._run.directory}/{_name(index)} was made from other base weights; delete its directory or name "
                "another one"
            )
        weights = {name: self._weight(tensors, name, bits[name]) for name in checksums}
        return weights, {name: ExpertCounts(**count) for name, count in counts.items()}

    def _weight(self, tensors: dict[str, Tensor], name: str, bits: int) -> QuantizedWeight:
        integers = tensors[f"{name}.integers"].to(torch.int32)
        return QuantizedWeight(
            integers=integers,
            scales=tensors[f"{name}.scales"],
            zeros=tensors[f"{name}.zeros"].to(torch.int32),
            bits=bits,
            group_size=resolve_group_size(integers.shape[1], self.settings.group_size),
            sym=self.settings.sym,
        )


def _name(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def _writer(weights: dict[str, QuantizedWeight], metadata: dict[str, str]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            tensors[f"{name}.integers"] = weight.integers.to(torch.uint8).cpu().contiguous()
            tensors[f"{name}.zeros"] = weight.zeros.to(torch.uint8).cpu().contiguous()
            tensors[f"{name}.scales"] = weight.scales.cpu().contiguous()
        save_file(tensors, path, metadata=metadata)

    return write


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
