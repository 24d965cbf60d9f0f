"""Recorded results, and tables in Markdown."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> Any:
    """A recorded results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def columns(rows: Sequence[Mapping[str, Any]], cells: str) -> str:
    """A table of rows. What a row lacks is left empty, and so is a column that no row has.

    Args:
        rows: one mapping a row.
        cells: title and content of each column, as for `str.format_map`: ``"batch={batch} | ms={ms:.1f}"``.
    """

    def cell(row: Mapping[str, Any], text: str) -> str:
        try:
            return text.format_map(row)
        except KeyError:
            return ""

    found = [(title.strip(), [cell(row, text) for row in rows])
             for title, _, text in (part.strip().partition("=") for part in cells.split(" | "))]  # fmt: skip
    found = [column for column in found if any(column[1])]
    return table([title for title, _ in found], list(zip(*(column for _, column in found), strict=True)))


def machine(about: Mapping[str, Any]) -> str:
    """One line for a page, of what `describe` or `lkq_hf.evaluation.environment` wrote."""
    hardware = about.get("hardware") or {}
    place = about.get("gpu") or hardware.get("name") or f"CPU ({about.get('cpu')}, threads: {about.get('threads')})"
    return f"{place}; {', '.join(f'{name} {number}' for name, number in about['versions'].items())}"
