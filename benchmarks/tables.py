"""Recorded results, and tables of them in Markdown. Tables without arithmetic are declared in tables.yaml.

A cell is text with places ``{PATH:FORMAT}``. PATH leads into a row of the table, or else into its results file, by
keys that ``::`` parts:

    a, 0                   a key, a place in a list
    batch=1&cache=static   the row of a list that has these values
    mean                   of a list or mapping without such a key
    @FILE                  another results file; only in front
    machine, place, gpu    the line about the machine; its device; its GPU in short. Only in front
    <key>                  inside of a path: the row's value of that name

FORMAT is as in Python, and may have a factor: ``100*.0f``, ``MiB*,.0f`` or ``KEY*.0f``, a key of the row. A cell whose
place is not there is left empty, or is what stands behind ``|``; a column without any cell is left out.
"""

import functools
import json
import re
import statistics
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).parent / "results"
DECLARATIONS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
UNITS = {"MiB": 2**-20, "GiB": 2**-30, "MB": 1e-6, "min": 1 / 60}
PLACE = re.compile(r"\{((?:[^{}:|]|::)+)(?::(?!:)([^{}|]*))?(?:\|([^{}]*))?\}")


@functools.cache
def load(name: str) -> Any:
    """A recorded results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def machine(about: Mapping[str, Any]) -> str:
    """One line for a page, of what `describe` or `lkq_hf.evaluation.environment` wrote, or of results that hold it."""
    for key in ("about", "environment", "hardware"):
        if "versions" in about.get(key, ()):
            return machine(about[key])
    hardware = about.get("hardware") or {}
    if isinstance(hardware, str):
        hardware = {"name": hardware}
    place = about.get("gpu") or hardware.get("name") or f"CPU ({about.get('cpu')}, threads: {about.get('threads')})"
    return f"{place}; {', '.join(f'{name} {number}' for name, number in about['versions'].items())}"


def look_up(found: Any, path: str) -> Any:
    """What lies at a path.

    Raises:
        LookupError: nothing does.
    """
    first, *steps = re.sub(r"<(\w+)>", lambda name: str(found[name[1]]), path).split("::")
    if first.startswith("@"):
        found, (first, *steps) = load(first[1:]), steps
    if first in ("machine", "place", "gpu"):
        line = machine(found)
        place = line.split(";")[0]
        return {"machine": line, "place": place, "gpu": place.removeprefix("NVIDIA ").split(" ")[0]}[first]
    for step in (first, *steps):
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif step == "mean":
            found = statistics.fmean(found.values() if isinstance(found, Mapping) else found)
        elif isinstance(found, Sequence) and "=" in step:
            wanted = dict(condition.split("=", 1) for condition in step.split("&"))
            fitting = [row for row in found if all(str(row.get(key)) == value for key, value in wanted.items())]
            found = fitting[0]
        elif isinstance(found, Sequence):
            found = found[int(step)]
        else:
            raise KeyError(step)
    return found


def shown(value: Any, form: str, row: Mapping[str, Any]) -> str:
    """A value in a format that may have a factor."""
    factor, _, form = form.rpartition("*")
    if factor:
        value *= UNITS.get(factor) or (float(factor) if factor[0].isdigit() else row[factor])
    return format(value, form)


def filled(text: str, row: Mapping[str, Any]) -> str:
    """A cell."""

    def fill(place: re.Match[str]) -> str:
        try:
            return shown(look_up(row, place[1]), place[2] or "", row)
        except LookupError:
            if place[3] is None:
                raise
            return place[3]

    try:
        return PLACE.sub(fill, text)
    except LookupError:
        return ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def columns(rows: Sequence[Mapping[str, Any]], cells: Mapping[str, str]) -> str:
    """A table of rows, by the titles and the contents of its columns."""
    found = {title: [filled(text, row) for row in rows] for title, text in cells.items()}
    found = {filled(title, rows[0]): column for title, column in found.items() if any(column)}
    return table(list(found), list(zip(*found.values(), strict=True)))


def declared(name: str, results: Any = None) -> str:
    """A table of tables.yaml, of its own results file or of other results.

    A declaration has ``columns``, cells by title, and mostly a ``file``. Its ``rows`` are the path of a list or of a
    mapping (a key is its row's ``name``), or rows by ``title``, as keys of the file or as values. ``where`` chooses
    some, by values.
    """
    declaration = DECLARATIONS[name]
    if results is None:
        results = load(declaration["file"]) if "file" in declaration else {}
    source = declaration["rows"]
    if isinstance(source, Mapping):
        rows = [{"title": title} | (look_up(results, at) if isinstance(at, str) else at)
                for title, at in source.items() if not isinstance(at, str) or at in results]  # fmt: skip
    else:
        rows = look_up(results, source)
        if isinstance(rows, Mapping):
            rows = [{"name": key} | row for key, row in rows.items()]
    where = declaration.get("where", {})
    rows = [row for row in rows if all(row[key] == value for key, value in where.items())]
    mark = {True: " *", False: ""}
    return columns(
        [ChainMap(row, {"mark": mark[bool(row.get("earlier"))]}, results) for row in rows], declaration["columns"]
    )
