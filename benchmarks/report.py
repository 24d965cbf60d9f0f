"""Tables of recorded results that need arithmetic; the others are declared in tables.yaml.

A function here is named on a page like a table of tables.yaml, with the words that follow its name as arguments:
``<!-- results: eviction_quality eviction_quality_gemma3 -->``. pages.py writes it there.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tables import declared, load, look_up, machine, table

Runs = list[dict[str, Any]]
BUDGETS = (64, 128, 256, 512)


# Evicted caches

OURS = "lookahead, adapter's pooling"
NOW = ("eviction_quality",)
BEFORE = ("eviction_quality_round_3", "eviction_quality_layer", "eviction_quality_uniform")
"""Of the adapter before its last round of training, by allocation."""
LIKELIHOOD = "likelihood, 2048 tokens"
FACTS = {f"{kind}, {length} tokens": f"{title} in {length:,} tokens: found, %"
         for kind, title, lengths in (("needle", "one fact", (2048, 4096, 8192)),
                                      ("needle_multi_key", "one of four facts", (2048, 4096)))
         for length in lengths}  # fmt: skip
SHOWN = {LIKELIHOOD: "the full cache's answers: tokens predicted, %"} | FACTS | {
    "agreement: paragraph_question, 2048 tokens": "questions over paragraphs: word F1 to the full cache, %",
    "agreement: summarise, 2048 tokens": "summaries: word F1 to the full cache, %",
}  # fmt: skip
"""What is measured, and its title."""


def rows_of(file: str, measured: str) -> dict[str, dict[str, float]]:
    return load(file)["measurements"].get(measured, {"rows": {}})["rows"]


def metric_of(measured: str) -> str:
    return "matched" if measured == LIKELIHOOD else "word_f1" if measured.startswith("agreement") else "accuracy"


def best(measured: str, metric: str, budget: int, scorer: str, files: Iterable[str] = NOW, sign: int = 1) -> float:
    """A scorer's best row, whatever its pooling and allocation; times ``sign``, where less is better."""
    rows = [row for file in files for row in rows_of(file, measured).items()]
    return max(sign * row[metric] for name, row in rows if name.startswith(f"{budget}/{scorer}"))


def eviction_table(
    measured: Iterable[str], scorers: Mapping[str, tuple[str, Sequence[str]]], budgets: Sequence[int] = BUDGETS
) -> str:
    """Scorers' best rows, in those of their files that have the prompts of the first scorer's first one.

    Args:
        measured: keys of `SHOWN`, a row of the table each.
        scorers: by title of a column, the beginning of the scorer's name and its files.
    """
    rows = []
    first = next(iter(scorers.values()))[1][0]
    for each in measured:
        prompts, metric = load(first)["measurements"][each]["prompts"], metric_of(each)
        cells = [f"{100 * rows_of(first, each)['full'].get(metric, 1.0):.0f}"]
        for scorer, files in scorers.values():
            there = [file for file in files if load(file)["measurements"].get(each, {}).get("prompts") == prompts]
            found = [f"{100 * best(each, metric, budget, scorer, there):.0f}" for budget in budgets if there]
            cells.append(" / ".join(found))
        rows.append([SHOWN[each], *cells])
    return table([f"entries per KV head: {' / '.join(map(str, budgets))}", "full cache", *scorers], rows)


def eviction() -> str:
    others = (*NOW, *BEFORE)
    scorers = {"lookahead": (OURS, NOW), "before the last round": (OURS, BEFORE[:1]), "SnapKV": ("snapkv", others)}
    scorers |= {"sinks + recent": ("sinks + recent", others), "oracle": ("oracle", NOW)}
    return eviction_table(SHOWN, scorers)


def eviction_uniform() -> str:
    """What sharing the budget out among all heads brings, before the adapter's last round of training."""
    scorers = {"shared among all heads": (OURS, BEFORE[:1]), "the same in every head": (OURS, BEFORE[2:])}
    return eviction_table([each for each in SHOWN if all(rows_of(file, each) for file in BEFORE)], scorers)


