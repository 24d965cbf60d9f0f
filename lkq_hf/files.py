"""Files and directories that appear whole or not at all, whenever a process is killed or a disk is full."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PARTIAL_PREFIX = ".partial-"
"""Begins the name of a file that is being written. One that stays was begun by a process that was killed."""

SAVING = ".saving"
"""Name, or end of the name, of a directory that is being written."""

PIECES = ".partial"
"""Name, or end of the name, of the directory of a run's finished pieces."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names `path` in errors of writing that name no file, as when the disk is full.

    Raises:
        OSError: in place of an `OSError` without a file, and of what safetensors and `torch.save` raise.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise _named(path, error.errno, error) from error
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        raise _named(path, int(found[1]) if found else None, error) from error
    except RuntimeError as error:
        if not re.search("PytorchStreamWriter|unexpected pos", str(error)):
            raise
        raise _named(path, None, error) from error


def _named(path: Path, number: int | None, error: Exception) -> OSError:
    if number is None:
        return OSError(f"{path} cannot be written: {error}")
    return OSError(number, os.strerror(number), str(path))


def bytes_of(size: str | int) -> int:
    """A size in bytes: a number, or a number with one of the units kB, MB, GB, KiB, MiB, GiB.

    Raises:
        ValueError: it is something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKMG])(i?)B)?", str(size).strip())
    if found is None:
        raise ValueError(f"expected a size such as 4.5GiB or 800MB, found {size!r}")
    number, unit, binary = found.groups()
    power = 0 if unit is None else "KMG".index(unit.upper()) + 1
    return int(float(number) * (1024 if binary else 1000) ** power)


def check_safetensors(path: Path) -> None:
    """Checks that a file of tensors is whole, as far as its header tells.

    Raises:
        ValueError: it is damaged or truncated.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); write or copy it again") from error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file that takes its place when it is complete; until then, what was there stays.

    Several processes may write the same file: each writes one of its own, and the last one to finish stays.

    Args:
        path: the file; its directory exists.
        write: writes the file whose path it is given, which has the ending of `path`.
    """
    partial = path.with_name(f"{PARTIAL_PREFIX}{secrets.token_hex(8)}-{path.name}")
    try:
        with naming(path):
            partial.touch(exist_ok=False)
            mode = partial.stat().st_mode
            write(partial)
            # safetensors replaces the file by one that only its owner may read.
            partial.chmod(mode)
            # Without this, a machine that loses power may have the new name and not the content. The name itself may
            # get lost: then the old file is there.
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8 as `write_atomically` does."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file as `write_atomically` does."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); save it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold a JSON object, found {type(values).__name__}; save it again")
    return values


def remove_partial(directory: Path) -> None:
    """Removes what killed processes left in a directory where nobody writes any more."""
    for partial in directory.glob(f"{PARTIAL_PREFIX}*"):
        partial.unlink(missing_ok=True)


def check_free(directory: Path) -> None:
    """Refuses a directory that has contents, other than what a stopped run left to be gone on with.

    Raises:
        FileExistsError: it is a file or not empty.
    """
    if directory.is_file() or (directory.is_dir() and {path.name for path in directory.iterdir()} - {SAVING, PIECES}):
        raise FileExistsError(f"{directory} exists and is not an empty directory; choose another one or remove it")


def _begin_anew(directory: Path) -> None:
    """Makes an empty directory in the place of one that a killed process may have left."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A directory inside of `target`, for files that move out of it when they are whole.

    Both are made if there are none. At the end the inner one is removed with what is left in it.
    """
    directory = target / SAVING
    _begin_anew(directory)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory whose contents are those of `target` when the block ends without an error.

    It is renamed, so that `target` appears whole. A directory that is there already is filled instead, since a mount
    point, or where somebody works, cannot be replaced; config.json, without which it is no checkpoint, comes last.
    A process that was killed leaves the new directory under a name that the next one finds and begins anew.

    Raises:
        FileExistsError: `target` is a file or not empty.
    """
    target = target.resolve()
    check_free(target)
    filled = target.is_dir()
    temporary = target / SAVING if filled else target.with_name(f".{target.name}{SAVING}")
    _begin_anew(temporary)
    moved: list[Path] = []
    try:
        with naming(target):
            yield temporary
            if filled:
                for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                    moved.append(target / path.name)
                    path.rename(moved[-1])
                temporary.rmdir()
            else:
                temporary.rename(target)
    except BaseException:
        for path in (*moved, temporary):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise
