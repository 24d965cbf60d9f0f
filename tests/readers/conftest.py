"""Checkpoints for the readers."""

import pytest
from real_models import smollm2_directory
from transformers import AutoTokenizer

from lkq_hf.quantization import TwoStageQuantizer

TEXTS = [
    "The cache of a transformer holds a key and a value for every token that it has read. It grows with the text.",
    "In the morning the harbor was quiet. Two boats came in with the tide, and nobody was there to meet them.",
]
SETTINGS = [(bits, sym) for bits in (4, 8, 3, 2) for sym in (True, False)]


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("readers")


@pytest.fixture(scope="session")
def rows():
    tokenizer = AutoTokenizer.from_pretrained(smollm2_directory())
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="session")
def checkpoints(directory):
    """Directories of SmolLM2 at all widths; nearest integers, since what they are does not matter here."""
    made = {}
    for bits, sym in SETTINGS:
        out = directory / f"{bits}-{'sym' if sym else 'asym'}"
        TwoStageQuantizer.from_pretrained(smollm2_directory()).quantize(
            out / "ours", bits=bits, sym=sym, group_size=64, preset="paper", stages=(), num_samples=2, model_seqlen=16,
            dataset=TEXTS,
        )  # fmt: skip
        made[bits, sym] = out
    return made