def gemma3() -> str:
    """The adapter of Gemma-3-270M."""
    names = {"lookahead": OURS, "SnapKV": "snapkv", "sinks + recent": "sinks + recent", "oracle": "oracle"}
    scorers = {title: (name, ("eviction_quality_gemma3",)) for title, name in names.items()}
    return eviction_table([LIKELIHOOD, *(each for each in FACTS if "2048" in each)], scorers, BUDGETS[:3])


def eviction_gap() -> str:
    """How much of the distance from the best SnapKV to the full cache is closed, in nats."""
    titles = {NOW[0]: "global"}
    for file, allocation in zip(BEFORE, ("global", "layer", "uniform"), strict=True):
        titles[file] = f"{allocation}, before the last round"
    rows = []
    for file, title in titles.items():
        rivals = NOW if file in NOW else BEFORE
        measured, full = rows_of(file, LIKELIHOOD), rows_of(rivals[0], LIKELIHOOD)["full"]["nll"]
        snapkv = {budget: -best(LIKELIHOOD, "nll", budget, "snapkv", rivals, sign=-1) for budget in BUDGETS}
        shares = ((snapkv[b] - measured[f"{b}/{OURS}"]["nll"]) / (snapkv[b] - full) for b in BUDGETS)
        rows.append([title, *(f"{100 * share:.0f} %" for share in shares)])
    return table(["entries per KV head", *map(str, BUDGETS)], rows)


def eviction_quality(file: str) -> str:
    """All rows of a file."""
    parts = []
    for title, measured in load(file)["measurements"].items():
        rows = {}
        for name, row in measured["rows"].items():
            budget, _, method = name.rpartition("/")
            rows[name] = {"budget": budget or "none", "method": method if budget else "full cache"} | row
        parts += [f"## {title} ({measured['prompts']} prompts)", declared("eviction_quality", {"rows": rows})]
    return "\n\n".join(parts)


def later_questions() -> str:
    """A text is read before anything is asked, and facts in it are asked for afterwards."""
    rows = []
    methods = {
        "the adapter for later questions": ("later_questions", "lookahead"),
        "SnapKV": ("later_questions", "snapkv"),
        "sinks + recent": ("later_questions_peers", "streaming"),
    }
    for title, (file, name) in methods.items():
        for length, caches in load(file)["lengths"].items():
            full = sum(caches["full cache"]["right"])
            shares = (f"{100 * sum(caches[f'{budget}/{name}']['right']) / full:.0f} %" for budget in BUDGETS)
            rows.append([f"{title}, {int(length):,} tokens", *shares])
    return table(["of the facts that the full cache finds", *map(str, BUDGETS)], rows)


def of_the_full(cache: Mapping[str, Any], full: Mapping[str, Any]) -> list[float]:
    """Right answers by turn: the full cache's share, and of other caches the share of that."""
    if cache is full:
        return full["right"]
    return [own / whole if whole else 0.0 for own, whole in zip(cache["right"], full["right"], strict=True)]


def conversations() -> str:
    """Chats over 2,048 tokens with 256 entries."""
    found = load("conversations")
    caches, count = found["lengths"]["2048"], found["conversations"]
    full, rows = caches["full cache"], []
    for title, name in {
        "full cache, facts found": "full cache", 'lookahead, `park="cpu"`': "256/lookahead, parked",
        "lookahead": "256/lookahead", 'SnapKV, `park="cpu"`': "256/snapkv, parked", "sinks + recent": "256/streaming",
    }.items():  # fmt: skip
        shares = (f"{100 * share:.0f} %" for share in of_the_full(caches[name], full))
        rows.append([title, *shares, f"{caches[name]['bytes'][-1] / count / 2**20:.1f}"])
    turns = range(1, len(full["right"]) + 1)
    return table(["", *(f"turn {turn}" for turn in turns), f"MiB a chat, turn {turns[-1]}"], rows)


