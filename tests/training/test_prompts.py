import random
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset
from real_models import smollm2_directory

from lkq_hf.text.chat import encode_chat, render_chat
from lkq_hf.text.passages import Contents
from lkq_hf.training import phrasings
from lkq_hf.training.data import usable_targets
from lkq_hf.training.earlier_turns import draw_turns
from lkq_hf.training.facts import draw_facts
from lkq_hf.training.prompts import (
    DEFAULT_WEIGHTS,
    PromptBuilder,
    PromptMix,
    build_prompts,
    split_documents,
)
from lkq_hf.training.targets import generate_targets


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_directory())


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    vocabulary = [
        f"{a}{b}{c}" for a in ("gra", "pel", "tor", "min") for b in ("vi", "so", "ka") for c in ("nt", "ster", "lo")
    ]

    def sentence():
        words = [rng.choice(vocabulary) for _ in range(rng.randint(9, 20))]
        return " ".join(words).capitalize() + "."

    def document():
        parts = []
        for _ in range(24):
            parts += [rng.choice(vocabulary).capitalize() + " basics", " ".join(sentence() for _ in range(4))]
        return "\n\n".join(parts)

    return [{"document": f"doc{index}", "source": f"book{index % 2}", "text": document()} for index in range(10)]


@pytest.fixture(scope="module")
def builder(documents, tokenizer):
    return PromptBuilder(documents, tokenizer, PromptMix(answer_start_share=1.0))


@pytest.mark.real_model
@pytest.mark.parametrize("kind", sorted(DEFAULT_WEIGHTS))
@pytest.mark.parametrize("length", [512, 1000])
def test_every_kind_has_exactly_the_wanted_length(builder, tokenizer, kind, length):
    prompt = builder.prompt(3, kind=kind, length=length)
    assert prompt["kind"] == kind
    assert len(prompt["input_ids"]) == length
    assert prompt["input_ids"] == encode_chat(prompt["messages"], prompt["answer_prefix"], tokenizer)
    if kind not in ("raw", "continue"):
        assert prompt["answer_prefix"]
        assert tokenizer.decode(prompt["input_ids"]).endswith(prompt["answer_prefix"])


@pytest.mark.real_model
def test_prompts_longer_than_any_document_join_documents(builder, documents):
    longest = max(len(ends) for ends in builder.corpus.ends)
    prompt = builder.prompt(0, kind="raw", length=longest + 500)
    assert len(prompt["input_ids"]) == longest + 500


