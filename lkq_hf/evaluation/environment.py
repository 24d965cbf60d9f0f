"""What a measurement ran on and what it read, for its results file."""

import hashlib
import os
import platform
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lkq_hf

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "evaluate", "datasets")

_OF_A_MODEL = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def environment(device: torch.device, num_processes: int = 1) -> dict[str, Any]:
    """Versions and hardware, as JSON."""
    versions = {"python": platform.python_version(), "lkq-hf": lkq_hf.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    hardware: dict[str, Any] = {"device": device.type, "processes": num_processes}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        versions["cuda"] = str(torch.version.cuda)
    else:
        hardware |= {"name": platform.machine(), "threads": torch.get_num_threads()}
    return {"versions": versions, "hardware": hardware}


def digests(paths: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """SHA-256 of files, and of the weights, configuration and tokenizer in directories of models and adapters.

    Nothing for what is not here (an id on the Hub).
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += [each for each in sorted(path.iterdir()) if each.suffix in _OF_A_MODEL and each.name[0] != "."]
        else:
            files.append(path)
    files = [file for file in files if file.is_file()]
    with ThreadPoolExecutor() as pool:
        return dict(zip(map(str, files), pool.map(_sha256, files), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