def conversations_all(file: str) -> str:
    """All lengths and caches."""
    found, parts = load(file), []
    for length, caches in found["lengths"].items():
        full = caches["full cache"]
        sized = (0, -1) if "bytes" in full else ()  # turns whose bytes are shown
        rows = [
            [
                name,
                *(f"{share:.2f}" for share in of_the_full(cache, full)),
                *(f"{cache['bytes'][n]:,}" for n in sized),
            ]
            for name, cache in caches.items()
        ]
        turns = [f"turn {turn}" for turn in range(1, len(full["right"]) + 1)]
        parts += [f"## {length} tokens, {found['conversations']} conversations",
                  "Right answers of the full cache; of the others the share of the full cache's.",
                  table(["cache", *turns, *(f"bytes, {turns[n]}" for n in sized)], rows)]  # fmt: skip
    return "\n\n".join(parts)


def chunked_prefill(file: str = "chunked_prefill") -> str:
    """Facts found; and, where it is recorded, the share of the entries that are kept of a prompt read at once."""
    found = load(file)
    rows = []
    for name, by_budget in found["found"].items():
        same = found.get("same", {}).get(name)
        cells = (f"{n}, {same[budget] / found['prompts']:.0%}" if same else str(n) for budget, n in by_budget.items())
        rows.append([name, *cells])
    return table([f"facts found of {found['prompts']}, by entries per KV head", *map(str, found["budgets"])], rows)


def long_answers() -> str:
    """Nats lost while an answer is long, by whose continuation it is."""
    rows = load("long_answers")["rows"]
    return "\n\n".join(f"## {kind}\n\n{declared('long_answer', {'rows': each})}" for kind, each in rows.items())


# Quantization

DEFAULT, PEER, UNCORRECTED = "default", "GPTQModel", "residual not corrected"
SMOLLM2 = ("quantization_smollm2_gpu", "quantization_smollm2_gptqmodel")
GEMMA3 = "quantization_gemma3"


def runs_of(*files: str) -> Runs:
    """Runs of files that measured the same; a run that two hold is taken from the first.

    Raises:
        ValueError: the files have other settings.
    """
    if any(load(file)["settings"] != load(files[0])["settings"] for file in files):
        raise ValueError(f"{', '.join(files)} were measured with different settings")
    unique: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in (run for file in files for run in load(file)["runs"]):
        unique.setdefault((run["method"], run["bits"], run["sym"], run["seed"]), run)
    return list(unique.values())


def mean_and_error(runs: Runs) -> tuple[float, float]:
    """Nats lost: the mean over texts and seeds, and its standard error over windows, taken as independent."""
    texts = [
        [statistics.fmean(values) for values in zip(*(run["increase"][text] for run in runs), strict=True)]
        for text in runs[0]["increase"]
    ]
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in texts)) / len(texts)
    return statistics.fmean(map(statistics.fmean, texts)), error


def select(runs: Runs, method: str, bits: int, sym: bool = False) -> Runs:
    chosen = [run for run in runs if run["bits"] == bits and run["sym"] == sym]
    return [run for run in chosen if run["method"] == method or (method == PEER and run["method"].startswith(PEER))]


def by_width(runs: Runs, title: str, names: Mapping[str, str], cell: Callable[[str, int], str]) -> str:
    """A table of methods, with their titles, by bits; a method without any value has no row."""
    widths = sorted({run["bits"] for run in runs}, reverse=True)
    rows = [[shown, *(cell(name, bits) for bits in widths)] for name, shown in names.items()]
    return table([title, *(f"{bits} bits" for bits in widths)], [row for row in rows if any(row[1:])])


def nats_lost(runs: Runs, method: str, bits: int) -> dict[str, float]:
    """By text, mean over windows and draws of the calibration; asymmetric."""
    chosen = select(runs, method, bits)
    return {text: statistics.fmean(statistics.fmean(run["increase"][text]) for run in chosen)
            for text in chosen[0]["increase"]}  # fmt: skip


def quantization() -> str:
    runs = runs_of(*SMOLLM2)
    title = f"nats lost, {' / '.join(runs[0]['increase'])}"
    names = {DEFAULT: "this package", PEER: "GPTQModel 7.7"}
    return by_width(runs, title, names, lambda method, bits: per_text(nats_lost(runs, method, bits)))