@pytest.mark.real_model
def test_the_seed_decides(documents, tokenizer):
    def ids(seed):
        mix = PromptMix(max_length=600, seed=seed)
        return [prompt["input_ids"] for prompt in build_prompts(documents, tokenizer, 6, mix)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


@pytest.mark.real_model
def test_the_owner_asked_about_is_in_the_text_too(builder):
    for index in range(20):
        messages = builder.prompt(index, kind="fact_among_several", length=700)["messages"]
        content = "\n".join(message["content"] for message in messages)
        owners = [owner for kind in phrasings.OWNERS for owner in kind if owner.lower() in content.lower()]
        assert any(content.lower().count(owner.lower()) >= 2 for owner in owners), "the asked owner is in no statement"


@pytest.mark.real_model
def test_the_task_can_stand_before_and_after_the_text(documents, tokenizer):
    first = PromptBuilder(documents, tokenizer, PromptMix(task_first_share=1.0, later_turn_share=0.0))
    last = PromptBuilder(documents, tokenizer, PromptMix(task_first_share=0.0, later_turn_share=0.0))
    for builder, expected in ((first, True), (last, False)):
        for index in range(10):
            content = builder.prompt(index, kind="fact", length=600)["messages"][-1]["content"]
            starts = any(
                question.split("{")[0] in content[:150] for question in phrasings.FACT_QUESTIONS if question[0] != "{"
            )
            assert not starts or expected


@pytest.mark.real_model
def test_the_weights_choose_the_kinds(documents, tokenizer):
    mix = PromptMix(weights={"copy": 1.0, "raw": 1.0}, max_length=600)
    kinds = {prompt["kind"] for prompt in build_prompts(documents, tokenizer, 20, mix)}
    assert kinds == {"copy", "raw"}


def test_lengths_follow_the_skew():
    mix = PromptMix(length_skew=0.35, length_step=64)
    rng = random.Random(0)
    lengths = [mix.draw_length(rng) for _ in range(4000)]
    assert min(lengths) >= 512 and max(lengths) <= 8192
    assert all(length % 64 == 0 for length in lengths)
    assert sum(length <= 2048 for length in lengths) / len(lengths) == pytest.approx(0.62, abs=0.03)
    uniform = PromptMix(length_skew=0.0)
    lengths = [uniform.draw_length(rng) for _ in range(4000)]
    assert sum(length <= 2048 for length in lengths) / len(lengths) == pytest.approx(0.5, abs=0.03)


def test_split_holds_whole_documents_out_of_every_source(documents):
    train, validation = split_documents(documents, 0.3, seed=1)
    assert {d["document"] for d in train} | {d["document"] for d in validation} == {d["document"] for d in documents}
    assert not {d["document"] for d in train} & {d["document"] for d in validation}
    assert {d["source"] for d in validation} == {"book0", "book1"}
    characters = sum(len(d["text"]) for d in documents)
    assert 0 < sum(len(d["text"]) for d in validation) <= 0.3 * characters
    assert split_documents(documents, 0.3, seed=1)[1] == validation
    assert split_documents(documents[:2], 0.01)[1], "at least one document is held out"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {"riddle": 1.0}}, "riddle"),
        ({"weights": {"fact": 0.0}}, "positive"),
        ({"min_length": 4096, "max_length": 2048}, "min_length"),
        ({"min_length": 600, "max_length": 700, "length_step": 512}, "length_step"),
    ],
)
def test_mixes_that_cannot_be_drawn_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptMix(**arguments)


@pytest.mark.real_model
def test_documents_without_text_are_refused(tokenizer):
    with pytest.raises(ValueError, match="has no text"):
        PromptBuilder([{"content": "x"}], tokenizer)
    with pytest.raises(ValueError, match="no documents"):
        PromptBuilder([], tokenizer)


