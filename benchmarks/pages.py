"""Writes the measured numbers into the pages.

    python benchmarks/pages.py           # after new results
    python benchmarks/pages.py --check   # what `make test` asks

A page has places between ``<!-- results: NAME -->`` and ``<!-- end -->``. Each is filled by the function NAME below,
from the files in ``benchmarks/results``. A number in a sentence stands between
``<!-- value: FILE KEY::KEY FORMAT -->`` and ``<!-- end -->``, not at the beginning of a line. FORMAT is as ``.0f``,
and may have a factor, as ``60*.0f``.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tables import columns, load, table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md"]
PAGES += [page for folder in ("docs/*.md", "model_cards/*/README.md") for page in sorted(ROOT.glob(folder))]
PLACE = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- value: (\w+) ([^<>]+?) (?:([\d.]+)\*)?(\S+) -->).*?(<!-- end -->)", re.DOTALL)

BUDGETS = (64, 128, 256, 512)
OURS = "lookahead, adapter's pooling"
TURNS_BUDGET, TURNS_LENGTH = 256, "2048"


def hardware(name: str) -> str:
    """The device that a file of results is from."""
    results = load(name)
    return results["about"]["hardware"]["name"] if "about" in results else results["hardware"]["gpu"]


# Eviction: measurement, metric, whether it is shown in percent.
LIKELIHOOD = ("likelihood, 2048 tokens", "matched", "the full cache's answers: tokens predicted, %")
FACTS = (
    ("needle, 2048 tokens", "accuracy", "one fact in 2,048 tokens: found, %"),
    ("needle, 4096 tokens", "accuracy", "one fact in 4,096 tokens: found, %"),
    ("needle, 8192 tokens", "accuracy", "one fact in 8,192 tokens: found, %"),
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
QUALITY = ("eviction_quality",)
# Of the adapter before its last round of training, by allocation.
ROUND_3 = ("eviction_quality_round_3", "eviction_quality_layer", "eviction_quality_uniform")


def _best(
    measurement: str, metric: str, budget: int, scorer: str, files: Iterable[str] = QUALITY, sign: int = 1
) -> float:
    """A scorer's best row, whatever its pooling and allocation; times ``sign``, where less is better."""
    return max(
        sign * row[metric]
        for name in files
        for key, row in load(name)["measurements"].get(measurement, {"rows": {}})["rows"].items()
        if key.startswith(f"{budget}/{scorer}")
    )


def _eviction(
    measured: Iterable[tuple[str, str, str]],
    scorers: dict[str, tuple[str, tuple[str, ...]]],
    budgets: tuple[int, ...] = BUDGETS,
) -> str:
    """Of each measurement the scorers' best rows, in those of their files that have the same prompts.

    Scorers are given by title, each with its name and its files.
    """
    rows = []
    for measurement, metric, title in measured:
        cells = []
        first = next(iter(scorers.values()))[1][0]
        prompts = load(first)["measurements"][measurement]["prompts"]
        for scorer, files in scorers.values():
            there = [
                name
                for name in files
                if load(name)["measurements"].get(measurement, {"prompts": None})["prompts"] == prompts
            ]
            shares = [f"{100 * _best(measurement, metric, budget, scorer, there):.0f}" for budget in budgets if there]
            cells.append(" / ".join(shares))
        full = load(first)["measurements"][measurement]["rows"]["full"].get(metric, 1.0)
        rows.append([title, f"{100 * full:.0f}", *cells])
    return table([f"entries per KV head: {' / '.join(map(str, budgets))}", "full cache", *scorers], rows)


