"""Where the time of one decode step goes, kernel by kernel: an 8B Llama with random weights on one CUDA GPU.

    python benchmarks/decode_profile.py                       # bf16, and packed 4-bit weights
    python benchmarks/decode_profile.py --weights bf16 --own-loop      # transformers' own loop
    python benchmarks/decode_profile.py --small               # a smoke run on any machine, of operators of the CPU

LookaheadCache(max_new_tokens=...) after a prompt, as in decode_speed.py. One answer is timed. Another one is recorded
by torch.profiler, of which all but the first steps count. For each group of kernels: launches and microseconds in a
step, and the share of the step. "host" is the time in which no kernel runs: what is launched too late, and the gaps
between kernels of a graph.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from common import DEVICE, LLAMA_8B, SMALL, copy_bandwidth, describe, free_memory, parser, random_models, save
from decode_speed import METHODS, Sizes, filled_cache, generate, quantize_at_random
from tables import RESULTS
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lkq_hf.evaluation.prefill import cache_bytes

TO_SKIP = 4  # steps that compile, record and fill the queue
LONGEST = 20  # kernels listed by name

# Parts of kernels' names, in the order in which they decide. Products before others: epilogues are fused into them.
GROUPS = {
    "products": ("gemm", "gemv", "_rows_kernel", "cutlass", "nvjet", "splitk", "split_sum", "dot_kernel", "_mm",
                 "addmm", "::mm"),
    "attention": ("_attend_kernel", "_combine_kernel", "flash", "fmha", "scaled_dot", "attention"),
    "copies": ("memcpy", "memset"),
    "token choice": ("argmax", "arg_max", "softmax", "sort", "topk", "cumsum", "exponential", "distribution"),
    "norms, rotary, elementwise": (  # and masks
        "triton_", "elementwise", "reduce", "index", "cat", "scatter", "gather", "copy", "fill", "arange",
    ),
}  # fmt: skip


class Kernel(NamedTuple):
    name: str
    start: float  # microseconds
    end: float


def main() -> None:
    made = parser(__doc__, RESULTS / "decode_profile.json")
    made.add_argument("--small", action="store_true", help="a tiny model and a short prompt, on any device")
    made.add_argument("--weights", nargs="+", default=["bf16", "W4"], help="bf16 first, W2, W3, W4 or W8 after it")
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--prompt", type=int, default=32_768, help="tokens")
    made.add_argument("--budget", type=int, default=1024, help="entries kept")
    made.add_argument("--own-loop", action="store_true", help="transformers' own loop")
    options = made.parse_args()
    if DEVICE == "cpu" and not options.small:
        made.error("this benchmark needs a CUDA GPU, and torch finds none; --small runs anywhere")
    sizes = Sizes(options.prompt, options.budget, 64, 64)
    if options.small:
        sizes = Sizes(256, 32, 12, 12)
    model, _ = random_models(SMALL if options.small else LLAMA_8B)
    results: dict[str, Any] = {"hardware": describe(), "sizes": vars(sizes), "batch": options.batch, "steps": {}}
    for weights in options.weights:
        if weights != "bf16":
            quantize_at_random(model, int(weights.removeprefix("W")))
        results["steps"][weights] = measure(model, options, sizes)
        print(f"\n{weights}\n{table(results['steps'][weights])}", flush=True)
        save(options.out, results)
        free_memory()


def measure(model: Any, options: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """One cell of the results."""
    method = METHODS["snapkv, static, generate's loop" if options.own_loop else "snapkv, static"]

    def answer(tokens: int = sizes.tokens) -> list[float]:
        return generate(model, method, filled_cache(model, method, options.batch, sizes), options.batch, tokens)[1]

    answer(2 * TO_SKIP)
    step = 1e3 * statistics.median(answer()[TO_SKIP:])
    activities = [ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU]
    cache = filled_cache(model, method, options.batch, sizes)
    with profile(activities=activities) as profiler:
        generate(model, method, cache, options.batch, sizes.tokens)
    steps = split(kernels(profiler.events()), sizes.tokens - 1)
    found = summary(steps, len(steps) if DEVICE == "cuda" else sizes.tokens, step)
    weights = sum(parameter.nbytes for parameter in {*model.parameters(), *model.buffers()})
    read = weights - model.get_input_embeddings().weight.nbytes + cache_bytes(cache)
    found["bytes_read"] = read
    found["bound_us"] = 1e6 * read / copy_bandwidth() if DEVICE == "cuda" else None
    return found


def kernels(events: Iterable[Any]) -> list[Kernel]:
    """Kernels and copies in the order of time; on a CPU, operators without those that they call."""
    if DEVICE == "cpu":
        return [Kernel(event.name, 0.0, event.self_cpu_time_total) for event in events]
    found = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def split(found: list[Kernel], steps: int) -> list[list[Kernel]]:
    """The kernels of each step that counts.

    A step ends when its token is copied to the host; what follows without a product belongs to it. A CPU copies
    nothing: its operators are one step.
    """
    parts: list[list[Kernel]] = [[]]
    for kernel in found:
        parts[-1].append(kernel)
        if "DtoH" in kernel.name:
            parts.append([])
    merged: list[list[Kernel]] = []
    for part in parts:
        if merged and not any(group_of(kernel) == "products" for kernel in part):
            merged[-1].extend(part)
        else:
            merged.append(part)
    return merged[-(steps - TO_SKIP) :]


def group_of(kernel: Kernel) -> str:
    name = kernel.name.lower()
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "others")


def groups_of(step: list[Kernel]) -> list[str]:
    """The group of each kernel; the last product of a step is that of the vocabulary."""
    groups = [group_of(kernel) for kernel in step]
    last = max((place for place, group in enumerate(groups) if group == "products"), default=None)
    if last is not None and len(step) > 1:
        groups[last] = "vocabulary"
    return groups


def covered(step: list[Kernel]) -> float:
    """Microseconds in which at least one kernel runs, in the order of time."""
    busy, end = 0.0, 0.0
    for kernel in step:
        busy += max(kernel.end - max(kernel.start, end), 0.0)
        end = max(end, kernel.end)
    return busy


def summary(steps: list[list[Kernel]], count: int, step: float) -> dict[str, Any]:
    """Means over the steps.

    Args:
        steps: their kernels.
        count: how many steps these are.
        step: microseconds of one, measured without the profiler.
    """
    launches: Counter[str] = Counter()
    times: Counter[str] = Counter()
    by_name: dict[tuple[str, str], Counter[str]] = {}
    for kernels_of_step in steps:
        for kernel, group in zip(kernels_of_step, groups_of(kernels_of_step), strict=True):
            launches[group] += 1
            times[group] += kernel.end - kernel.start
            counts = by_name.setdefault((group, kernel.name), Counter())
            counts["launches"] += 1
            counts["us"] += kernel.end - kernel.start
    busy = sum(covered(each) for each in steps) / count
    rows = [{"group": name, "launches": launches[name] / count, "us": times[name] / count} for name in times]
    rows.append({"group": "host", "launches": 0.0, "us": max(step - busy, 0.0)})
    longest = sorted(by_name.items(), key=lambda item: -item[1]["us"])[:LONGEST]
    return {
        "step_us": step,
        "busy_us": busy,
        "steps": count,
        "groups": sorted(rows, key=lambda row: -row["us"]),
        "kernels": [
            {"group": group, "name": name, **{key: value / count for key, value in counts.items()}}
            for (group, name), counts in longest
        ],
    }


def table(found: dict[str, Any]) -> str:
    lines = [f"{'group':<28}{'launches':>9}{'us':>10}{'share':>8}"]
    for row in found["groups"]:
        share = row["us"] / found["step_us"]
        lines.append(f"{row['group']:<28}{row['launches']:>9.1f}{row['us']:>10.1f}{share:>8.1%}")
    bound = "" if found["bound_us"] is None else f", bound by bytes {found['bound_us']:.0f} us"
    lines.append(f"{'a step':<37}{found['step_us']:>10.1f}{bound}\n")
    lines += [f"{row['us']:>9.1f} us {row['launches']:>6.1f} x {row['name'][:90]}" for row in found["kernels"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
