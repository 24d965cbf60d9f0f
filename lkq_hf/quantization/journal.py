"""What a calibration walk has finished, on disk, so that a killed run goes on where it stopped."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lkq_hf.files import note_changes, read_json, write_atomically, write_json
from lkq_hf.quantization.blocks import weights_of
from lkq_hf.quantization.expert_solver import ExpertCounts
from lkq_hf.quantization.solve import SolverSettings, resolve_group_size
from lkq_hf.quantization.weight import QuantizedWeight

NOTE = "walk.json"
"""Name of the file that says of which walk the blocks beside it are."""

# No layer's name: names of weights have no space.
_EXPERTS = "tokens of experts"


def walk_fingerprint(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    tokens: Tensor,
    settings: SolverSettings,
    true_sequential: bool,
    batch_size: int,
) -> dict[str, Any]:
    """Everything a walk's result depends on, except the weights, which are checked block by block.

    Returns:
        `"fingerprint"`, a digest of all of it, and `"settings"`, by which a user can tell two walks apart.
    """
    contents: dict[str, Any] = {
        "model": type(model).__name__,
        "dtype": str(model.dtype),
        "layers": {
            weight_name: list(weight.shape)
            for name, layer in layers.items()
            for weight_name, weight in weights_of(name, layer).items()
        },
        "tokens": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest(),
        "settings": _settings_note(settings),
        "true_sequential": true_sequential,
        "batch_size": batch_size,
    }
    samples, length = tokens.shape
    settings_of_user = {
        **contents["settings"],
        "num_samples": samples,
        "model_seqlen": length,
        **{name: contents[name] for name in ("batch_size", "true_sequential", "model", "dtype")},
        "number of layers": len(layers),
        "calibration tokens": contents["tokens"][:12],
    }
    # As JSON makes it: tuples become lists.
    return json.loads(json.dumps({"fingerprint": _digest(contents), "settings": settings_of_user}))


def _settings_note(settings: SolverSettings) -> dict[str, Any]:
    note = asdict(settings)
    if not settings.layer_bits:
        del note["layer_bits"]  # of which earlier versions knew nothing
    return note


def _digest(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


class Journal:
    """Finished blocks, one safetensors file each, written whole or not at all.

    Args:
        directory: created with the first block; `None` for a journal that keeps nothing.
        fingerprint: of this walk (`walk_fingerprint`).
        settings: of this walk.
        writes: whether this process writes; others only read.

    Raises:
        ValueError: the directory holds another walk's blocks, or blocks without a note of their walk.
    """

    def __init__(
        self, directory: str | Path | None, fingerprint: dict[str, Any], settings: SolverSettings, writes: bool = True
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.settings = settings
        self.writes = writes
        self.fingerprint = fingerprint
        if self.directory is None:
            return
        note = self.directory / NOTE
        if note.exists() and (found := read_json(note))["fingerprint"] != fingerprint["fingerprint"]:
            # Earlier versions noted nothing but the digest.
            changes = note_changes(found["settings"], fingerprint["settings"]) if "settings" in found else []
            which = f" ({'; '.join(changes)})" if changes else ""
            raise ValueError(
                f"{self.directory} holds blocks of a quantization with other settings, calibration tokens or model"
                f"{which}. The same ones go on with it; for others, delete it or name another directory"
            )
        if not note.exists() and next(self.directory.glob("block-*"), None) is not None:
            raise ValueError(
                f"{self.directory} holds blocks of a quantization but no {note.name} that says of which; delete it or "
                "name another directory"
            )

    def _path(self, index: int) -> Path | None:
        return None if self.directory is None else self.directory / f"block-{index:05d}.safetensors"

    def checksums(self, weights: dict[str, Tensor]) -> dict[str, str]:
        """The SHA-256 of each weight of a block, by name; none for a journal that keeps nothing."""
        sums: dict[str, str] = {}
        if self.directory is None:
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
        """Keeps a finished block: its quantized weights, the checksums of what they were made from, and on how many
        tokens its experts were calibrated."""
        path = self._path(index)
        if path is None or not self.writes:
            return
        tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            tensors[f"{name}.integers"] = weight.integers.to(torch.uint8).cpu().contiguous()
            tensors[f"{name}.zeros"] = weight.zeros.to(torch.uint8).cpu().contiguous()
            tensors[f"{name}.scales"] = weight.scales.cpu().contiguous()
        note = path.with_name(NOTE)
        if not note.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, self.fingerprint)
        counts = {name: count.to_dict() for name, count in experts.items()}
        metadata = {**checksums, **({_EXPERTS: json.dumps(counts)} if counts else {})}
        write_atomically(path, lambda partial: save_file(tensors, partial, metadata=metadata))

    def read(
        self, index: int, checksums: dict[str, str], bits: dict[str, int]
    ) -> tuple[dict[str, QuantizedWeight], dict[str, ExpertCounts]] | None:
        """A block finished earlier, or `None`.

        Args:
            checksums: of the base weights.
            bits: of each weight.

        Raises:
            ValueError: it was made from other base weights, or is damaged.
        """
        path = self._path(index)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                counts = json.loads(metadata.pop(_EXPERTS, "{}"))
                if metadata != checksums:
                    raise ValueError(
                        f"{path} was made from other base weights; delete its directory or name another one"
                    )
                weights = {name: self._weight(file, name, bits[name]) for name in checksums}
                return weights, {name: ExpertCounts(**count) for name, count in counts.items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and the run makes it again") from error

    def _weight(self, file: Any, name: str, bits: int) -> QuantizedWeight:
        integers = file.get_tensor(f"{name}.integers").to(torch.int32)
        return QuantizedWeight(
            integers=integers,
            scales=file.get_tensor(f"{name}.scales"),
            zeros=file.get_tensor(f"{name}.zeros").to(torch.int32),
            bits=bits,
            group_size=resolve_group_size(integers.shape[1], self.settings.group_size),
            sym=self.settings.sym,
        )
