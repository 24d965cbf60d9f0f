"""Writes docs/support.md from the results of tests:

    pytest tests/compat --junit-xml=results.xml
    pytest tests/architectures/test_families.py --junit-xml=families.xml
    pytest tests/quantization/test_causal_models.py --junit-xml=quantization.xml
    python docs/make_support.py results.xml families.xml quantization.xml

Takes several files, from runs with several versions of transformers or on several machines. A part for whose tests
there are no results stays as it is: the first is from tests/compat, "Families" from tests/architectures, and
"Quantization" from tests/quantization.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parent / "support.md"

INTRODUCTION = """# What works with a LookaheadCache

Written by `python docs/make_support.py` from the results of `tests/compat` with transformers {versions}.
"""
WORKS = """## Works

The generation equals one over the full cache with the evicted entries masked, and leaves nothing behind in the model.
"""
REFUSED = """## Refused

An error before any work is done, which says what to do instead.
"""
NOT_RUN = """## Not run

There are tests, but the machines of these runs lacked something.
"""

FAMILIES = """## Families of causal language models

By `model_type`, as in a model's config.json: all {count} types that transformers {versions} maps to a causal language
model. `tests/architectures/test_families.py` makes a tiny random model of each and holds two turns of a left-padded
batch, with `scorer="snapkv"` and with an untrained adapter. The answers must equal those over a full cache in which
the evicted entries are masked.

### These work, with and without an adapter

{works}

### These are refused, or were not tried

A refusal comes before any work, or in the first attention layer. It also says what to do instead. "Not tried": no tiny
model could be made, or it did not run without a LookaheadCache.

| why | |
|---|---|
{others}
"""
QUANTIZATION = """## Quantization of causal language models

All {count} types that transformers {versions} maps to a causal language model.
`tests/quantization/test_causal_models.py` quantizes a tiny random model of each to 4 bits, saves it, and loads it
again. The logits must be the same.

The share is of all matrices but embeddings, the language model head and convolutions. It is that of a model with the
sizes of its configuration by default (GLM-4.5-Air, DeepSeek-V2-Lite, Nemotron 3 Nano and Zamba2-1.2B have their own),
and of the tiny one where these make no model (*). `lkq-hf quantize` prints it for your model. Layers that cannot be
packed are left out with `modules_to_not_convert`, as the error about them says.

### Everything is quantized

{whole}

### A part stays in full precision

| in full precision | share that is quantized |
|---|---|
{parts}

### These are refused, or were not tried

