"""Finished pieces of a run, on disk, so that a stopped run goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any

from lkq_hf.files import check_note, keep_note, write_json


class Journal:
    """Finished pieces of work, one JSON file each, written whole or not at all.

    Several processes may share a journal: all of them begin with the same arguments, and each writes its own pieces.
    Nothing is written before the first piece, so that a run that ends without one can begin again with others.

    Args:
        directory: the run's output directory; created with the first piece.
        arguments: everything the results depend on, as JSON.

    Raises:
        ValueError: the directory holds a run with other arguments, or files of something else.
    """

    def __init__(self, directory: str | os.PathLike[str], arguments: dict[str, Any]) -> None:
        self.directory = Path(directory)
        self._pieces = self.directory / "journal"
        self._note = self.directory / "run.json"
        self.arguments = check_note(self._note, arguments, begun=self._pieces.exists())

    def _path(self, name: str) -> Path:
        return self._pieces / f"{name}.json"

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def write(self, name: str, piece: Any) -> None:
        """Keeps a finished piece."""
        if not self._pieces.exists():
            keep_note(self._note, self.arguments, begun=False)
            self._pieces.mkdir(exist_ok=True)
        write_json(self._path(name), piece)

    def read(self, name: str) -> Any:
        """A piece that was finished.

        Raises:
            FileNotFoundError: it was not.
        """
        return json.loads(self._path(name).read_text(encoding="utf-8"))
