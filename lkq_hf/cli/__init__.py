"""The ``lkq-hf`` command line: one file per subcommand, thin."""

import sys
from typing import Annotated

import typer

from lkq_hf import __version__
from lkq_hf.cli.evaluate import app as evaluate
from lkq_hf.cli.export import export
from lkq_hf.cli.generate_targets import generate_targets
from lkq_hf.cli.inspect import inspect
from lkq_hf.cli.quantize import quantize
from lkq_hf.cli.train import train

app = typer.Typer(
    name="lkq-hf",
    help="Cheap long-context inference for Hugging Face models: cache eviction and low-bit weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate-targets")(generate_targets)
app.command("train")(train)
app.command("quantize")(quantize)
app.command("export")(export)
app.add_typer(evaluate, name="evaluate")
app.command("inspect")(inspect)

_debug = False


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lkq-hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global _debug
    _debug = debug


def main() -> None:
    """Runs the command line. Errors that a user can act on are one line, and the exit code is 1."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError, RuntimeError) as error:
        if _debug:
            raise
        typer.echo(f"lkq-hf: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
