"""How subcommands report: a line for people, or one JSON object for programs."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, TextIO

import typer

_results: list[TextIO] = []


@contextmanager
def _diverted() -> Iterator[None]:
    """Sends all that is printed to stderr, except what `report` prints."""
    _results.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.pop()


def _divert(context: typer.Context, as_json: bool) -> bool:
    if as_json:
        context.with_resource(_diverted())
    return as_json


AsJson = Annotated[
    bool,
    typer.Option(
        "--json", callback=_divert, help="Print the result as one JSON object, and everything else to stderr."
    ),
]
"""Type of the parameter of a subcommand that ends with `report`."""


def report(text: str, data: dict[str, Any]) -> None:
    """Prints a subcommand's result: `text`, or `data` as one line of JSON with ``--json``."""
    if _results:
        typer.echo(json.dumps(data, default=str), file=_results[-1])
    else:
        typer.echo(text)
