"""Checks that take milliseconds: of options, and of files and directories that a command reads or writes.

Commands make them before they import torch and transformers, which takes seconds.
"""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lkq_hf.files import bytes_of
from lkq_hf.formats import TOKENIZER_FILES

DTYPES = ("float32", "bfloat16", "float16")
FILE_SUFFIXES = (".gz", ".json", ".jsonl", ".md", ".txt")

# What the library offers, named here because importing the library takes seconds (tests compare both).
ALLOCATIONS = ("global", "layer", "uniform", "profile")
SOFT_ALLOCATIONS = ("global", "layer", "uniform")
SCORERS = ("lookahead", "snapkv", "streaming", "random", "oracle")
TASKS = (
    "needle", "needle_multi_key", "needle_multi_value", "variable_tracking", "frequent_words", "paragraph_question",
    "explain", "summarise", "continue", "question_answering",
)  # fmt: skip
BITS = (2, 3, 4, 8)
PRESETS = ("default", "paper", "refined")


def check_choice(option: str, value: str | int, choices: Sequence[str | int]) -> None:
    """Raises ValueError for a value of an option that is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(str, choices))}; got {value!r}")


def check_dtype(dtype: str, *more: str) -> None:
    """Raises ValueError for a data type that is neither one of the usual ones nor one of ``more``."""
    check_choice("--dtype", dtype, (*DTYPES, *more))


def check_size(option: str, size: str) -> None:
    """Raises ValueError for what is no size in bytes, such as 4.5GiB."""
    try:
        bytes_of(size)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def looks_like_path(name: str) -> bool:
    """Whether a name can only be that of a file or directory: no repository of the Hub has such a name."""
    return bool(re.match(r"[./~]", name)) or "\\" in name or name.endswith("/") or name.count("/") > 1


def check_model_directory(model: str, quantized: bool = True) -> None:
    """Checks a model's directory as far as the names of its files tell; the id of a repository passes.

    Args:
        model: a directory or an id on the Hub.
        quantized: whether it may have an adapter beside it.

    Raises:
        FileNotFoundError: no such directory, or one without a model.
        NotADirectoryError: it is a file.
        ValueError: it holds an adapter and should not, or an adapter and no model or tokenizer.
    """
    directory = Path(model).expanduser()
    if directory.is_file():
        raise NotADirectoryError(f"{model} is a file; expected the directory of a model, or an id on the Hub")
    if not directory.is_dir():
        if looks_like_path(model):
            raise FileNotFoundError(f"there is no directory {model}; expected one with a model, or an id on the Hub")
        return
    names = {path.name for path in directory.iterdir()}
    if "adapter_config.json" in names:
        if not quantized:
            raise ValueError(
                f"{model} holds an adapter (adapter_config.json); expected a directory with a model alone. Name the "
                "base model of the adapter; a LoRA that should become a part of its weights has to be merged before"
            )
        if "config.json" not in names and not names.intersection(TOKENIZER_FILES):
            base = _read_json(directory / "adapter_config.json").get("base_model_name_or_path") or "its base model"
            raise ValueError(
                f"{model} holds an adapter and no model; expected a model, such as the adapter's base model. Pass "
                f"{base} in its place, and the adapter by --adapter where the command has that option"
            )
    elif "config.json" not in names:
        found = ", ".join(sorted(names)[:5]) or "nothing"
        raise FileNotFoundError(f"{model} holds no model: expected a config.json and weights, found {found}")


def check_adapter_directory(adapter: str) -> None:
    """Checks an adapter's directory as far as its files' names and its type tell; the id of a repository passes.

    Raises:
        FileNotFoundError: no such directory.
        NotADirectoryError: it is a file.
        ValueError: it holds no adapter.
    """
    directory = Path(adapter).expanduser()
    if directory.is_file():
        raise NotADirectoryError(f"{adapter} is a file; expected the directory of an adapter, or an id on the Hub")
    if not directory.is_dir():
        if looks_like_path(adapter):
            raise FileNotFoundError(
                f"there is no directory {adapter}; expected one with a lookahead adapter, or an id on the Hub"
            )
    elif not (directory / "adapter_config.json").is_file():
        model = " It holds a model: pass that as MODEL" if (directory / "config.json").is_file() else ""
        raise ValueError(f"{adapter} holds no adapter (adapter_config.json); expected a lookahead adapter.{model}")


def check_targets(directories: Sequence[Path]) -> None:
    """Checks that directories hold what `lkq-hf generate-targets` writes.

    Raises:
        FileNotFoundError: one does not.
    """
    needed = [directory / "train" for directory in directories] + [directories[0] / "validation"]
    for directory in needed:
        if next(directory.glob("shard-*.parquet"), None) is None:
            raise FileNotFoundError(
                f"{directory} holds no responses (shard-*.parquet): make them with lkq-hf generate-targets, or start "
                "that command again if it was stopped"
            )


def check_dataset(dataset: str | None, own_text: float | None) -> None:
    """Checks that there is calibration data: what can only be a file is there; the id of a data set on the Hub passes.

    Args:
        own_text: share of the data that the model writes itself.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a directory.
        ValueError: no data, or a data set that would not be used.
    """
    if (dataset is None) != (own_text == 1):
        raise ValueError(
            f"expected calibration data: either --dataset or --own-text 1, with which the model writes all of it; got "
            f"{'neither' if dataset is None else 'both'}"
        )
    if dataset is None:
        return
    path = Path(dataset).expanduser()
    if path.is_dir():
        raise IsADirectoryError(
            f"{dataset} is a directory; expected a text or .jsonl file, or the id of a data set on the Hub"
        )
    if not path.is_file() and (looks_like_path(dataset) or path.suffix in FILE_SUFFIXES):
        raise FileNotFoundError(f"there is no file {dataset}; expected calibration texts, or an id on the Hub")


def check_writable(out: Path) -> None:
    """Checks that a file or directory can be made, and leaves nothing behind.

    Raises:
        OSError: it cannot; with the directory in which it would be.
    """
    parent = out if out.is_dir() else out.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise type(error)(
            f"{out} cannot be written: {error.strerror} ({parent}); choose another place for --out"
        ) from error


def names_of(option: str, text: str) -> list[str]:
    """The parts of a list parted by commas, each once.

    Raises:
        ValueError: there are none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError(f"{option} expects names or numbers parted by commas; got {text!r}")
    return names


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers of a list parted by commas.

    Raises:
        ValueError: one of them is no positive whole number.
    """
    names = names_of(option, text)
    if not all(name.isdecimal() and int(name) for name in names):
        raise ValueError(f"{option} expects positive whole numbers parted by commas, as in 64,128; got {text!r}")
    return list(map(int, names))


def budgets_of(option: str, text: str) -> list[int | float]:
    """Budgets parted by commas: numbers of entries, or fractions of the prompt.

    Raises:
        ValueError: one of them is neither.
    """
    names = names_of(option, text)
    if not all(re.fullmatch(r"[1-9]\d*|0?\.\d*[1-9]\d*", name) for name in names):
        raise ValueError(
            f"{option} expects positive whole numbers of entries, or fractions of the prompt between 0 and 1, parted "
            f"by commas, as in 64,128,0.1; got {text!r}"
        )
    return [float(name) if "." in name else int(name) for name in names]


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
