"""Writes docs/support.md from the results of tests/compat:

    pytest tests/compat --junit-xml=results.xml
    python docs/make_support.py results.xml

Takes several files, from runs with several versions of transformers or on several machines.
"""

import sys
from collections import defaultdict
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


def page(results: list[Path]) -> str:
    items: dict[str, list[Test]] = defaultdict(list)
    for path in results:
        for item, test in read(path):
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
    *older, newest = sorted({test.transformers for tests in items.values() for test in tests})
    versions = " and ".join([", ".join(older), newest] if older else [newest])
    sections = [INTRODUCTION.format(versions=versions)]
    for head, columns, rows in (
        (WORKS, ("", "notes"), works),
        (REFUSED, ("", "instead"), refused),
        (NOT_RUN, ("", "why"), not_run),
    ):
        if rows:
            sections.append("\n".join([head, f"| {' | '.join(columns)} |", "|---|---|", *rows]) + "\n")
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page([Path(argument) for argument in sys.argv[1:]]), encoding="utf-8")