def per_text(lost: Mapping[str, float]) -> str:
    return " / ".join(f"{nats:.3f}" for nats in lost.values())


def quantization_on_a_cpu() -> str:
    """What the machine, and more calibration, change at 3 bits; one draw of the windows."""
    rows = []
    more = load("quantization_cpu_128_windows")["runs"]
    for method, title in {DEFAULT: "the default", "default, alpha 0.5": "`alpha=0.5`", "stage 1 only": "stage 1 alone",
                          "GPTQ": "plain GPTQ"}.items():  # fmt: skip
        places = [load(SMOLLM2[0])["runs"], load("quantization_cpu")["runs"], more]
        chosen = [[run for run in select(runs, method, 3) if run["seed"] == 0] for runs in places]
        rows.append([title, *(per_text(nats_lost(runs, method, 3)) if runs else "" for runs in chosen)])
    return table([f"3 bits, {' / '.join(more[0]['increase'])}", "GPU", "CPU", "CPU, 128 windows"], rows)


def quantization_methods() -> str:
    """What the published stages and the default lose, on two models."""
    rows = []
    for method, title in {
        "round to nearest": "round to nearest", "GPTQ": "plain GPTQ", "stage 1 only": "stage 1 alone",
        "stage 2 only": "stage 2 alone", "both stages": "both stages",
        "both stages, alpha 0.25 (preset paper)": "`--preset paper`: both, with `alpha=0.25`",
        DEFAULT: "the default",
    }.items():  # fmt: skip
        cells = []
        for runs, sym in ((runs_of(*SMOLLM2), False), (runs_of(*SMOLLM2), True), (runs_of(GEMMA3), False)):
            found = (select(runs, method, bits, sym) for bits in (4, 3, 2))
            cells.append(" / ".join(f"{mean_and_error(each)[0]:.3f}" if each else "" for each in found))
        rows.append([title, *cells])
    return table(["4 / 3 / 2 bits", "SmolLM2, asymmetric", "SmolLM2, symmetric", "Gemma-3-270M, asymmetric"], rows)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: zip(old["increase"][name], losses, strict=True) for name, losses in new["increase"].items()}
    return {"increase": {name: [after - before for before, after in pairs] for name, pairs in values.items()}}


def changes(runs: Runs, base: str, names: Mapping[str, str] | None = None, once: str = " (seed {})") -> str:
    """What ``base`` loses more with one thing changed, window by window: less noise than the two losses have.

    Args:
        runs: of all methods.
        base: the method that is changed.
        names: titles of methods; by default what their names add to the base's.
        once: what marks a difference of one draw of the calibration.
    """

    def cell(method: str, bits: int) -> str:
        pairs = {run["seed"]: [run] for run in select(runs, base, bits)}
        for run in select(runs, method, bits):
            pairs.setdefault(run["seed"], []).append(run)
        differences = [difference(*pair) for pair in pairs.values() if len(pair) == 2]
        mark = once.format(min(pairs)) if len(differences) == 1 else ""
        return "{:+.3f} ± {:.3f}".format(*mean_and_error(differences)) + mark if differences else ""

    found = dict.fromkeys(run["method"] for run in runs)
    added = {name: name.removeprefix(f"{base}, ") for name in found if name.startswith(f"{base}, ")}
    if base == DEFAULT:
        added = {UNCORRECTED: UNCORRECTED} | added
    titles = {name: (names or {}).get(title, title) for name, title in added.items()}
    return by_width(runs, f"{base}, but", titles, cell)


def quantization_changes() -> str:
    return changes(runs_of(*SMOLLM2), DEFAULT, {
        UNCORRECTED: "`corrected_residual=False`",
        "alpha 0": "`alpha=0`: no account of the error of earlier layers", "alpha 0.5": "`alpha=0.5`",
        "3 sweeps": "3 sweeps instead of 8", "damping 0.3": "damping 0.3 instead of 0.1",
    }, once=" ¹")  # fmt: skip