def headline() -> str:
    """What the package does for a reader, in one table."""
    likelihood = load(QUALITY[0])["measurements"][LIKELIHOOD[0]]["rows"]
    facts = load(QUALITY[0])["measurements"][FACTS[0][0]]["rows"]
    small = f"256/{OURS}"
    turns = load("later_turns")
    kept, whole = (turns["lookahead, parked"][key] for key in ("bytes", "bytes_parked"))
    quick, short = (
        _decode_cell("decode_speed", "bf16", 1, cache)["tokens_per_second"]
        for cache in ("snapkv, static", "static, short prompt")
    )
    lost = {name: _nats_lost(runs, method, 3) for name, runs, method in _quantized()}
    ours, theirs = (statistics.fmean(lost[name]) for name in lost)
    rows = [
        ["answers of SmolLM2-135M with 256 of 2,048 entries: tokens as with the full cache",
         f"{100 * likelihood[small]['matched']:.0f} %",
         f"SnapKV {100 * _best(LIKELIHOOD[0], 'matched', 256, 'snapkv'):.0f} %"],
        ["one fact in these 2,048 tokens: found", f"{100 * facts[small]['accuracy']:.0f} %",
         f"full cache {100 * facts['full']['accuracy']:.0f} %, "
         f"SnapKV {100 * _best(FACTS[0][0], 'accuracy', 256, 'snapkv', ROUND_3):.0f} %"],
        [f"KV cache of an 8B model after {turns['prompt']:,} tokens and some short turns, {turns['budget']:,} kept",
         f"{kept / 2**20:,.0f} MiB", f"full cache {whole / 2**20:,.0f} MiB"],
        ["decoding after such a prompt, compiled, on one H100", f"{quick:.0f} tokens/s",
         f"StaticCache after {turns['budget']:,} tokens: {short:.0f} tokens/s"],
        ["SmolLM2-135M with 3-bit weights: nats per token lost", f"{ours:.2f}", f"GPTQModel {theirs:.2f}"],
    ]  # fmt: skip
    return table(["", "lkq-hf", "for comparison"], rows)


def eviction() -> str:
    return _eviction(
        [LIKELIHOOD, *FACTS],
        {
            "lookahead": (OURS, QUALITY),
            "before the last round": (OURS, ROUND_3[:1]),
            "SnapKV": ("snapkv", (*QUALITY, *ROUND_3)),
            "sinks + recent": ("sinks + recent", (*QUALITY, *ROUND_3)),
            "oracle": ("oracle", QUALITY),
        },
    )


def eviction_before() -> str:
    """What was not measured again after the adapter's last round of training."""
    return _eviction(
        [LIKELIHOOD, *FACTS[:2], *WORDS],
        {
            "lookahead": (OURS, ROUND_3[:1]),
            "lookahead, uniform": (OURS, ROUND_3[2:]),
            "SnapKV": ("snapkv", ROUND_3),
            "sinks + recent": ("sinks + recent", ROUND_3),
            "oracle": ("oracle", ROUND_3[:1]),
        },
    )


def eviction_gap() -> str:
    """How much of the distance from the best SnapKV to the full cache is closed, in nats."""
    rows = []
    titles = {QUALITY[0]: "global"} | dict(
        zip(ROUND_3, (f"{each}, before the last round" for each in ("global", "layer", "uniform")), strict=True)
    )
    for name, title in titles.items():
        rivals = QUALITY if name in QUALITY else ROUND_3
        measured = load(name)["measurements"][LIKELIHOOD[0]]["rows"]
        full = load(rivals[0])["measurements"][LIKELIHOOD[0]]["rows"]["full"]["nll"]
        cells = []
        for budget in BUDGETS:
            snapkv = -_best(LIKELIHOOD[0], "nll", budget, "snapkv", rivals, sign=-1)
            cells.append(f"{100 * (snapkv - measured[f'{budget}/{OURS}']['nll']) / (snapkv - full):.0f} %")
        rows.append([title, *cells])
    return table(["entries per KV head", *map(str, BUDGETS)], rows)


def gemma3() -> str:
    """The adapter of Gemma-3-270M."""
    name = "eviction_quality_gemma3"
    scorers = {"lookahead": OURS, "SnapKV": "snapkv", "sinks + recent": "sinks + recent", "oracle": "oracle"}
    measured = [LIKELIHOOD, *(each for each in FACTS if "2048" in each[0])]
    return _eviction(measured, {title: (scorer, (name,)) for title, scorer in scorers.items()}, (64, 128, 256))


