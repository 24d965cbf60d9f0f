"""Writes the measured numbers into the pages.

    python benchmarks/pages.py           # after new results
    python benchmarks/pages.py --check   # what `make test` asks

A page has places between ``<!-- results: NAME -->`` and ``<!-- end -->``. Each is filled by the function NAME below,
from the files in ``benchmarks/results``.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tables import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

BUDGETS = (64, 128, 256, 512)
OURS = "lookahead, adapter's pooling"
TURNS_BUDGET, TURNS_LENGTH = 256, "2048"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def hardware(name: str) -> str:
    """The device that a file of results is from."""
    results = load(name)
    return results["about"]["hardware"]["name"] if "about" in results else results["hardware"]["gpu"]


# Eviction: measurement, metric, whether it is shown in percent.
LIKELIHOOD = ("likelihood, 2048 tokens", "matched", "the full cache's answers: tokens predicted, %")
FACTS = (
    ("needle, 2048 tokens", "accuracy", "one fact in 2,048 tokens: found, %"),
    ("needle, 4096 tokens", "accuracy", "one fact in 4,096 tokens: found, %"),
    ("needle_multi_key, 2048 tokens", "accuracy", "one of four facts in 2,048 tokens: found, %"),
    ("needle_multi_key, 4096 tokens", "accuracy", "one of four facts in 4,096 tokens: found, %"),
)
WORDS = (
    (
        "agreement: paragraph_question, 2048 tokens",
        "word_f1",
        "questions over paragraphs: word F1 to the full cache, %",
    ),
    ("agreement: summarise, 2048 tokens", "word_f1", "summaries: word F1 to the full cache, %"),
)
ALLOCATIONS = ("eviction_quality", "eviction_quality_layer", "eviction_quality_uniform")


def _best(
    measurement: str, metric: str, budget: int, scorer: str, files: Iterable[str] = ALLOCATIONS, sign: int = 1
) -> float:
    """A scorer's best row, whatever its pooling and allocation; times ``sign``, where less is better."""
    return max(
        sign * row[metric]
        for name in files
        for key, row in load(name)["measurements"][measurement]["rows"].items()
        if key.startswith(f"{budget}/{scorer}")
    )


def _eviction(measured: Iterable[tuple[str, str, str]]) -> str:
    header = ["entries per KV head: 64 / 128 / 256 / 512", "full cache", "lookahead", "lookahead, uniform", "SnapKV",
              "sinks + recent", "oracle"]  # fmt: skip
    rows = []
    for measurement, metric, title in measured:
        columns = [
            [_best(measurement, metric, budget, scorer, files) for budget in BUDGETS]
            for scorer, files in (
                (OURS, ALLOCATIONS[:1]),
                (OURS, ALLOCATIONS[2:]),
                ("snapkv", ALLOCATIONS),
                ("sinks + recent", ALLOCATIONS),
                ("oracle", ALLOCATIONS[:1]),
            )
        ]
        full = load(ALLOCATIONS[0])["measurements"][measurement]["rows"]["full"].get(metric, 1.0)
        cells = [" / ".join(f"{100 * value:.0f}" for value in column) for column in columns]
        rows.append([title, f"{100 * full:.0f}", *cells])
    return table(header, rows)


def eviction_short() -> str:
    return _eviction([LIKELIHOOD, *FACTS[:3]])


def eviction() -> str:
    return _eviction([LIKELIHOOD, *FACTS, *WORDS])


def eviction_gap() -> str:
    """How much of the distance from the best SnapKV to the full cache is closed, in nats."""
    measurement = LIKELIHOOD[0]
    full = load(ALLOCATIONS[0])["measurements"][measurement]["rows"]["full"]["nll"]
    rows = []
    for name, title in ((ALLOCATIONS[0], "global"), (ALLOCATIONS[1], "layer"), (ALLOCATIONS[2], "uniform")):
        cells = []
        for budget in BUDGETS:
            snapkv = -_best(measurement, "nll", budget, "snapkv", sign=-1)
            own = load(name)["measurements"][measurement]["rows"][f"{budget}/{OURS}"]["nll"]
            cells.append(f"{100 * (snapkv - own) / (snapkv - full):.0f} %")
        rows.append([title, *cells])
    return table(["entries per KV head", *map(str, BUDGETS)], rows)


def conversations() -> str:
    found = load("conversations")
    caches = found["lengths"][TURNS_LENGTH]
    full = caches["full cache"]["right"]
    rows = [["full cache, facts found", *(f"{100 * share:.0f} %" for share in full), _mebibytes(caches["full cache"])]]
    for title, name in (
        ('lookahead, `park="cpu"`', "lookahead, parked"),
        ("lookahead", "lookahead"),
        ('SnapKV, `park="cpu"`', "snapkv, parked"),
        ("sinks + recent", "streaming"),
    ):
        cache = caches[f"{TURNS_BUDGET}/{name}"]
        shares = [f"{100 * own / whole:.0f} %" for own, whole in zip(cache["right"], full, strict=True)]
        rows.append([title, *shares, _mebibytes(cache)])
    return table(["", *(f"turn {turn}" for turn in range(1, len(full) + 1)), "MiB a chat, turn 8"], rows)


def _mebibytes(cache: dict[str, Any]) -> str:
    return f"{cache['bytes'][-1] / load('conversations')['conversations'] / 2**20:.1f}"