def quantization_uncorrected() -> str:
    named = {"alpha 0.5": "`alpha=0.5`", "alpha 1": "`alpha=1`", "stored order": "columns in stored order"}
    return changes(runs_of(*SMOLLM2), UNCORRECTED, named, once="")


def refined_and_best_other(file: str, bits: int, sym: bool) -> tuple[float, float]:
    """Nats lost with the refined preset, and with AutoRound's or GPTQModel's best setting on the dataset's windows."""
    lost = {
        run["method"]: statistics.fmean(run["mean"].values())
        for run in load(file)["runs"]
        if (run["seed"], run["bits"], run["sym"]) == (0, bits, sym) and not run["method"].endswith("own text")
    }
    return lost["refined"], min(nats for method, nats in lost.items() if method.startswith(("autoround", PEER)))


def refined_beside_peers() -> str:
    """The refined preset and the best of its peers, in every cell."""
    files = {
        "SmolLM2, 128 x 2,048": "quantization_refined", "Gemma-3-270M, 128 x 2,048": "quantization_refined_gemma3",
        "SmolLM2, 32 x 512": "quantization_few_tokens", "Gemma-3-270M, 32 x 512": "quantization_few_tokens_gemma3",
    }  # fmt: skip
    rows = []
    for (title, file), sym in itertools.product(files.items(), (False, True)):
        pairs = [refined_and_best_other(file, bits, sym) for bits in (4, 3, 2)]
        less = [f"{ours:.3f}, {best:.3f}: {100 * (1 - ours / best):.0f} % less" for ours, best in pairs]
        rows.append([title + ", symmetric" * sym, *less])
    return table(["nats lost: the preset, the best other", "4 bits", "3 bits", "2 bits"], rows)


def quantization_about(*files: str) -> str:
    """How and where files were measured."""
    runs = runs_of(*files)
    settings = runs[0] | load(files[0])["settings"]
    full = ", ".join(f"{text} {statistics.fmean(nll):.3f}" for text, nll in load(files[0])["full_precision"].items())
    windows = len(next(iter(runs[0]["increase"].values())))
    machines = "; ".join(dict.fromkeys(machine(run["environment"]) for run in runs))
    return (
        f"Groups of {settings['group_size']}, calibrated on {settings['samples']} x {settings['length']} "
        f"tokens of the Python documentation; {windows} windows of 1,024 tokens from each text. "
        "Increase of the negative log-likelihood over full precision, in nats per token: mean over texts and "
        f"calibration seeds ± standard error over windows. Full precision: {full}. {machines}."
    )


def quantization_peer(*files: str) -> str:
    """The default against GPTQModel: each text, bit width and seed of which both were measured.

    Raises:
        ValueError: the two had other calibration tokens.
    """
    runs, rows = runs_of(*files), []
    peers = [run for run in runs if run["method"].startswith(PEER)]
    for peer in sorted(peers, key=lambda run: (-run["bits"], run["seed"])):
        for own in (run for run in select(runs, DEFAULT, peer["bits"], peer["sym"]) if run["seed"] == peer["seed"]):
            if own["calibration"] != peer["calibration"]:
                raise ValueError(f"the calibration tokens of {peer['method']} and the default differ: measure again")
            for text, lost in peer["increase"].items():
                theirs, ours = statistics.fmean(lost), statistics.fmean(own["increase"][text])
                numbers = (f"{theirs:.3f}", f"{ours:.3f}", f"{1 - ours / theirs:.0%}")
                rows.append([text, str(peer["bits"]), str(peer["seed"]), *numbers])
    return table(["text", "bits", "seed", "GPTQModel", "default", "fewer nats"], rows)


def quantization_all(scheme: str, *files: str) -> str:
    """All methods, symmetric ("sym") or not ("asym")."""
    chosen = [run for run in runs_of(*files) if run["sym"] == (scheme == "sym")]
    seeds = {run["seed"] for run in chosen}

    def cell(method: str, bits: int) -> str:
        same = [run for run in chosen if run["method"] == method and run["bits"] == bits]
        if not same:
            return ""
        missing = "" if {run["seed"] for run in same} == seeds else f" ({len(same)} of {len(seeds)} seeds)"
        return "{:.3f} ± {:.3f}".format(*mean_and_error(same)) + missing

    names = sorted(dict.fromkeys(run["method"] for run in chosen), key=lambda name: not name.startswith(DEFAULT))
    return by_width(chosen, "method", {name: name for name in names}, cell)


