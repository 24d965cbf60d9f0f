"""Reading documents and prompts from files."""

import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lkq_hf.text.chat import encode_chat

logger = logging.getLogger(__name__)


def read_documents(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Documents, each with ``"text"`` and ``"document"`` (a name), from jsonl, jsonl.gz or plain text files.

    Empty ones are left out.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a line is not a JSON object with a "text", or the files hold no text.
    """
    documents: list[dict[str, Any]] = []
    for path in paths:
        if ".jsonl" not in path.suffixes:
            documents.append({"document": path.name, "text": read_text(path)})
            continue
        for number, row in read_rows(path):
            if not isinstance(row.get("text"), str):
                raise ValueError(f'{path}, line {number}: expected a JSON object with a string "text"')
            documents.append({"document": f"{path.name}:{number}", **row})
    documents = [document for document in documents if document["text"].strip()]
    if not documents:
        raise ValueError(f"no text found in {', '.join(map(str, paths))}")
    return documents


def count_copies(documents: Sequence[dict[str, Any]]) -> int:
    """How many documents have the text of an earlier one."""
    return len(documents) - len({document["text"].strip() for document in documents})


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of prompts from jsonl or jsonl.gz: ``"messages"``, a chat that the tokenizer's own template turns into
    a prompt, or ``"text"``, as it is; ``"answer_prefix"`` may add what the answer starts with. Empty texts are left
    out, and so are copies, with a warning: they would be in training and validation.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is neither, or there are fewer than two different prompts.
    """
    prompts = []
    for number, row in read_rows(path):
        if not isinstance(row.get("messages"), list) and not isinstance(row.get("text"), str):
            raise ValueError(f'{path}, line {number}: expected "messages" (a chat) or "text"')
        prefix = row.get("answer_prefix", "") if "messages" in row else row["text"]
        if "messages" in row or prefix.strip():
            prompts.append(encode_chat(row.get("messages", []), prefix, tokenizer))
    different = list(map(list, dict.fromkeys(map(tuple, prompts))))
    if len(different) < 2:
        raise ValueError(
            f"{path} holds {len(different)} prompts, copies not counted; at least two are needed, one of them for "
            "validation"
        )
    if copies := len(prompts) - len(different):
        logger.warning("%d of the %d prompts in %s are copies of others and were left out", copies, len(prompts), path)
    return different


def read_text(path: Path) -> str:
    """The text of a file, which ``.gz`` may compress.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not text in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    content = path.read_bytes()
    try:
        # With or without the mark that some editors put before UTF-8.
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); compress or copy it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text: expected UTF-8, found byte {error.object[error.start]:#04x} at {error.start}"
        ) from error


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects in a jsonl or jsonl.gz file, each with the number of its line; empty lines are left out.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not a JSON object.
    """
    # Not splitlines, which also ends lines at characters that JSON allows in a string (U+2028).
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        yield number, row
