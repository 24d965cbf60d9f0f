"""Commands whose options are the fields of one dataclass: a few on the command line, all of them in a YAML file."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from lkq_hf.cli.output import AsJson

Options = TypeVar("Options")


class InFile:
    """Annotates a field that belongs into the file.

    Args:
        help: what the option is.
        checks: of values, as `typer.Option` takes them, such as `min`.
    """

    shown = False

    def __init__(self, help: str, **checks: Any) -> None:
        self.help = help
        self.checks = checks


class Shown(InFile):
    """Annotates a field that `--help` shows."""

    shown = True


@dataclasses.dataclass(frozen=True)
class _Option:
    """A field that has a default."""

    name: str
    kind: Any
    default: Any
    about: InFile


def _options(kind: Any) -> dict[str, _Option]:
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name: _Option(field.name, get_args(hints[field.name])[0], field.default, get_args(hints[field.name])[1])
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }


def dataclass_command(kind: type[Options], run: Callable[[Options], None]) -> Callable[..., None]:
    """A function from which typer makes the command.

    An option on the command line wins over the file, and the file over the default. Options that belong into the file
    are taken on the command line too, with a warning, until the next release.

    Args:
        kind: a dataclass. Fields without default are annotated for typer and required on the command line; the others
            are annotated with `Shown` or `InFile`.
        run: what the command does; its docstring is the help.
    """
    options = _options(kind)

    def command(**given: Any) -> None:
        path = given.pop("config")
        stated = {name: given[name] for name in hints if given[name] not in (None, [])}
        for name in stated.keys() & options.keys():
            if not options[name].about.shown:
                typer.echo(
                    f"--{name.replace('_', '-')} belongs into the file of --config, as {name}: {stated[name]}; the "
                    "next release refuses it on the command line",
                    err=True,
                )
        run(kind(**({} if path is None else read_options(kind, path)) | stated))

    def show(asked: bool) -> None:
        if asked:
            typer.echo(options_as_yaml(kind))
            raise typer.Exit

    hints = get_type_hints(kind, include_extras=True)
    config = typer.Option(help="YAML file with these and further options.", exists=True, dir_okay=False)
    help_config = typer.Option("--help-config", callback=show, is_eager=True, help="Print such a file and exit.")
    parameters = [_parameter(name, options.get(name), hint) for name, hint in hints.items()]
    parameters += [
        _keyword("config", Annotated[Path | None, config], None),
        _keyword("help_config", Annotated[bool, help_config], False),
        _keyword("as_json", AsJson, False),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = run.__doc__
    return command


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _parameter(name: str, option: _Option | None, hint: Any) -> inspect.Parameter:
    if option is None:
        return _keyword(name, hint)
    default = "" if option.default is None else f" Default: {option.default}."
    about = typer.Option(help=option.about.help + default, hidden=not option.about.shown, **option.about.checks)
    # None: not stated, so that the file's value holds.
    return _keyword(name, Annotated[option.kind | None, about], None)


def read_options(kind: Any, path: Path) -> dict[str, Any]:
    """The options in a YAML file, by the names of the dataclass's fields.

    Raises:
        ValueError: it holds something else, or a value that is not offered.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({error})") from error
    if not isinstance(values, dict | None):
        raise ValueError(f"{path} should hold options, each as `name: value`, found {type(values).__name__}")
    values = {str(name).replace("-", "_"): value for name, value in (values or {}).items()}
    options = _options(kind)
    if unknown := sorted(set(values) - set(options)):
        raise ValueError(f"{path} has {unknown[0]!r}, which is no option; expected some of {', '.join(options)}")
    try:
        return {name: _checked(options[name], value) for name, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(option: _Option, value: Any) -> Any:
    kinds = get_args(option.kind) if NoneType in get_args(option.kind) else (option.kind,)
    if value is None and NoneType in kinds:
        return None
    kind = next(each for each in kinds if each is not NoneType)
    if get_origin(kind) is list:
        values = value if isinstance(value, list) else [value]
        return [_converted(option, get_args(kind)[0], each) for each in values]
    return _converted(option, kind, value)


def _converted(option: _Option, kind: type, value: Any) -> Any:
    # YAML takes 3e-3, without a point, for text.
    accepted = {bool: bool, int: int, float: int | float | str, str: int | float | str, Path: str}[kind]
    limits = {end: option.about.checks[end] for end in ("min", "max") if end in option.about.checks}
    try:
        if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
            raise ValueError(value)
        converted = kind(value)
        if not limits.get("min", converted) <= converted <= limits.get("max", converted):
            raise ValueError(value)
    except ValueError:
        expected = f"{kind.__name__} ({', '.join(f'{end} {limit}' for end, limit in limits.items())})"
        raise ValueError(f"{option.name} should be {expected.removesuffix(' ()')}, found {value!r}") from None
    return converted


def options_as_yaml(kind: Any) -> str:
    """A YAML file with every option at its default, and what each is."""
    import yaml

    lines = []
    for option in _options(kind).values():
        value = yaml.safe_dump(option.default, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        lines += [f"# {option.about.help}", f"{option.name}: {value}", ""]
    return "\n".join(lines)
