"""Calibration tokens from every kind of source, and what is said about bad ones."""

import gzip
import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from models import tiny_model
from transformers import AutoModelForCausalLM

from lkq_hf.quantization import TwoStageQuantizer
from lkq_hf.quantization.calibration_data import calibration_tokens


def test_windows_are_full_drawn_by_seed_and_reproducible(texts, tokenizer):
    first, recipe = calibration_tokens(texts, tokenizer, samples=10, length=32, seed=0)
    again, _ = calibration_tokens(texts, tokenizer, samples=10, length=32, seed=0)
    other, other_recipe = calibration_tokens(texts, tokenizer, samples=10, length=32, seed=1)
    assert first.shape == (10, 32) and first.dtype == torch.int64
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert recipe.samples == 10 and recipe.seed == 0 and recipe.dataset == "list of 40 texts"
    assert recipe.tokens_sha256 != other_recipe.tokens_sha256
    assert (first == tokenizer.eos_token_id).any()  # texts are parted


def test_all_sources_give_windows_of_their_text(texts, tokenizer, tmp_path):
    rows = [{"text": text, "other": 1} for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    (tmp_path / "a.txt").write_text("\n".join(texts))
    ids = [tokenizer(text)["input_ids"] for text in texts]
    sources = {
        "strings": texts,
        "rows": rows,
        "tokenized": [{"input_ids": row} for row in ids],
        "dataset": Dataset.from_list(rows),
        "tokenized dataset": Dataset.from_list([{"input_ids": row} for row in ids]),
        "jsonl": tmp_path / "a.jsonl",
        "jsonl name": str(tmp_path / "a.jsonl"),
        "gzip": tmp_path / "a.jsonl.gz",
        "text": tmp_path / "a.txt",
    }
    known = {tuple(row[i : i + 5]) for row in ids for i in range(len(row) - 4)}
    for name, source in sources.items():
        tokens, recipe = calibration_tokens(source, tokenizer, samples=4, length=40)
        windows = [tuple(row[i : i + 5]) for row in tokens.tolist() for i in range(36)]
        assert sum(window in known for window in windows) > 0.6 * len(windows), name
        assert str(tmp_path) not in recipe.dataset


def test_a_seed_draws_other_windows_from_one_long_text(tokenizer, tmp_path):
    (tmp_path / "long.txt").write_text("\n".join(" ".join(f"w{(i * j) % 120}" for j in range(50)) for i in range(200)))
    windows = [calibration_tokens(tmp_path / "long.txt", tokenizer, 4, 32, seed)[0] for seed in (0, 1)]
    assert not torch.equal(*windows)


def test_every_window_starts_with_the_begin_token_where_the_tokenizer_adds_one(texts, beginning):
    tokens, _ = calibration_tokens(texts, beginning, samples=6, length=20)
    assert (tokens[:, 0] == beginning.bos_token_id).all() and tokens.shape == (6, 20)


def test_rows_of_token_ids_need_no_tokenizer():
    rows = [{"input_ids": list(range(i, i + 20))} for i in range(0, 100, 20)]
    for source in (rows, Dataset.from_list(rows)):
        tokens, recipe = calibration_tokens(source, None, samples=5, length=20)
        assert sorted(row[0] for row in tokens.tolist()) == [0, 20, 40, 60, 80]
        assert recipe.tokenizer is None
    with pytest.raises(ValueError, match=r"holds texts, and no tokenizer was found.*pass tokenizer=, or rows with"):
        calibration_tokens(["some text"], None, samples=1, length=2)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_model_without_a_tokenizer_is_calibrated_on_rows_alone(architecture, texts, tmp_path):
    """transformers makes an empty tokenizer where GPT-2's files are missing, and none for Llama."""
    tiny_model(architecture, num_hidden_layers=1).save_pretrained(tmp_path / "base")
    rows = [{"input_ids": torch.randint(3, 160, (40,), generator=torch.Generator().manual_seed(0)).tolist()}]
    options = {"bits": 4, "group_size": 32, "num_samples": 2, "model_seqlen": 16}
    quantizer = TwoStageQuantizer.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="holds texts, and no tokenizer was found"):
        quantizer.quantize(tmp_path / "out", dataset=texts, **options)
    model = quantizer.quantize(tmp_path / "out", dataset=rows, **options)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 20).unsqueeze(0)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises((OSError, ValueError)):
        quantizer.quantize(tmp_path / "other", dataset=rows, tokenizer=str(tmp_path / "no-tokenizer"), **options)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "contains no text"),
        (["", "  "], ValueError, "contains no text"),
        (["w1 w2 w3"], ValueError, "windows of 32 tokens need 128 tokens and it has 4"),
        ([{"body": "w1"}], ValueError, r"its fields are \['body'\]. Name the field with text_column"),
        ([3], TypeError, "must be a text or a dict, found int"),
        (3, TypeError, "must be a list of texts"),
        ("missing.jsonl", FileNotFoundError, "missing.jsonl does not exist"),
        (
            DatasetDict({"train": Dataset.from_list([{"text": "w1"}])}),
            TypeError,
            r"one split, found a dict of \['train'\]",
        ),
    ],
)
def test_bad_sources_are_explained(source, error, message, tokenizer):
    with pytest.raises(error, match=message):
        calibration_tokens(source, tokenizer, samples=4, length=32)


def test_a_hub_dataset_is_streamed_with_its_configuration(texts, tokenizer, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_list([{"text": text} for text in texts]).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    tokens, recipe = calibration_tokens("owner/corpus:part", tokenizer, samples=4, length=32)
    assert tokens.shape == (4, 32) and recipe.dataset == "owner/corpus:part"
    assert asked == [(("owner/corpus", "part"), {"split": "train", "streaming": True})]


def test_a_broken_line_is_named(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}\n{"text": ')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        calibration_tokens(tmp_path / "a.jsonl", tokenizer, samples=1, length=8)