def quantization_differences(base: str, *files: str) -> str:
    """Of the default, or of what was it before ("uncorrected")."""
    return changes(runs_of(*files), UNCORRECTED if base == "uncorrected" else base)


def quantization_seconds() -> str:
    """The fastest and the slowest run of a method."""
    rows = []
    for method, title in {"GPTQ": "plain GPTQ", "both stages, alpha 0.25 (preset paper)": "`--preset paper`",
                          DEFAULT: "the default"}.items():  # fmt: skip
        seconds = [run["quantization_seconds"] for run in runs_of(*SMOLLM2) if run["method"] == method]
        rows.append([title, f"{min(seconds):.0f} to {max(seconds):.0f}"])
    return table(["SmolLM2-135M-Instruct", "seconds"], rows)


def checkpoint(bits: str) -> str:
    """What a checkpoint with a card loses; bits as "w4"."""
    found, rows = load("checkpoint_cards"), []
    for text, row in found["checkpoints"][f"smollm2-135m-instruct-{bits}-g64"]["rows"].items():
        base = found["base"][text]
        for what, number in (("Perplexity", row["perplexity"]), ("Perplexity of the base model", base["perplexity"]),
                             ("NLL lost, nats per token", row["nll"] - base["nll"])):  # fmt: skip
            rows.append([text, what, f"{number:.4f}"])
    return table(["on", "what", "value"], rows)


# The README


def headline() -> str:
    """What the package does for a reader, in one table."""
    likelihood, facts = (rows_of(NOW[0], measured) for measured in (LIKELIHOOD, "needle, 2048 tokens"))
    small = f"256/{OURS}"
    turns = load("later_turns")
    kept, whole = (turns["lookahead, parked"][key] / 2**20 for key in ("bytes", "bytes_parked"))
    quick, plain = (
        look_up(load("decode_peers"), f"cells::weights=bf16&batch=1&cache={cache}::tokens_per_second")
        for cache in ("snapkv, static", "dynamic")
    )
    ours, theirs = (statistics.fmean(nats_lost(runs_of(*SMOLLM2), each, 3).values()) for each in (DEFAULT, PEER))
    refined, autoround = refined_and_best_other("quantization_refined", 3, sym=False)
    rivals = (
        best(LIKELIHOOD, "matched", 256, "snapkv"),
        best("needle, 2048 tokens", "accuracy", 256, "snapkv", BEFORE),
    )
    rows = [
        ["answers of SmolLM2-135M with 256 of 2,048 entries: tokens as with the full cache",
         f"{100 * likelihood[small]['matched']:.0f} %", f"SnapKV {100 * rivals[0]:.0f} %"],
        ["one fact in these 2,048 tokens: found", f"{100 * facts[small]['accuracy']:.0f} %",
         f"full cache {100 * facts['full']['accuracy']:.0f} %, SnapKV {100 * rivals[1]:.0f} %"],
        [f"KV cache of an 8B model after {turns['prompt']:,} tokens and some short turns, {turns['budget']:,} kept",
         f"{kept:,.0f} MiB", f"full cache {whole:,.0f} MiB"],
        ["decoding after such a prompt, compiled, on one H200", f"{quick:.0f} tokens/s",
         f"DynamicCache {plain:.0f} tokens/s"],
        ["SmolLM2-135M with 3-bit weights: nats per token lost", f"{ours:.2f}", f"GPTQModel {theirs:.2f}"],
        ["the same with `--preset refined` and 16 times the calibration text",
         f"{refined:.2f}", f"AutoRound {autoround:.2f}"],
    ]  # fmt: skip
    return table(["", "lkq-hf", "for comparison"], rows)


if __name__ == "__main__":
    raise SystemExit("python benchmarks/pages.py writes the tables, python benchmarks/pictures.py draws")
