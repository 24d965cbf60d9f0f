import gzip
import json
from pathlib import Path

import pytest
from real_models import smollm2_directory
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lkq_hf.text.documents import read_documents, read_prompts


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_directory())


def test_documents_from_all_kinds_of_files(tmp_path: Path) -> None:
    plain, lines, packed = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz"
    plain.write_text("plain text")
    lines.write_text(json.dumps({"text": "one", "source": "s"}) + "\n" + json.dumps({"text": "two", "document": "d"}))
    packed.write_bytes(gzip.compress(json.dumps({"text": "three"}).encode()))
    documents = read_documents([plain, lines, packed])
    assert [document["text"] for document in documents] == ["plain text", "one", "two", "three"]
    assert [document["document"] for document in documents] == ["a.txt", "b.jsonl:1", "d", "c.jsonl.gz:1"]


def test_lines_end_where_jsonl_ends_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["one\u2028two\u2029three", "four\x85five", "six"]
    path.write_text("\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), newline="")
    assert [document["text"] for document in read_documents([path])] == texts


def test_blank_lines_and_empty_documents_are_left_out(tmp_path: Path) -> None:
    path, empty = tmp_path / "a.jsonl", tmp_path / "empty.txt"
    path.write_text('\n{"text": "one"}\n \r\n{"text": ""}\n{"text": " \\n"}\n{"text": "two"}\n\n')
    empty.touch()
    documents = read_documents([empty, path])
    assert [(each["document"], each["text"]) for each in documents] == [("a.jsonl:2", "one"), ("a.jsonl:6", "two")]


@pytest.mark.parametrize("line", ['{"title": "no text"}', "[1, 2]", "not json"])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line)
    with pytest.raises(ValueError, match="line 2"):
        read_documents([path])


def test_files_without_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("  \n")
    with pytest.raises(ValueError, match="no text"):
        read_documents([path])


@pytest.mark.real_model
def test_prompts_go_through_the_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "Who wrote it?"}]
    rows = [{"messages": chat, "answer_prefix": "It was"}, {"text": ""}, {"text": "Once upon a time"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_prompts(path, tokenizer)
    assert tokenizer.decode(first).endswith("Who wrote it?<|im_end|>\n<|im_start|>assistant\nIt was")
    assert tokenizer.decode(second) == "Once upon a time"


@pytest.mark.real_model
def test_too_few_prompts_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "alone"}')
    with pytest.raises(ValueError, match="at least two"):
        read_prompts(path, tokenizer)
