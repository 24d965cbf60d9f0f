"""The run of an evaluation."""

import json
import os
from typing import Any

from lkq_hf.runs import Run


class Journal:
    """Finished pieces of an evaluation: JSON files in the folder `journal` of its output directory.

    Args:
        directory: the output directory.
        arguments: all that the results depend on, as JSON.

    Raises:
        ValueError: the directory holds a run with other arguments, or pieces without a note.
    """

    def __init__(self, directory: str | os.PathLike[str], arguments: dict[str, Any]) -> None:
        self._run = Run(directory, arguments, "journal/*.json")
        self.arguments = self._run.arguments

    def __contains__(self, name: str) -> bool:
        return _file(name) in self._run

    def write(self, name: str, piece: Any) -> None:
        """Keeps a finished piece, as JSON."""
        text = json.dumps(piece, ensure_ascii=False)
        self._run.write(_file(name), lambda path: path.write_text(text, encoding="utf-8"))

    def read(self, name: str) -> Any:
        """A piece that was finished.

        Raises:
            FileNotFoundError: it was not.
            ValueError: its file is damaged.
        """
        return self._run.read(_file(name), lambda path: json.loads(path.read_text(encoding="utf-8")))


def _file(name: str) -> str:
    return f"journal/{name}.json"
