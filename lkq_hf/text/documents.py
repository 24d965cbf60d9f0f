"""Reading documents from files."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_documents(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Documents, each with ``"text"`` and ``"document"`` (a name), from jsonl, jsonl.gz or plain text files.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a line is not a JSON object with a "text", or the files hold no text.
    """
    documents: list[dict[str, Any]] = []
    for path in paths:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if ".jsonl" not in path.suffixes:
            documents.append({"document": path.name, "text": content.decode()})
            continue
        for number, line in enumerate(content.decode().splitlines(), start=1):
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'{path}, line {number}: expected a JSON object with a string "text"')
            documents.append({"document": f"{path.name}:{number}", **row})
    if not any(document["text"].strip() for document in documents):
        raise ValueError(f"no text found in {', '.join(map(str, paths))}")
    return documents
