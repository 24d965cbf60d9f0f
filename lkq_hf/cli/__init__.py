"""The ``lkq-hf`` command line: one file per subcommand, thin."""

import sys
from typing import Annotated, Any, NoReturn

import typer

from lkq_hf import __version__
from lkq_hf.cli.evaluate import app as evaluate
from lkq_hf.cli.export import export
from lkq_hf.cli.generate_targets import generate_targets
from lkq_hf.cli.inspect import inspect
from lkq_hf.cli.messages import in_words_of_options
from lkq_hf.cli.profile import profile
from lkq_hf.cli.push import push
from lkq_hf.cli.quantize import quantize
from lkq_hf.cli.train import train

app = typer.Typer(
    name="lkq-hf",
    help="Cheap long-context inference for Hugging Face models: cache eviction and low-bit weights.",
    epilog="Errors are one line (exit code 1; 2 for wrong options). `lkq-hf COMMAND --help` explains a command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes leave half a terminal for the text
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate-targets")(generate_targets)
app.command("train")(train)
app.command("profile")(profile)
app.command("quantize")(quantize)
app.command("export")(export)
app.command("push")(push)
app.add_typer(evaluate, name="evaluate")
app.command("inspect")(inspect)

# What a user can act on is told by its text alone; the name of any other error is part of what happened.
_EXPLAINED = (ValueError, TypeError, OSError, NotImplementedError, RuntimeError, ImportError)

# click's, of which typer brings a copy or uses the installed one, depending on its version.
_UsageError: Any = typer.BadParameter.__base__

# After Ctrl-C, as a shell says it.
_INTERRUPTED = 130

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
    """Runs the command line.

    The exit code is 0, 1 after an error, 2 for wrong options, or 130 after Ctrl-C; errors are one line on stderr.
    """
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        text, command = error.format_message(), error.ctx.command_path if error.ctx else "lkq-hf"
        # Without a command, the message is the help.
        _exit(2, text if "\n" in text else f"lkq-hf: {text.rstrip('.')}; see {command} --help")
    except typer.Abort:
        code = _INTERRUPTED
    except Exception as error:
        if _debug:
            raise
        text = in_words_of_options(" ".join(str(error).split()), typer.main.get_command(app), sys.argv[1:])
        if not isinstance(error, _EXPLAINED):
            text = f"{type(error).__name__}: {text} (lkq-hf --debug shows where)"
        _exit(1, f"lkq-hf: {text or type(error).__name__}")
    if code == _INTERRUPTED:
        typer.echo("lkq-hf: stopped", err=True)
    sys.exit(code or 0)


def _exit(code: int, text: str) -> NoReturn:
    typer.echo(text, err=True)
    sys.exit(code)