def quantization() -> str:
    own = load("quantization_smollm2_gpu")["runs"]
    peer = load("quantization_smollm2_gptqmodel")["runs"]
    texts = list(own[0]["increase"])
    rows = []
    for title, runs, method in (("this package", own, "default"), ("GPTQModel 7.7", peer, "GPTQModel")):
        cells = []
        for bits in (4, 3, 2):
            chosen = [r for r in runs if r["method"].split(" ")[0] == method and r["bits"] == bits and not r["sym"]]
            chosen = [r for r in chosen if r["method"] == method or method != "default"]
            means = [statistics.fmean(statistics.fmean(r["increase"][text]) for r in chosen) for text in texts]
            cells.append(" / ".join(f"{mean:.3f}" for mean in means))
        rows.append([title, *cells])
    return table([f"nats lost, {' / '.join(texts)}", "4 bits", "3 bits", "2 bits"], rows)


def _decode_cell(name: str, weights: str, batch: int, cache: str) -> dict[str, Any]:
    cells = load(name)["cells"]
    return next(c for c in cells if (c["weights"], c["batch"], c["cache"]) == (weights, batch, cache))


def decode() -> str:
    """An 8B model after a prompt of 32,768 tokens, tokens per second."""
    rows = []
    for title, name, weights, cache in (
        ("`LookaheadCache(1024, max_new_tokens=...)`", "decode_ragged", "bf16", "snapkv, static"),
        ('the same, `allocation="uniform"`', "decode_ragged", "bf16", "snapkv, static, uniform"),
        ("`LookaheadCache`, uniform, static", "decode_speed", "bf16", "snapkv, static"),
        ("the same, 4-bit weights", "decode_speed", "W4", "snapkv, static"),
        ("StaticCache, after a prompt of 1,024", "decode_speed", "bf16", "static, short prompt"),
        ("DynamicCache", "decode_speed", "bf16", "dynamic"),
    ):
        cells = []
        for batch in (1, 16):
            speed = _decode_cell(name, weights, batch, cache).get("tokens_per_second")
            cells.append("out of memory" if speed is None else f"{speed:,.0f}")
        rows.append([title, hardware(name).removeprefix("NVIDIA ").split(" ")[0], *cells])
    return table(["cache", "GPU", "batch 1, tokens/s", "batch 16, tokens/s"], rows)


def later_turn() -> str:
    found = load("later_turns")
    rows = []
    for title, name in (
        ("lookahead", "lookahead"),
        ('lookahead, `park="cpu"`', "lookahead, parked"),
        ("lookahead, compiled", "lookahead, static"),
        ('lookahead, `park="cpu"`, compiled', "lookahead, parked, static"),
        ('SnapKV, `park="cpu"`', "snapkv, parked"),
        ("DynamicCache", "dynamic"),
        ("transformers' offloaded cache", "offloaded"),
    ):
        if (cell := found.get(name)) is None:
            continue
        size = f"{cell['bytes'] / 2**20:,.0f}" if "bytes" in cell else ""
        refresh = f"{cell['refresh_ms']:.0f}" if "refresh_ms" in cell else ""
        rows.append([title, f"{cell['later_turn_ms']:.0f}", f"{cell['step_after_ms']:.0f}", refresh, size])
    header = ["cache", f"a turn of {found['turn']} tokens, ms", "a token after it, ms", "`refresh_every`, ms a time",
              "MiB on the GPU"]  # fmt: skip
    return table(header, rows)


def refreshes() -> str:
    """Evictions between two tokens of an answer; of ``refresh.json``."""
    found = load("refresh")
    rows = []
    for name, cell in found.items():
        if isinstance(cell, dict) and "passes_ms" in cell:
            middle = cell["decode_steps"] * cell["step_ms"]
            rows.append([name, f"{cell['step_ms']:.1f}", f"{middle:.1f}", f"{cell['decode_steps']:.1f}",
                         f"{cell['slow_down_percent']:.1f} %"])  # fmt: skip
    return table(
        ["scorer, storage", "a token, ms", "an eviction, ms", "in tokens",
         f"slow-down with `refresh_every={found['refresh_every']}`"], rows
    )  # fmt: skip


def peaks() -> str:
    """Memory of one long prompt; of ``prefill_peaks.json``."""
    rows = [
        [name, f"{cell['seconds']:.1f}", f"{cell['peak_gib']:.2f}", f"{cell['gib_after']:.2f}",
         f"{cell['bytes_parked'] / 2**30:.1f}"]
        for name, cell in load("prefill_peaks")["rows"].items()
    ]  # fmt: skip
    return table(["prompt read", "seconds", "peak, GiB", "after it, GiB", "parked, GiB"], rows)


def overhead() -> str:
    rows = []
    for cell in load("eviction_overhead")["prefill"]:
        if cell["method"] != "lookahead":
            continue
        rows.append([
            f"{cell['model']}, {cell['batch']} x {cell['length']:,}", f"{cell['ms']:,.0f}",
            f"{cell['overhead_ms']:.1f}", f"{cell['overhead_percent']:.1f} %",
            f"{cell['peak_saved_of_full_kv_percent']:.1f} %",
        ])  # fmt: skip
    return table(
        ["model, prompts", "prefill, ms", "of it eviction, ms", "of a plain prefill", "full cache saved"], rows
    )


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__: block
    for block in (
        eviction_short, eviction, eviction_gap, conversations, quantization, decode, later_turn,
        refreshes, peaks, overhead
    )
}  # fmt: skip


def rendered(text: str) -> str:
    """A page with its places filled.

    Raises:
        KeyError: a place has a name that no function here has.
    """
    return PLACE.sub(lambda place: f"{place[1]}\n{BLOCKS[place[2]]()}\n\n{place[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page and the results differ")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if rendered(text) != text:
            stale.append(page.relative_to(ROOT))
            if not check:
                page.write_text(rendered(text), encoding="utf-8")
    print("\n".join(map(str, stale)) or "all pages show the results")
    sys.exit(bool(stale) and check)


if __name__ == "__main__":
    main()
