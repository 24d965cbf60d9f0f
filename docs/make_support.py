"""Writes docs/support.md from the results of tests/compat:

    pytest tests/compat --junit-xml=results.xml
    python docs/make_support.py results.xml

Several files, from several versions of transformers, become several columns.
"""

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parent / "support.md"

INTRODUCTION = """# What works with a LookaheadCache

Generated from the results of `tests/compat` by `python docs/make_support.py`; do not edit. "Yes" means that the tests
of this row pass: the generation equals one over the full cache with the evicted entries masked, and nothing is left
behind in the model. "Refused" means an error before any work is done, which says what to do instead. "Not run" means
that the machine of this run lacks something, which is named.
"""


def outcome(cases: list[ElementTree.Element]) -> str:
    """Of the tests of one row with one version of transformers."""
    if any(case.find("failure") is not None or case.find("error") is not None for case in cases):
        return "**fails**"
    skipped = [case.find("skipped") for case in cases]
    reasons = ", ".join(sorted({reason.get("message", "") for reason in skipped if reason is not None}))
    if None not in skipped:
        return f"not run: {reasons}"
    refused = ", ".join(sorted({value for case in cases if (value := properties(case)["refused"])}))
    said = f"refused: {refused}" if refused else "yes"
    return f"{said}; {skipped.count(None)} of {len(cases)} tests run: {reasons}" if reasons else said


def properties(case: ElementTree.Element) -> dict[str, str]:
    return {each.get("name", ""): each.get("value", "") for each in case.iter("property")}


def page(results: list[Path]) -> str:
    cells: dict[str, dict[str, list[ElementTree.Element]]] = defaultdict(lambda: defaultdict(list))
    for path in results:
        for case in ElementTree.parse(path).iter("testcase"):
            found = properties(case)
            if "item" in found:
                cells[found["item"]][found["transformers"]].append(case)
    versions = sorted({version for row in cells.values() for version in row})
    lines = [
        f"| | {' | '.join(f'transformers {version}' for version in versions)} |",
        "|---" * (len(versions) + 1) + "|",
    ]
    for name in sorted(cells, key=str.casefold):
        row = [outcome(cells[name][version]) if cells[name][version] else "" for version in versions]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page([Path(argument) for argument in sys.argv[1:]]))