def later_questions() -> str:
    """A text is read before anything is asked, and facts in it are asked for afterwards."""
    found = load("later_questions")
    rows = []
    for length, caches in found["lengths"].items():
        full = sum(caches["full cache"]["right"])
        for title, name in (("the adapter for later questions", "lookahead"), ("SnapKV", "snapkv"),
                            ("sinks + recent", "streaming")):  # fmt: skip
            shares = (f"{100 * sum(caches[f'{budget}/{name}']['right']) / full:.0f} %" for budget in BUDGETS)
            rows.append([f"{title}, {int(length):,} tokens", *shares])
    return table(["of the facts that the full cache finds", *map(str, BUDGETS)], rows)


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


def _quantized() -> list[tuple[str, list[dict[str, Any]], str]]:
    own, peer = load("quantization_smollm2_gpu")["runs"], load("quantization_smollm2_gptqmodel")["runs"]
    return [("this package", own, "default"), ("GPTQModel 7.7", peer, "GPTQModel")]


def _nats_lost(runs: list[dict[str, Any]], method: str, bits: int) -> list[float]:
    """Of each text, mean over windows and draws of the calibration; asymmetric."""
    same = [run for run in runs if run["bits"] == bits and not run["sym"]]
    chosen = [run for run in same if run["method"] == method or (method != "default" and method in run["method"])]
    return [
        statistics.fmean(statistics.fmean(run["increase"][text]) for run in chosen) for text in runs[0]["increase"]
    ]


def quantization() -> str:
    rows = []
    for title, runs, method in _quantized():
        cells = (" / ".join(f"{lost:.3f}" for lost in _nats_lost(runs, method, bits)) for bits in (4, 3, 2))
        rows.append([title, *cells])
    return table([f"nats lost, {' / '.join(runs[0]['increase'])}", "4 bits", "3 bits", "2 bits"], rows)


def quantization_refined() -> str:
    """The refined preset beside AutoRound, with 128 calibration windows of 2,048 tokens."""
    found = load("quantization_refined")["rows"]
    rows = []
    for title, named, sym in (
        ('this package, `preset="refined"`', ("refined",), False),
        ("AutoRound, 200 steps", ("autoround 200",), False),
        ("AutoRound, 1,000 steps", ("autoround 1000",), False),
        ('this package, `preset="refined"`, symmetric', ("refined",), True),
        ("AutoRound, 200 steps and its extension, symmetric", ("autoround 200 alg_ext",), True),
    ):
        cells = []
        for bits in (4, 3, 2):
            same = [row for row in found if row["name"] in named and row["bits"] == bits and row["sym"] == sym]
            cells.append(
                f"{statistics.fmean(same[0]['mean'].values()):.3f} ({same[0]['seconds']:.0f} s)" if same else ""
            )
        rows.append([title, *cells])
    return table(["nats lost, mean of both texts (seconds)", "4 bits", "3 bits", "2 bits"], rows)


def _changes(base: str, named: dict[str, str]) -> str:
    from report import changes_table

    runs = [run for name in ("gpu", "gptqmodel") for run in load(f"quantization_smollm2_{name}")["runs"]]
    text = changes_table(runs, base).replace(" (seed 0)", " ¹" if base == "default" else "")
    for method, title in named.items():
        text = text.replace(f"| {method} |", f"| {title} |")
    return text


def eviction_objective() -> str:
    found = load("adapter_ablation")["variants"]
    rows = [
        [title, *(f"{100 * gap:.0f} %" for gap in found[name]["gap_closed"]["no pooling"].values())]
        for title, name in (("without", "reference"), ("with", "eviction objective"))
    ]
    return table(["the objective, entries per KV head", *found["reference"]["gap_closed"]["no pooling"]], rows)


