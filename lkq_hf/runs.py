"""Runs that can be stopped and started again: finished pieces, and a note of what they depend on.

Each piece is a file that is whole or absent. The note, `run.json`, is left with the first piece: a run that fails
before then can begin again with other arguments. Started again with the same arguments, a run goes on after its
pieces; with other arguments it is refused.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from lkq_hf.files import PIECES, naming, read_json, remove_partial, write_atomically, write_json

NOTE = "run.json"
"""Name of the note."""

Content = TypeVar("Content")


class Run:
    """A directory with the finished pieces of a run.

    Several processes may share it: all of them begin with the same arguments, and each writes pieces of its own.

    Args:
        directory: created with the first piece; `None` for a run that keeps nothing.
        arguments: all that the pieces depend on, as JSON.
        pieces: pattern of the pieces' names, such as `"block-*.safetensors"`.
        writes: whether this process writes; others only read.

    Raises:
        ValueError: the directory holds a run with other arguments, or pieces without a note.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        arguments: dict[str, Any],
        pieces: str,
        writes: bool = True,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.writes = writes
        # As JSON makes it: tuples become lists.
        self.arguments: dict[str, Any] = json.loads(json.dumps(arguments))
        self._begun = self.directory is not None and next(self.directory.glob(pieces), None) is not None
        self._check_note()

    def _check_note(self) -> None:
        if self.directory is None:
            return
        note = self.directory / NOTE
        if note.exists():
            if changes := note_changes(read_json(note), self.arguments):
                raise ValueError(
                    f"{self.directory} holds a run with other arguments ({'; '.join(changes)}). The same arguments go "
                    "on with it; for others, name another directory, or delete this one"
                )
        elif self._begun:
            raise ValueError(
                f"{self.directory} holds results but no {NOTE} that says how they were made: name another directory, "
                "or delete this one"
            )

    def begin(self) -> None:
        """Leaves the note, or compares it with one that another process has left meanwhile.

        Raises:
            ValueError: that process has other arguments.
        """
        self._check_note()
        if self.directory is None or not self.writes or (self.directory / NOTE).exists():
            return
        with naming(self.directory / NOTE):
            self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self.directory / NOTE, self.arguments)

    def __contains__(self, name: object) -> bool:
        """Whether a piece is finished."""
        return self.directory is not None and (self.directory / str(name)).exists()

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Keeps a finished piece.

        Args:
            name: of its file, in the directory.
            write: writes the file whose path it is given.
        """
        if self.directory is None or not self.writes:
            return
        self.begin()
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, write)

    def read(self, name: str, read: Callable[[Path], Content]) -> Content:
        """A piece that was finished.

        Args:
            name: of its file.
            read: reads the file whose path it is given.

        Raises:
            FileNotFoundError: it was not finished.
            ValueError: the file is damaged.
        """
        if self.directory is None:
            raise FileNotFoundError(f"the run keeps no pieces, so there is no {name}")
        return read_piece(self.directory / name, read)

    def remove_partial(self) -> None:
        """Removes what killed processes left beside the pieces, when no process writes any more."""
        if self.directory is not None:
            remove_partial(self.directory)


def read_piece(path: Path, read: Callable[[Path], Content]) -> Content:
    """What `read` makes of a finished piece.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    try:
        return read(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the run makes it again") from error


def note_changes(found: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two notes, in words; of mappings in them only the keys that differ."""
    changes = []
    for name in {**found, **now}:
        was, becomes = found.get(name, "not noted"), now.get(name, "not noted")
        if isinstance(was, dict) and isinstance(becomes, dict):
            was, becomes = (
                {key: each[key] for key in each if was.get(key) != becomes.get(key)} for each in (was, becomes)
            )
        if was != becomes:
            changes.append(f"{name} was {was!r}, now {becomes!r}")
    return changes


def pieces_directory(target: Path) -> Path:
    """Where a run keeps the finished pieces of a directory until all of them are there.

    That is beside it, or inside if the directory is there already: what is beside a mount point may be a small disk,
    or be lost with a container.
    """
    beside = target.with_name(target.name + PIECES)
    return target / PIECES if target.is_dir() and not beside.exists() else beside
