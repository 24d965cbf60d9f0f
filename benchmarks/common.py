"""What measuring scripts share: arguments, results files, models, the description of the machine, timing."""

import argparse
import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import get_peft_model
from real_models import GEMMA3_NAME, SMOLLM2_NAME, gemma3_directory, smollm2_directory
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lkq_hf import LookaheadKVConfig, prepare_model_for_eviction
from lkq_hf.compat import pass_cache
from lkq_hf.files import write_json
from lkq_hf.text.documents import read_documents

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = ("lkq-hf", "torch", "triton", "transformers", "peft")
MODELS: dict[str, Callable[[], Path]] = {"smollm2": smollm2_directory, "gemma3": gemma3_directory}
"""Real models from PyPI packages, by short name."""
NAMES = {"smollm2": SMOLLM2_NAME, "gemma3": GEMMA3_NAME}
"""The names under which the Hub knows them."""

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
SMALL = LLAMA_8B | {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
"""For smoke runs on any machine."""

QWEN35_9B: dict[str, Any] = {
    "model_type": "qwen3_5_text", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320,
    "max_position_embeddings": 262144,
}  # fmt: skip
"""Qwen3.5 of 9B: every fourth layer has full attention, the others are recurrent."""
SMALL_HYBRID = QWEN35_9B | {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "vocab_size": 256,
}  # fmt: skip

SIZES = {"llama": (LLAMA_8B, SMALL), "hybrid": (QWEN35_9B, SMALL_HYBRID)}
"""Each kind of model, and a small one for smoke runs."""

L2_BYTES = 256 * 2**20
"""What the data of timed calls together should exceed: five times the L2 cache of an H200."""


# Arguments and results


def parser(doc: str | None, out: Path | None = None, required: bool = True) -> argparse.ArgumentParser:
    """With the script's docstring as help, and ``--out``: required where there is no default."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=out, required=required and out is None)
    return made


def settings(arguments: argparse.Namespace, *without: str) -> dict[str, Any]:
    """Arguments for a results file: no paths, which say nothing elsewhere."""
    found = {name: value for name, value in vars(arguments).items() if name not in without}
    return {name: value for name, value in found.items() if isinstance(value, bool | int | float | str | list)
            and not (isinstance(value, list) and any(isinstance(each, Path) for each in value))}  # fmt: skip


def save(path: Path | None, results: Any) -> None:
    """Writes a results file, whole; None writes nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.with_suffix(".json"), results)


def measure_all(cells: Mapping[str, Callable[[], Any]], rows: dict[str, Any], path: Path | None, results: Any) -> None:
    """Measures cells one by one into ``rows``, a part of the results; each is printed and written when it is done."""
    for name, measure in cells.items():
        rows[name] = measure()
        print(name, json.dumps(rows[name]), flush=True)
        save(path, results)


# Models


def real_model(
    name: str = "smollm2", adapter: str | Path | None = None, device: str = DEVICE, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """A model and its tokenizer, ready for eviction: bfloat16 on a GPU and float32 on a CPU unless it is said.

    Args:
        name: a short name, or a directory.
        adapter: directory of a LOOKAHEAD_KV adapter.
    """
    directory = MODELS[name]() if name in MODELS else Path(name)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    if adapter is not None:
        model.load_adapter(str(adapter))
    prepare_model_for_eviction(model)
    return model, AutoTokenizer.from_pretrained(directory)


def random_models(sizes: Mapping[str, Any], **adapter: Any) -> tuple[Any, Any]:
    """A model with random weights, and the same weights under an adapter; both in bfloat16, ready for eviction."""
    torch.manual_seed(0)
    with torch.inference_mode(False), torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=torch.bfloat16).eval()
        shared = {id(parameter): parameter for parameter in model.parameters()}
        adapted = copy.deepcopy(model, shared)  # type: ignore[arg-type]
        get_peft_model(adapted, LookaheadKVConfig(**adapter))
    for each in (model, adapted):
        each.generation_config.eos_token_id = None
        each.generation_config.pad_token_id = 0
        each.requires_grad_(False)
        prepare_model_for_eviction(each)
    return model, adapted.eval()


def answer(model: Any, ids: torch.Tensor, cache: Any, tokens: int, **options: Any) -> torch.Tensor:
    """Ids with a greedy answer; ``options`` are those of ``generate``."""
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False} | pass_cache(cache) | options
    return model.generate(ids, max_new_tokens=tokens, **given)


def documents_of(texts: Sequence[Path] | None) -> list[dict[str, Any]]:
    """Those of some files, or Python's language reference."""
    return read_documents(texts) if texts else [{"document": name, "text": text} for name, text in topics.items()]


# The machine, and time


def describe() -> dict[str, Any]:
    """What a script runs on, for its results file."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "source tree"
    if not torch.cuda.is_available():
        return {"cpu": platform.machine(), "threads": torch.get_num_threads(), "versions": versions}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "copy_bandwidth_tb_s": round(copy_bandwidth() / 1e12, 3),
        "versions": versions,
    }


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call on the GPU, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * source.numel() / (sorted(times)[5] / 1e3)


def microseconds(calls: list[Callable[[], object]], repeats: int = 7, graph: bool = True) -> float:
    """Median time of one call, with all calls captured in one CUDA graph; without, the host launches each."""

    def run() -> None:
        for call in calls:
            call()

    for call in calls[:2]:
        call()
    synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
    run()
    return statistics.median(milliseconds(run) for _ in range(repeats)) * 1e3 / len(calls)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def check(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.02) -> None:
    """A wrong result is not worth timing.

    Raises:
        ValueError: the largest error exceeds ``tolerance`` times the largest value.
    """
    error = ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    if not error < tolerance:
        raise ValueError(f"{name}: wrong result, largest error {error:.3g} of the largest value")


def free_memory() -> None:
    """Also forgets what was compiled: each cell compiles for its own shapes, as in a process of its own."""
    gc.collect()
    torch.compiler.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def seconds_of(operation: Callable[[], Any], repeats: int, warm_up: int = 1) -> tuple[list[float], Any]:
    """Seconds of each run, after some that compile and allocate, and the last result."""
    for _ in range(warm_up):
        operation()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        result = operation()
        synchronize()
        times.append(time.perf_counter() - start)
    return times, result