def quantization_changes() -> str:
    return _changes("default", {
        "residual not corrected": "`corrected_residual=False`",
        "alpha 0": "`alpha=0`: no account of the error of earlier layers", "alpha 0.5": "`alpha=0.5`",
        "3 sweeps": "3 sweeps instead of 8", "damping 0.3": "damping 0.3 instead of 0.1",
    })  # fmt: skip


def quantization_methods() -> str:
    """What the published stages and the default lose, on two models."""
    from report import mean_and_error, select

    smollm2 = [run for name in ("gpu", "gptqmodel") for run in load(f"quantization_smollm2_{name}")["runs"]]
    rows = []
    for method, title in {
        "round to nearest": "round to nearest", "GPTQ": "plain GPTQ", "stage 1 only": "stage 1 alone",
        "stage 2 only": "stage 2 alone", "both stages": "both stages",
        "both stages, alpha 0.25 (preset paper)": "`--preset paper`: both, with `alpha=0.25`",
        "default": "the default",
    }.items():  # fmt: skip
        cells = []
        for runs, sym in ((smollm2, False), (smollm2, True), (load("quantization_gemma3")["runs"], False)):
            found = (select(runs, method, bits, sym) for bits in (4, 3, 2))
            cells.append(" / ".join(f"{mean_and_error(each)[0]:.3f}" if each else "" for each in found))
        rows.append([title, *cells])
    return table(["4 / 3 / 2 bits", "SmolLM2, asymmetric", "SmolLM2, symmetric", "Gemma-3-270M, asymmetric"], rows)


def quantization_uncorrected() -> str:
    named = {"alpha 0.5": "`alpha=0.5`", "alpha 1": "`alpha=1`", "stored order": "columns in stored order"}
    return _changes("residual not corrected", named)


def cpu_decode() -> str:
    found = {row["variant"]: row["milliseconds"] for row in load("cpu_decode")["rows"]}
    rows = []
    variants = {"dense": "{}", "4 bits": "4 bits, {}"}
    variants["4 bits, unpacked at every product"] = "4 bits, {}, unpacked at every product"
    for title, name in variants.items():
        rows.append([title, *(f"{found[name.format(dtype)]:,.0f}" for dtype in ("bfloat16", "float32"))])
    return table(["weights", "bfloat16 activations, ms", "float32 activations, ms"], rows)


def training_memory() -> str:
    return columns(
        load("training_memory")["rows"],
        "prompt={length:,} tokens | its cache={prompt's cache:.2f} | held in full={all held:.1f} | "
        "with `recompute`={recomputed:.1f} | and one layer at a time={one layer:.1f}",
    )


def chunked_prefill() -> str:
    found = load("chunked_prefill")
    rows = [[name, *map(str, each.values())] for name, each in found["found"].items()]
    return table([f"facts found of {found['prompts']}, by entries per KV head", *map(str, found["budgets"])], rows)


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
        quantization_methods, headline, eviction, eviction_before, eviction_gap, gemma3, conversations,
        later_questions, chunked_prefill,
        training_memory, eviction_objective, quantization, quantization_refined, quantization_changes,
        quantization_uncorrected, cpu_decode, decode, later_turn, refreshes, overhead,
    )
}  # fmt: skip


def rendered(text: str) -> str:
    """A page with its places filled.

    Raises:
        KeyError: a place has a name that no function or file has.
    """
    text = PLACE.sub(lambda place: f"{place[1]}\n{BLOCKS[place[2]]()}\n\n{place[3]}", text)
    return VALUE.sub(lambda place: f"{place[1]}{value(*place.groups()[1:5])}{place[6]}", text)


def value(file: str, keys: str, factor: str | None, form: str) -> str:
    """A number of a results file.

    Raises:
        KeyError: the file has no such key.
    """
    found = load(file)
    for key in keys.split("::"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return format(float(factor or 1) * found, form)


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