| why | |
|---|---|
{others}
"""
BETWEEN = "## Families of causal language models"
LAST = "## Quantization of causal language models"
SCORERS = {"snapkv": "without an adapter", "lookahead": "with an adapter"}

# For parameters of tests that say nothing to a reader.
WORDS = {"bad": "with an assistant of random weights", "perfect": "with itself as assistant"}


@dataclass
class Test:
    name: str
    refused: str
    transformers: str
    failed: bool
    skipped: str | None
    packages: str


def read(path: Path) -> list[tuple[str, Test]]:
    """Items and tests in a junit file."""
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        properties = {each.get("name"): each.get("value", "") for each in case.iter("property")}
        if "item" not in properties:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped")
        reason = None if skipped is None else skipped.get("message", "")
        test = Test(
            f"{case.get('classname', '')}.{case.get('name', '')}",
            properties["refused"],
            properties["transformers"],
            failed,
            reason,
            properties.get("with", ""),
        )
        found.append((properties["item"], test))
    return found


def variant(name: str) -> str:
    """What a test was run with, of its name: `test_an_assistant_model[bad-gemma3]`."""
    parameters = name.partition("[")[2].rstrip("]")
    if not parameters:
        return name.rpartition(".")[2]
    return " ".join(WORDS.get(each, each) for each in reversed(parameters.split("-")))


def notes(tests: list[Test]) -> str:
    """With what the item was run, and what did not run although other tests of it did; a test that ran in one of
    several runs has run, unless it was a version of transformers that stopped the other."""
    ran = {test.name for test in tests if test.skipped is None}
    left: dict[str, set[str]] = defaultdict(set)
    for test in tests:
        of_this_version = (test.skipped or "").startswith("transformers")
        if test.skipped is not None and (of_this_version or test.name not in ran):
            left[test.skipped].add(variant(test.name))
    found = sorted({test.packages for test in tests} - {""})
    found += [f"not run: {', '.join(sorted(names))} ({reason})" for reason, names in sorted(left.items())]
    return "; ".join(found)


def page(results: list[Path], before: str) -> str:
    """The page, with the parts of ``before`` for which there are no results."""
    before, _, quantization = before.partition(LAST)
    items, _, families = before.partition(BETWEEN)
    tests = [found for path in results for found in read(path)]
    outcomes = [found for path in results for found in read_outcomes(path)]
    shares = [found for path in results for found in read_quantized(path)]
    items = items_part(tests) if tests else items.rstrip() + "\n"
    families = families_part(outcomes) if outcomes else BETWEEN + families.rstrip() + "\n"
    quantization = quantization_part(shares) if shares else LAST + quantization
    return f"{items}\n{families}\n{quantization}"


def items_part(results: list[tuple[str, Test]]) -> str:
    items: dict[str, list[Test]] = defaultdict(list)
    for item, test in results:
        items[item].append(test)
    if failed := sorted(item for item, tests in items.items() if any(test.failed for test in tests)):
        raise SystemExit(f"tests of these items fail: {', '.join(failed)}")
    works, refused, not_run = [], [], []
    for item in sorted(items, key=str.casefold):
        tests = items[item]
        if all(test.skipped is not None for test in tests):
            reasons = sorted({test.skipped for test in tests if test.skipped is not None})
            not_run.append(f"| {item} | {', '.join(reasons)} |")
        elif instead := sorted({test.refused for test in tests} - {""}):
            refused.append(f"| {item} | {', '.join(instead)} |")
        else:
            works.append(f"| {item} | {notes(tests)} |")
    sections = [INTRODUCTION.format(versions=listed(test.transformers for _, test in results))]
    for head, columns, rows in (
        (WORKS, ("", "notes"), works),
        (REFUSED, ("", "instead"), refused),
        (NOT_RUN, ("", "why"), not_run),
    ):
        if rows:
            sections.append("\n".join([head, f"| {' | '.join(columns)} |", "|---|---|", *rows]) + "\n")
    return "\n".join(sections)


def listed(versions: Iterable[str]) -> str:
    *older, newest = sorted(set(versions))
    return " and ".join([", ".join(older), newest] if older else [newest])


@dataclass(frozen=True)
class Outcome:
    family: str
    scorer: str
    transformers: str
    state: str
    reason: str


def read_outcomes(path: Path) -> list[Outcome]:
    """What came of the families in a junit file."""
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        properties = {each.get("name", ""): each.get("value", "") for each in case.iter("property")}
        name = case.get("name", "")
        if "every_family" in name and any(case.find(kind) is not None for kind in ("failure", "error")):
            raise SystemExit(f"{name} fails in {path}")
        if "family" in properties:
            found.append(Outcome(**{name: properties[name] for name in Outcome.__dataclass_fields__}))
    return found


def by_letter(names: list[str]) -> str:
    """A line for each first letter, in which a name is found at a glance; names in backticks, sorted."""
    lines: dict[str, list[str]] = defaultdict(list)
    for name in names:
        lines[name[1]].append(name)
    return "\n".join(f"- {', '.join(each)}" for each in lines.values())


def families_part(outcomes: list[Outcome]) -> str:
    families: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        families[outcome.family].append(outcome)
    versions = {outcome.transformers for outcome in outcomes}
    works: dict[tuple[str, ...], list[str]] = defaultdict(list)
    others: dict[str, list[str]] = defaultdict(list)
    for family, found in sorted(families.items()):
        known = {outcome.transformers for outcome in found}
        if all(outcome.state == "works" for outcome in found):
            works[() if known == versions else tuple(sorted(known))].append(f"`{family}`")
        else:
            others[differences(found)].append(f"`{family}`")
    lists = [
        (f"Known to transformers {listed(known)} only:\n\n" if known else "") + by_letter(names)
        for known, names in sorted(works.items())
    ]
    rows = sorted(others.items(), key=lambda row: (-len(row[1]), row[0]))
    return FAMILIES.format(
        count=len(families),
        versions=listed(versions),
        works="\n\n".join(lists),
        others="\n".join(f"| {why} | {', '.join(names)} |" for why, names in rows),
    )


@dataclass(frozen=True)
class Quantized:
    quantized: str
    transformers: str
    state: str
    reason: str
    share: str
    stays: str

    def __str__(self) -> str:
        """With its share, if that is not everything."""
        percent = f" {100 * float(self.share):.2f} %" if self.stays else ""
        return f"`{self.quantized}`{percent}{'*' if self.reason == TINY else ''}"


TINY = "tiny"
"""Written by tests/quantization: the share is that of a tiny model."""


def read_quantized(path: Path) -> list[Quantized]:
    """What became of the types in a junit file when they were quantized."""
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        properties = {each.get("name", ""): each.get("value", "") for each in case.iter("property")}
        if "quantized" not in properties:
            continue
        if any(case.find(kind) is not None for kind in ("failure", "error")):
            raise SystemExit(f"{case.get('name')} fails in {path}")
        found.append(Quantized(**{name: properties[name] for name in Quantized.__dataclass_fields__}))
    return found


def quantization_part(outcomes: list[Quantized]) -> str:
    """Of each type what the newest of the versions made of it."""
    newest = {each.quantized: each for each in sorted(outcomes, key=lambda each: version(each.transformers))}
    whole, parts, others = [], defaultdict(list), defaultdict(list)
    for name in sorted(newest):
        found = newest[name]
        if found.state != "works":
            others[why_not_quantized(found)].append(f"`{name}`")
        elif found.stays:
            parts[held_back(found.stays.split())].append(found)
        else:
            whole.append(str(found))
    rows = sorted(parts.items(), key=lambda row: (-len(row[1]), row[0]))
    return QUANTIZATION.format(
        count=len(newest),
        versions=listed({each.transformers for each in outcomes}),
        whole=by_letter(whole),
        parts="\n".join(f"| {names} | {', '.join(map(str, found))} |" for names, found in rows),
        others="\n".join(
            f"| {why} | {', '.join(names)} |" for why, names in sorted(others.items(), key=lambda row: -len(row[1]))
        ),
    )


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


MOST_NAMES = 4


def held_back(names: list[str]) -> str:
    """The largest of what stays in full precision; of other stacks than the one that is quantized, their names."""
    shown = list(dict.fromkeys(f"`{name.partition('.*')[0]}`" for name in names))
    more = f" and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else ""
    return ", ".join(shown[:MOST_NAMES]) + more


def why_not_quantized(found: Quantized) -> str:
    """The reason without names that only one type has, and without what to do instead."""
    text = found.reason.replace("|", "\\|")
    if found.state != "refused":
        return f"not tried: {text}"
    text = re.sub(r"\b\w+For\w+|\b\w+Model\b", "…", text)
    return re.sub(r"; (name|look at) .*|\. Leave .*|, so it is not quantized.*", "", text)


def differences(found: list[Outcome]) -> str:
    """What does not work of a family, and with which scorer and version where others differ."""
    where: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in found:
        if outcome.state != "works":
            where[cause(outcome)].append(outcome)
    versions, scorers = ({getattr(each, name) for each in found} for name in ("transformers", "scorer"))
    parts = []
    for text, outcomes in where.items():
        its_versions, its_scorers = ({getattr(each, name) for each in outcomes} for name in ("transformers", "scorer"))
        only = [SCORERS[name] for name in sorted(its_scorers)] if its_scorers != scorers else []
        only += [f"transformers {listed(its_versions)}"] if its_versions != versions else []
        parts.append((f"{', '.join(only)}: " if only else "") + text)
    return "; ".join(parts)


def cause(outcome: Outcome) -> str:
    """The reason, without what to do instead and without names that only one family has."""
    text = outcome.reason.replace("|", "\\|")
    if outcome.state != "refused":
        return f"{outcome.state}: {text}"
    text = re.sub(r"\.? (Generate with|Choose a scorer|Leave such modules).*|\.$", "", text)
    text = re.sub(r"this model \(\w+\)", "the model", text)
    text = re.sub(r"\blayer \d+\b", "a layer", text)
    text = re.sub(r"\b(?!LookaheadCache)\w+(Model|Decoder|Attention|Cache)\b", "…", text)
    return text.replace("…, …", "…").replace(" (a layer is one)", "")


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    PAGE.write_text(page([Path(argument) for argument in sys.argv[1:]], before), encoding="utf-8")
