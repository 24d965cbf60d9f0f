"""What a measurement ran on and what it read, for its results file."""

import hashlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lkq_hf

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "evaluate", "datasets")


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
    """SHA-256 of files, and of the weights in directories; nothing for what is not here (an id on the Hub)."""
    found = {}
    for path in map(Path, paths):
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found
