"""What a directory holds that can be shared."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.utils import filter_repo_objects

from lkq_hf.files import read_json
from lkq_hf.formats import PEFT_TYPE, QUANT_METHOD, RECIPE

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS, MODEL_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

QUANT_METHODS = {QUANT_METHOD: "lkq-hf", "gptq": "GPTQ", "compressed-tensors": "compressed-tensors"}
"""Formats of quantized checkpoints that we write, and their names."""

NOT_SHARED = [".*", "*/.*", "checkpoints/*", "runs/*", "__pycache__/*"]
"""What stays at home: a trainer's state, logs, and hidden files."""


@dataclass(frozen=True)
class Contents:
    """A directory with a LOOKAHEAD_KV adapter, a quantized checkpoint, or both.

    Args:
        directory: the directory.
        adapter: its adapter_config.json, if it holds an adapter.
        checkpoint: its config.json, if it holds a quantized checkpoint.
    """

    directory: Path
    adapter: dict[str, Any] | None
    checkpoint: dict[str, Any] | None

    @property
    def quantization(self) -> dict[str, Any]:
        """The ``quantization_config`` of the checkpoint."""
        return (self.checkpoint or {}).get("quantization_config") or {}

    @property
    def recipe(self) -> dict[str, Any]:
        """Where the checkpoint comes from: the ``meta`` of its quantization."""
        return self.quantization.get("meta") or (self.checkpoint or {}).get(RECIPE) or {}

    @property
    def base_model(self) -> str | None:
        """Name of the model that the contents were made from, as they record it."""
        if self.checkpoint is not None:
            return self.recipe.get("base_model")
        return (self.adapter or {}).get("base_model_name_or_path")

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files of the adapter and the checkpoint.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: the checkpoint's index cannot be read.
        """
        names = []
        if self.adapter is not None:
            names.append(ADAPTER_WEIGHTS)
        if self.checkpoint is not None:
            index = self.directory / MODEL_INDEX
            if (self.directory / MODEL_WEIGHTS).is_file() or not index.is_file():
                names.append(MODEL_WEIGHTS)
            else:
                names += sorted(set(read_json(index)["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{self.directory / MODEL_INDEX} names files outside of its directory: {outside[0]}")
        if missing := [name for name in names if not (self.directory / name).is_file()]:
            raise FileNotFoundError(
                f"{self.directory} is not complete: it should hold {', '.join(missing)}; save it again"
            )
        return [self.directory / name for name in names]

    def shared_files(self) -> list[str]:
        """Paths in the directory of everything that a push uploads."""
        found = (path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*") if path.is_file())
        return sorted(filter_repo_objects(found, ignore_patterns=NOT_SHARED))


def read_contents(directory: str | Path) -> Contents:
    """Finds out what a directory holds.

    Raises:
        NotADirectoryError: no such directory.
        ValueError: it holds neither a LOOKAHEAD_KV adapter nor a quantized checkpoint.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory")
    configs = [directory / ADAPTER_CONFIG, directory / MODEL_CONFIG]
    adapter, model = (read_json(path) if path.is_file() else None for path in configs)
    if adapter is not None and adapter.get("peft_type") != PEFT_TYPE:
        raise ValueError(
            f"{directory} holds an adapter of type {adapter.get('peft_type')}, expected {PEFT_TYPE}; share it with "
            "PEFT's own push_to_hub"
        )
    method = ((model or {}).get("quantization_config") or {}).get("quant_method")
    checkpoint = model if method in QUANT_METHODS else None
    if adapter is None and checkpoint is None:
        found = f"a model with quant_method {method!r}" if model is not None else "neither"
        raise ValueError(
            f"{directory} should hold a {PEFT_TYPE} adapter ({ADAPTER_CONFIG}) or a quantized checkpoint "
            f"({MODEL_CONFIG} with quant_method {', '.join(QUANT_METHODS)}); found {found}"
        )
    return Contents(directory, adapter, checkpoint)
