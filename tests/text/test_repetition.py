"""No text is read twice without a word: not within a prompt, and not by training and validation."""

import random

import pytest
from small_checkpoint import small_tokenizer

from lkq_hf.text.documents import read_prompts
from lkq_hf.text.passages import Corpus
from lkq_hf.training import split_documents


def numbered(name, count):
    """A text none of whose lines is repeated."""
    return "\n\n".join(f"Line {index} of {name} says {index * 7919}." for index in range(count))


@pytest.mark.parametrize("copies", [1, 3])
def test_a_passage_is_not_filled_with_the_same_text_again(copies):
    corpus = Corpus([{"text": numbered("one", 20)}] * copies + [{"text": numbered("two", 20)}], small_tokenizer())
    for seed in range(20):
        text = corpus.passage(corpus.tokens, random.Random(seed)).text
        lines = [line for line in text.split("\n\n") if line]
        assert len(lines) == len(set(lines)) and len(lines) >= 40
        with pytest.raises(ValueError, match=f"hold {corpus.tokens} tokens, copies not counted, fewer than the"):
            corpus.passage(corpus.tokens + 1, random.Random(seed))


def test_passages_of_enough_text_are_what_they_were():
    corpus = Corpus([{"text": numbered(name, 30)} for name in ("one", "two")], small_tokenizer())
    passage = corpus.passage(corpus.tokens // 4, random.Random(0))
    assert len(passage.ends) == corpus.tokens // 4 and passage.text in "\n\n".join(corpus.texts)


def test_copies_are_not_split_between_training_and_validation(caplog):
    documents = [{"text": text} for text in ("one", "two", " one\n", "three", "two")]
    train, validation = split_documents(documents, 0.4)
    assert sorted(each["text"] for each in (*train, *validation)) == ["one", "three", "two"]
    assert "2 of 5 documents are copies of others and were left out" in caplog.text
    with pytest.raises(ValueError, match=r"got 2 copies of one\. Split a long one"):
        split_documents([{"text": "one"}, {"text": "one"}])
    with pytest.raises(ValueError, match=r"got 1\. Split a long one"):
        split_documents([{"text": "one"}])


def test_copies_of_prompts_are_left_out(tmp_path, caplog):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "one"}')
    assert len(read_prompts(path, small_tokenizer())) == 2
    assert "1 of the 3 prompts" in caplog.text
