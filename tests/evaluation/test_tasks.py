import inspect
import json
import random

import pytest
from real_models import smollm2_directory

from lkq_hf.evaluation.tasks import TASKS, Corpus, QuestionAnswering, build_task, needles, reading, tracking
from lkq_hf.text.chat import encode_chat
from lkq_hf.training import phrasings


@pytest.fixture(scope="module")
def corpus():
    from transformers import AutoTokenizer

    rng = random.Random(0)
    vocabulary = [f"{a}{b}{c}" for a in ("gra", "pel", "tor", "min") for b in "eiou" for c in ("nt", "ster", "lo")]

    def paragraph():
        sentences = (" ".join(rng.choices(vocabulary, k=rng.randint(9, 20))).capitalize() + "." for _ in range(4))
        return " ".join(sentences)

    documents = [{"text": "\n\n".join(paragraph() for _ in range(30)), "document": f"d{i}"} for i in range(6)]
    return Corpus(documents, AutoTokenizer.from_pretrained(smollm2_directory()))


def text_of(example):
    return example["messages"][-1]["content"]


@pytest.mark.real_model
@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("length", [600, 1500])
def test_every_task_gives_seeded_prompts_of_exactly_the_length(corpus, kind, length):
    examples = list(build_task(kind, corpus, seed=3).examples(4, length))
    for example in examples:
        assert len(example["input_ids"]) == length
        assert example["input_ids"] == encode_chat(example["messages"], example["answer_prefix"], corpus.tokenizer)
        assert example["kind"] == kind
    assert examples == list(build_task(kind, corpus, seed=3).examples(4, length))
    assert examples[0] != build_task(kind, corpus, seed=4).example(0, length)
    assert len({text_of(example) for example in examples}) == 4


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("kind", "planted", "asked"), [("needle", 1, 1), ("needle_multi_key", 4, 1), ("needle_multi_value", 3, 3)]
)
def test_needles_are_planted_and_asked_for(corpus, kind, planted, asked):
    for example in build_task(kind, corpus).examples(10, 700):
        body, question = text_of(example).rsplit("\n\n", 1)
        statements = [part.split(".")[0] for part in body.split("One special magic number for ")[1:]]
        assert len(statements) == planted
        key = question.split(" for ")[1].split(" in the text")[0]
        expected = {statement.split(": ")[1] for statement in statements if statement.startswith(f"{key} is")}
        assert expected == set(example["reference"]) and len(expected) == asked
        assert all(5 <= len(value) <= 7 for value in expected)
        assert key in example["answer_prefix"]


@pytest.mark.real_model
def test_variables_are_assigned_before_they_are_used(corpus):
    for example in build_task("variable_tracking", corpus).examples(10, 700):
        assignments = [part.split(".")[0].split(" = ") for part in text_of(example).split("VAR ")[1:]]
        known = {assignments[0][1]}
        assert assignments[0][1].isdigit()
        for name, source in assignments:
            assert source in known
            known.add(name)
        assert [name for name, _ in assignments] == example["reference"]


@pytest.mark.real_model
def test_frequent_words_are_the_most_frequent_in_the_list_as_it_was_cut(corpus):
    for length in (500, 1100):
        example = build_task("frequent_words", corpus).example(0, length)
        words = text_of(example).split("\n\n")[1].split(", ")[:-1]
        ranked = sorted(set(words), key=words.count, reverse=True)
        assert ranked[:3] == example["reference"]
        assert words.count(ranked[2]) > words.count(ranked[3])


@pytest.mark.real_model
def test_the_left_out_word_is_asked_for(corpus):
    example = build_task("paragraph_question", corpus).example(1, 700)
    document, question = text_of(example).rsplit("\n\n", 1)
    sentence = question.split('"')[1]
    assert sentence.replace("[...]", example["reference"][0]) in " ".join(document.split())


@pytest.mark.real_model
def test_the_users_questions_are_asked_over_their_context_and_others(corpus, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "Who sails?", "context": "Ada sails to Malmö.", "answers": "Ada"}) + "\n")
    task = QuestionAnswering.from_jsonl(corpus, path)
    example = task.example(0, 800)
    assert len(example["input_ids"]) == 800
    assert "\n\nAda sails to Malmö.\n\n" in text_of(example).replace(" \n", "\n")
    assert text_of(example).endswith("Who sails?")
    assert example["reference"] == ["Ada"]
    with pytest.raises(ValueError, match="answers"):
        QuestionAnswering(corpus, [{"question": "?", "context": "c"}])
    with pytest.raises(ValueError, match="at least one"):
        QuestionAnswering(corpus, [])


@pytest.mark.real_model
def test_impossible_requests_say_why(corpus):
    with pytest.raises(ValueError, match="frequent_words"):
        build_task("riddle", corpus)
    with pytest.raises(ValueError, match="no room"):
        build_task("needle", corpus).example(0, 70)


def test_evaluation_wordings_are_not_trained_on():
    trained = " ".join(str(value) for value in vars(phrasings).values() if isinstance(value, tuple)).lower()
    for wording in (needles.STATEMENT, needles.ONE_VALUE[0], needles.ALL_VALUES[0], reading.EXCERPT):
        words = wording.lower().replace("{key}", "|").replace("{document}", "|").split("|")
        longest = max((part.strip() for part in words), key=len)
        assert longest not in trained
    for module in (needles, reading, tracking):
        for phrase in ("magic", "colleague explain", "carry on from there", "brief account", "left out", "occur most"):
            if phrase in inspect.getsource(module).lower():
                assert phrase not in trained
