"""Calibration tokens: texts from wherever they are, packed to windows of one length with a seed."""

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lkq_hf.text.documents import read_rows, read_text
from lkq_hf.text.text_start import text_start

if TYPE_CHECKING:
    import datasets

CalibrationSource: TypeAlias = Union[
    str, Path, Sequence[str], Sequence[dict[str, Any]], "datasets.Dataset", "datasets.IterableDataset"
]

# A long text is cut into pieces of this many characters per token of a window before the pieces are shuffled, so that
# a seed also draws different windows from a single file.
CHARACTERS_PER_TOKEN = 8
# Of a large dataset this many times the characters that are probably needed are read, not all of it.
OVERSAMPLING = 4


@dataclass(frozen=True)
class CalibrationRecipe:
    """How the calibration tokens came to be: goes into a checkpoint's `meta`.

    Of `samples` windows the model wrote `written_by_model` (`own_text.write_windows`); the others are of the dataset.
    """

    dataset: str | None
    tokenizer: str | None
    samples: int
    length: int
    seed: int
    tokens_sha256: str
    written_by_model: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_tokenizer(
    given: PreTrainedTokenizerBase | str | None, model: str | Path | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer to calibrate with: the given one, or that of the model; none where the model has none.

    Args:
        given: a tokenizer, or the directory or Hub id of one.
        model: directory or Hub id of the model, if it has one.

    Raises:
        OSError, ValueError: a given name has no tokenizer.
    """
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is not None:
        return AutoTokenizer.from_pretrained(given)
    if not model:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return None
    # Where the files are missing, transformers makes some tokenizers without a vocabulary.
    return tokenizer if tokenizer("a")["input_ids"] else None


def calibration_tokens(
    source: CalibrationSource,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    text_column: str = "text",
) -> tuple[Tensor, CalibrationRecipe]:
    """Tokenizes texts and packs them into windows without padding.

    Texts are shuffled with `seed`, joined (with the end-of-text token between them, where the tokenizer has one) and
    cut into windows. Every window starts with what stands before all texts of the model (`text_start`).

    Args:
        source: a list of texts, a list of dicts with `input_ids`, a `datasets` dataset with a column `text_column` or
            `input_ids`, a text file, a `.jsonl` file with a field `text_column` (either may be gzipped), or a Hub
            dataset id (`"id"` or `"id:configuration"`, split `train`, streamed).
        tokenizer: `None` where the source holds `input_ids` alone; these are then only joined and cut.
        samples: number of windows.
        length: tokens in a window.

    Returns:
        Token ids, int64 `[samples, length]`, and the recipe.

    Raises:
        FileNotFoundError: a path that does not exist.
        TypeError: a source of another kind.
        ValueError: an empty source, a missing column, texts without a tokenizer, or too little text; nothing is padded
            or repeated.
    """
    start = [] if tokenizer is None else text_start(tokenizer)
    shortest = max(2, len(start) + 1)
    if samples < 1 or length < shortest:
        raise ValueError(
            f"calibration needs samples >= 1 and length >= {shortest}, found samples={samples}, length={length}"
        )
    body = length - len(start)
    enough = samples * length * CHARACTERS_PER_TOKEN * OVERSAMPLING
    shuffler = random.Random(seed)
    documents = _documents(source, text_column, enough, shuffler)
    separator = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[str | list[int]] = []
    for document in documents:
        pieces.extend(_cut(document, CHARACTERS_PER_TOKEN * length) if isinstance(document, str) else [document])
    if not pieces:
        raise ValueError(f"the calibration dataset ({_describe(source)}) contains no text")
    shuffler.shuffle(pieces)
    stream: list[int] = []
    for piece in pieces:
        if not isinstance(piece, str):
            ids = piece
        elif tokenizer is None:
            raise ValueError(
                f"the calibration dataset ({_describe(source)}) holds texts, and no tokenizer was found beside the "
                "model; pass tokenizer=, or rows with 'input_ids'"
            )
        else:
            ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        stream.extend(ids)
        stream.extend(separator)
        if len(stream) >= samples * body:
            break
    if len(stream) < samples * body:
        raise ValueError(
            f"the calibration dataset ({_describe(source)}) is too short: {samples} windows of {length} tokens need "
            f"{samples * length} tokens and it has {len(stream)}; give more text, or lower num_samples or model_seqlen"
        )
    windows = torch.tensor(stream[: samples * body], dtype=torch.int64).view(samples, body)
    tokens = torch.cat([torch.tensor(start, dtype=torch.int64).expand(samples, -1), windows], dim=1)
    recipe = CalibrationRecipe(
        dataset=_describe(source),
        tokenizer=tokenizer_name(tokenizer),
        samples=samples,
        length=length,
        seed=seed,
        tokens_sha256=digest(tokens),
    )
    return tokens, recipe


def tokenizer_name(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """What a recipe calls a tokenizer: no directory of this machine."""
    return None if tokenizer is None else Path(tokenizer.name_or_path).name


def check_vocabulary(tokens: Tensor, model: PreTrainedModel) -> None:
    """Raises ValueError for token ids that the model does not know."""
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    if bool((tokens >= vocabulary).any()):
        raise ValueError(
            "the calibration data has token ids beyond the model's vocabulary; pass the model's own tokenizer, or "
            "rows of input_ids that it made"
        )


def digest(tokens: Tensor) -> str:
    """The SHA-256 of tokens."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _documents(source: Any, text_column: str, enough: int, shuffler: random.Random) -> Iterable[str | list[int]]:
    if isinstance(source, str | Path) and _is_file_name(source):
        return _read_file(Path(source), text_column)
    if isinstance(source, str):
        from datasets import load_dataset

        name, _, configuration = source.partition(":")
        source = load_dataset(name, configuration or None, split="train", streaming=True)
    if _is_dataset(source):
        if isinstance(source, dict):
            raise TypeError(f"expected one split, found a dict of {sorted(source)}; pass for example dataset['train']")
        shuffled = source.shuffle(seed=shuffler.randrange(2**31))
        return _take((_field(row, text_column) for row in shuffled), enough)
    if isinstance(source, Sequence):
        return [_field(row, text_column) for row in source]
    raise TypeError(
        "calibration data must be a list of texts, a datasets.Dataset, a text or .jsonl file, or a Hub dataset id; "
        f"found {type(source).__name__}"
    )


def _is_dataset(value: Any) -> bool:
    """Whether a value is of the datasets library, which takes seconds to import and is not needed for plain texts."""
    library = sys.modules.get("datasets")
    if library is None:
        return False
    return isinstance(
        value,
        (library.Dataset, library.IterableDataset, library.DatasetDict, library.IterableDatasetDict),
    )


def _is_file_name(source: str | Path) -> bool:
    path = Path(source)
    if path.is_file():
        return True
    if isinstance(source, Path) or path.suffix in {".jsonl", ".json", ".txt", ".md", ".gz"}:
        raise FileNotFoundError(f"the calibration file {path} does not exist")
    return False


def _read_file(path: Path, text_column: str) -> Iterator[str | list[int]]:
    if {".jsonl", ".json"} & set(path.suffixes):
        yield from (_field(row, text_column) for _, row in read_rows(path))
    else:
        yield read_text(path)


def _field(row: Any, text_column: str) -> str | list[int]:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        if isinstance(row.get(text_column), str):
            return row[text_column]
        if "input_ids" in row:
            return torch.as_tensor(row["input_ids"]).flatten().tolist()
        raise ValueError(
            f"a calibration row has neither a text in {text_column!r} nor 'input_ids'; its fields are {sorted(row)}. "
            "Name the field with text_column"
        )
    raise TypeError(f"a calibration row must be a text or a dict, found {type(row).__name__}")


def _take(documents: Iterable[str | list[int]], enough: int) -> Iterator[str | list[int]]:
    read = 0
    for document in documents:
        yield document
        read += len(document) if isinstance(document, str) else len(document) * CHARACTERS_PER_TOKEN
        if read >= enough:
            return


def _cut(text: str, size: int) -> list[str]:
    """Pieces of about `size` characters that end at line ends; blank pieces are dropped."""
    lines = (line[i : i + size] for line in text.splitlines(keepends=True) for i in range(0, len(line), size))
    pieces, piece = [], ""
    for line in lines:
        if piece and len(piece) + len(line) > size:
            pieces.append(piece)
            piece = ""
        piece += line
    return [piece for piece in [*pieces, piece] if piece.strip()]


def _describe(source: Any) -> str:
    if isinstance(source, Path) or (isinstance(source, str) and Path(source).is_file()):
        return f"file {Path(source).name}"
    if isinstance(source, str):
        return source
    if _is_dataset(source):
        info = source.info
        return f"datasets.Dataset {info.dataset_name or ''} {info.config_name or ''}".strip()
    return f"list of {len(source)} texts"