class _NoSystem:
    """A tokenizer whose template refuses system messages, as Gemma's does."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chat_template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<model>"
        )

    def apply_chat_template(self, messages, **kwargs):
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **kwargs)


@pytest.mark.real_model
def test_templates_without_system_role_get_it_in_the_users_message(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert render_chat(messages, "A", _NoSystem(tokenizer)) == "<user>S\n\nU<model>A"


def test_no_training_wording_is_an_evaluation_wording():
    listed = [value for value in vars(phrasings).values() if isinstance(value, tuple)]
    texts = [text for value in listed for text in value if isinstance(text, str)]
    assert not [text for text in texts if re.search(r"\b(magic|special)\b", text, re.IGNORECASE)]


@pytest.mark.real_model
@pytest.mark.parametrize("kind", sorted(set(DEFAULT_WEIGHTS) - {"raw"}))
def test_the_task_can_come_in_a_later_turn(documents, tokenizer, kind):
    builder = PromptBuilder(documents, tokenizer, PromptMix(later_turn_share=1.0, system_prompt_share=0.0))
    counts = set()
    for index in range(12):
        prompt = builder.prompt(index, kind, 1600)
        assert len(prompt["input_ids"]) == 1600
        assert [message["role"] for message in prompt["messages"]][1::2] == ["assistant"] * (
            len(prompt["messages"]) // 2
        )
        assert prompt["messages"][-1]["role"] == "user"
        counts.add(len(prompt["messages"]) // 2)
        text, *later = (message["content"] for message in prompt["messages"])
        assert len(text) > 2 * sum(map(len, later))
    assert counts == {1, 2, 3}


def test_earlier_turns_are_answered_by_the_text():
    rng = random.Random(3)
    sentences = [f"The {name} of the harbour {verb} the lamp in the {name} tower." for name, verb in zip(
        ("keeper", "porter", "sailor", "warden"), ("lights", "cleans", "mends", "guards"), strict=True)]  # fmt: skip
    text = "\n\n".join(" ".join(rng.sample(sentences, 4)) for _ in range(6))
    contents = Contents(text, SimpleNamespace(rarity=lambda word: 1.0))
    asked = draw_facts(1, rng)
    for _ in range(40):
        turns = draw_turns(3, contents, asked, rng)
        assert 1 <= len(turns) <= 3 and len({turn.answer for turn in turns}) == len(turns)
        for turn in turns:
            if turn.fact is None:
                parts = re.split(r"(?<=\.) ", turn.answer)
                assert len(set(parts)) == len(parts) and all(part in " ".join(text.split()) for part in parts)
            else:
                assert turn.fact.value in turn.answer
                assert (turn.fact.owner, turn.fact.attribute) != (asked[0].owner, asked[0].attribute)


def test_answers_go_on_from_a_place_inside():
    rows = [{"input_ids": [1, 2, 3], "response_ids": list(range(10, 10 + count))} for count in (5, 40, 9, 40, 40)]
    whole = Dataset.from_list(rows)
    found = usable_targets([whole], inside_answer_share=1.0)
    for row, before in zip(found, rows, strict=True):
        assert row["input_ids"] + row["response_ids"] == before["input_ids"] + before["response_ids"]
        assert len(row["response_ids"]) >= min(8, len(before["response_ids"]))
    cuts = [len(row["input_ids"]) - 3 for row in found]
    assert cuts[0] == 0 and cuts[2] == 1 and len({cuts[1], cuts[3], cuts[4]}) == 3 and min(cuts[1:]) > 0
    assert usable_targets([whole], inside_answer_share=0.0)["input_ids"] == whole["input_ids"]
    half = usable_targets([Dataset.from_list(rows * 40)], inside_answer_share=0.5)
    assert 0.3 < sum(len(ids) > 3 for ids in half["input_ids"]) / 160 < 0.7


@pytest.mark.real_model
def test_prompts_that_end_before_anything_is_asked(documents, tokenizer):
    mix = PromptMix(asked_later_share=1.0, min_length=512, max_length=1024)
    builder = PromptBuilder(documents, tokenizer, mix)
    ends = set()
    for index in range(12):
        prompt = builder.prompt(index, length=700)
        assert prompt["kind"] == "asked_later" and len(prompt["input_ids"]) == 700
        read, following = (tokenizer.decode(prompt[name]) for name in ("input_ids", "response_ids"))
        questions = [message["content"] for message in prompt["messages"] if message["role"] == "user"]
        answers = [message["content"] for message in prompt["messages"] if message["role"] == "assistant"]
        # What was read holds none of the questions and of the answers but as the text has them; what follows, all.
        assert all(question not in read for question in questions[1:])
        assert all(text in following for text in questions[1:] + answers)
        ends.add(read.endswith("<|im_start|>assistant\n"))
    assert ends == {True, False}


@pytest.mark.real_model
def test_given_responses_stay_as_they_are(documents, tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=2048)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    mix = PromptMix(asked_later_share=0.5, min_length=300, max_length=400)
    prompts = list(build_prompts(documents, tokenizer, 6, mix))
    rows = [{name: prompt[name] for name in ("input_ids", "kind", "response_ids")} for prompt in prompts]
    given = [row["response_ids"] for row in rows]
    assert any(given) and not all(given)
    made = usable_targets([generate_targets(model, rows, tmp_path, max_new_tokens=4)], cut_loops=True)
    for expected, found in zip(given, made["response_ids"], strict=True):
        assert found == expected if expected else 0 < len(found) <= 4
