"""One page and one picture out of the speed benchmarks' result files.

    python benchmarks/speed_report.py

Reads what there is of decode_speed.json, eviction_overhead.json, quantized_matmul.json and quantization_speed.json in
benchmarks/results, and writes speed.md beside them and docs/images/speed.png.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tables import table

from lkq_hf.evaluation.plots import new_figure

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "speed.png"
EARLIER = "Rows with * are from an earlier run on the same kind of machine."
NOISE = 1  # per cent of a prefill
COMMANDS = {
    "decode_speed": "python benchmarks/decode_speed.py --quantized 4 --batches 1 16 --minutes 9",
    "eviction_overhead": "python benchmarks/eviction_overhead.py",
    "quantized_matmul": "python benchmarks/quantized_matmul.py --out benchmarks/results/quantized_matmul.json",
    "quantization_speed": "python benchmarks/quantization_speed.py --out benchmarks/results/quantization_speed.json",
}


def load(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def versions(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def machine(hardware: dict[str, Any]) -> str:
    return f"{hardware['gpu']}, {versions(hardware['versions'])}"


def section(name: str, title: str, hardware: str, *parts: str | None) -> str:
    """What is None is left out."""
    return "\n\n".join([f"## {title}", f"{hardware}. `{COMMANDS[name]}`", *filter(None, parts)])


def marked(name: str, row: dict[str, Any]) -> str:
    return f"{name} *" if row.get("earlier") else name


def remark(rows: Iterable[dict[str, Any]]) -> str | None:
    """Says what the mark means, if there is one."""
    return EARLIER if any(row.get("earlier") for row in rows) else None


def aims(rows: Iterable[tuple[str, str, float, float | None]]) -> str:
    """A table of what was aimed at, "at least" or "at most" some number, and what was measured: None where noise hides
    it."""

    def measured(sense: str, bound: float, value: float | None) -> tuple[str, str]:
        if value is None:
            return "", "lost in noise"
        reached = value >= bound if sense == "at least" else value <= bound
        return f"{value:.2f}".rstrip("0").rstrip("."), "yes" if reached else "no"

    return table(
        ["aim", "", "measured", "reached"],
        [[what, f"{sense} {bound}", *measured(sense, bound, value)] for what, sense, bound, value in rows],
    )


def decode(results: dict[str, Any]) -> str:
    sizes, hardware = results["sizes"], results["hardware"]
    rows = [
        [
            cell["weights"],
            str(cell["batch"]),
            marked(cell["cache"], cell),
            *(
                [cell["error"], "", "", "", ""]
                if "error" in cell
                else [
                    f"{cell['tokens_per_second']:.1f}",
                    f"{cell['ms_per_step']:.2f}",
                    "{:.1f} to {:.1f}".format(*cell["ms_per_step_p10_p90"]),
                    f"{cell['cache_gib']:.2f}",
                    f"{cell['peak_gib']:.1f}",
                ]
            ),
        ]
        for cell in results["cells"]
    ]
    header = ["weights", "batch", "cache", "tokens/s", "ms a step", "10 to 90 %", "cache, GiB", "peak, GiB"]
    speed = {
        (cell["weights"], cell["batch"], cell["cache"]): cell["tokens_per_second"]
        for cell in results["cells"]
        if "error" not in cell
    }
    path = (1, "snapkv, static")
    aimed = []
    for weights, other, aim in (
        ("bf16", ("bf16", 1, "dynamic"), 3),
        ("bf16", ("bf16", 1, "static, short prompt"), 1),
        ("W4", ("bf16", *path), 2),
    ):
        if (weights, *path) in speed and other in speed:
            ratio = speed[weights, *path] / speed[other]
            title = f"{weights}, {path[1]}: tokens/s, times those of {other[0]}, {other[2]}"
            aimed.append((title, "at least", aim, ratio))
    return section(
        "decode_speed",
        f"Decoding after a prompt of {sizes['prompt']:,} tokens, {sizes['budget']:,} entries kept",
        f"8B Llama, random weights, through `generate`; {machine(hardware)}",
        table(header, rows),
        remark(results["cells"]),
        aims(aimed),
    )


def eviction(results: dict[str, Any]) -> str:
    hardware = results["hardware"]
    kernels = [
        [
            f"{row['length']:,}",
            f"{row['scoring_us']:.0f}",
            f"{row['selection_us']:.0f}",
            f"{row['plain_torch_us']:.0f}",
            f"{row['one_read_of_keys_us']:.1f}",
            f"{100 * row['scoring_share_of_copy_bandwidth_counting_two_reads']:.0f}",
        ]
        for row in results["kernels"]
    ]
    prefills = [
        [
            row["model"],
            str(row["batch"]),
            f"{row['length']:,}",
            marked(row["method"], row),
            str(row["runs"]),
            f"{row['ms']:.1f}",
            f"{row['overhead_ms']:.1f}",
            f"{row['overhead_percent']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{row['peak_saved_of_full_kv_percent']:.1f}",
        ]
        for row in results["prefill"]
    ]
    return section(
        "eviction_overhead",
        "Eviction",
        f"Random weights, budget 128, 32 lookahead tokens; {machine(hardware)}",
        "One layer of Llama-3.1-8B, microseconds on the GPU. The keys are read twice; the last column counts both "
        "reads.",
        table(
            ["prompt", "scores", "selection", "both in plain torch", "one read of the keys", "% of copy bandwidth"],
            kernels,
        ),
        'Whole prefills. "full + 32" reads a prompt longer by the 32 lookahead tokens, without eviction. The last '
        "column is the peak memory saved, in % of the full KV cache.",
        table(
            ["model", "batch", "prompt", "method", "runs", "ms", "over full, ms", "%", "peak, GiB", "saved, %"],
            prefills,
        ),
        remark(results["prefill"]),
        f"Differences below about {NOISE} % are noise; some are negative.",
        aims(eviction_aims(results)),
    )


def eviction_aims(results: dict[str, Any]) -> Iterable[tuple[str, str, float, float | None]]:
    rows = {(row["model"], row["batch"], row["length"], row["method"]): row for row in results["prefill"]}
    for model, batch, length, most in (
        ("Llama-3.1-8B", 1, 8192, 1.5),
        ("Llama-3.1-8B", 1, 32_768, 0.5),
        ("SmolLM2-135M", 8, 8192, 5),
    ):
        if row := rows.get((model, batch, length, "lookahead")):
            yield f"{model}, {batch} x {length:,}: overhead, %", "at most", most, row["overhead_percent"]
    for (model, batch, length, method), row in rows.items():
        if method == "laq":
            told = rows[model, batch, length, "lookahead"]["overhead_percent"] > NOISE
            found = row["times_the_overhead_of_lookahead"] if told else None
            yield f"{model}, {batch} x {length:,}: laq's overhead, times lookahead's", "at least", 14.5, found
    if row := rows.get(("SmolLM2-135M", 1, 8192, "lookahead")):
        yield "SmolLM2-135M, 1 x 8,192: ms", "at most", 35, row["ms"]
    if row := rows.get(("Llama-3.1-8B", 1, 131_072, "lookahead")):
        found = row["peak_saved_of_full_kv_percent"]
        yield "Llama-3.1-8B, 1 x 131,072: peak memory saved, %", "at least", 90, found
    for row in results["kernels"]:
        found = 100 * row["scoring_share_of_copy_bandwidth_counting_two_reads"]
        yield f"scores, {row['length']:,}: % of copy bandwidth", "at least", 50, found


def matmul(results: dict[str, Any]) -> str:
    peers = sorted({key for row in results["results"] for key in row if key.endswith("_us") and key != "cublas_us"})
    rows = [
        [
            marked(f"W{row['bits']}", row),
            f"{row['out_features']} x {row['in_features']}",
            str(row["rows"]),
            f"{row['us']:.1f}",
            f"{row['cublas_us']:.1f}",
            f"{row['speedup']:.2f}",
            f"{100 * row['share_of_copy_bandwidth']:.0f}",
            *(f"{row[peer]:.1f}" if peer in row else "" for peer in peers),
        ]
        for row in results["results"]
    ]
    hardware, first = results["hardware"], results["results"][0]
    kind = f"groups of {first['group_size']}, {'symmetric' if first['sym'] else 'asymmetric'}, {first['dtype']}"
    return section(
        "quantized_matmul",
        "Low-bit matrix products",
        f"Shapes of Llama-3.1-8B, {kind}; {machine(hardware)}",
        "Microseconds in a CUDA graph of one product after the other, weights from memory; which kernel and tile is "
        "the fastest was found with a small kernel between the products, as in models. Copy bandwidth: "
        f"{hardware['copy_bandwidth_tb_s']:.2f} TB/s.",
        table(
            [
                *("weights", "out x in", "rows", "us", "bf16 cuBLAS, us", "times bf16", "% of copy"),
                *(f"{peer.removesuffix('_us')}, us" for peer in peers),
            ],
            rows,
        ),
        remark(results["results"]),
        aims(matmul_aims(results["results"])),
    )


def matmul_aims(rows: list[dict[str, Any]]) -> Iterable[tuple[str, str, float, float | None]]:
    """Of the two largest shapes; the worse one counts."""
    large = [row for row in rows if row["out_features"] * row["in_features"] >= 14336 * 4096]

    def worst(measure: str, bits: int, count: int) -> float | None:
        return min((row[measure] for row in large if (row["bits"], row["rows"]) == (bits, count)), default=None)

    share = worst("share_of_copy_bandwidth", 4, 1)
    if share is not None:
        yield "W4, 1 row: % of copy bandwidth", "at least", 70, 100 * share
    for bits, count, aim in ((4, 1, 2.8), (3, 1, 3.3), (2, 1, 4.2), (4, 16, 2.0)):
        found = worst("speedup", bits, count)
        if found is not None:
            yield f"W{bits}, {count} row{'s' * (count > 1)}: times bf16", "at least", aim, found
    slowest = min(row["speedup"] for row in rows)
    yield "any row of the table: times bf16", "at least", 1, slowest


def quantization(results: dict[str, Any]) -> str:
    compared = None
    if other := results.get("float32_inputs"):
        compared = (
            f"Calibration inputs are bfloat16. With float32 ones the moments took {other['hessian_seconds']} + "
            f"{other['deviation_seconds']} s and plain GPTQ {other['plain_gptq_seconds']} s, of which the two stages "
            f"were {other['two_stages_percent']} %: their share grew since all else became faster, not they slower."
        )
    steps = list(results["model_seconds"])
    rows = [
        [name, *(f"{1000 * seconds[step]:.0f}" for step in steps)]
        for name, seconds in results["layers_seconds"].items()
    ]
    rows.append(["whole model, s", *(f"{results['model_seconds'][step]:.1f}" for step in steps)])
    found = results["summary_seconds"]
    summary = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found.items())
    share, minutes = 100 * found["two stages"] / found["plain GPTQ"], found["default method"] / 60
    settings = results["settings"]
    return section(
        "quantization_speed",
        "Quantizing Llama-3.1-8B: arithmetic",
        f"{settings['bits']} bits, groups of {settings['group_size']}, {settings['tokens']:,} calibration tokens, "
        f"{settings['sweeps']} sweeps; {results['hardware']}, {versions(results['versions'])}",
        f"Milliseconds per layer, without forward passes and loading. Whole model: {summary}.",
        table(["layer", *steps], rows),
        aims(
            [
                ("the default method, minutes", "at most", 6, minutes),
                ("the two stages, % of plain GPTQ", "at most", 15, share),
            ]
        ),
        compared,
    )


def draw(found: dict[str, Any]) -> Any:
    """Times bf16's speed by activation rows, for the two largest shapes."""
    results = found["quantized_matmul"]["results"]
    figure = new_figure(8.6, 3.5)
    shapes = [(14336, 4096), (4096, 14336)]
    for panel, shape in zip(figure.subplots(1, 2, sharey=True), shapes, strict=True):
        for bits, marker in ((4, "o"), (3, "s"), (2, "^")):
            points = {
                row["rows"]: row["speedup"]
                for row in results
                if row["bits"] == bits and (row["out_features"], row["in_features"]) == shape
            }
            if points:
                panel.plot(points.keys(), points.values(), marker=marker, label=f"W{bits}")
        panel.axhline(1, color="0.5", linewidth=1, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_title(f"{shape[0]} x {shape[1]}")
        panel.set_xlabel("activation rows")
    figure.axes[0].set_ylabel("times the speed of bf16 cuBLAS")
    figure.axes[0].legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    sections = {
        "decode_speed": decode,
        "eviction_overhead": eviction,
        "quantized_matmul": matmul,
        "quantization_speed": quantization,
    }
    found = {name: results for name in sections if (results := load(name)) is not None}
    page = ["# Speed", "Written by `python benchmarks/speed_report.py` from the JSON files beside it; do not edit."]
    page += [sections[name](results) for name, results in found.items()]
    (RESULTS / "speed.md").write_text("\n\n".join(page) + "\n")
    if "quantized_matmul" in found:
        draw(found).savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
