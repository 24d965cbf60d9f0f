"""The tokens before a text: those of the tokenizer, or the one with which its chat template begins."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lkq_hf.text.text_start import text_start

BEGIN, END, MASK = 1, 2, 3
PIECES = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer(processor=None, chat_template=None, bos_token="<s>"):
    words = {"<unk>": 0, "<s>": BEGIN, "</s>": END, "<mask>": MASK, "a": 4}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if processor:
        special = [(word, words[word]) for word in processor.split() if word != "$A"]
        core.post_processor = TemplateProcessing(single=processor, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos_token, eos_token="</s>", chat_template=chat_template
    )


@pytest.mark.parametrize(
    ("processor", "chat_template", "expected"),
    [
        ("<s> $A", None, [BEGIN]),
        ("<s> $A </s>", None, [BEGIN]),
        ("$A </s>", None, []),
        ("<mask> <s> $A", "<s>" + PIECES, [MASK, BEGIN]),
        (None, None, []),
        (None, "<s>" + PIECES, [BEGIN]),
        (None, "{{ bos_token }}" + PIECES, [BEGIN]),
        (None, PIECES, []),
        (None, "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}", []),
        (None, "{{ raise_exception('no chats') }}", []),
        (None, "{{ messages[0]['content'] + 1 }}", []),
        (None, {"rag": "<s>" + PIECES}, []),
    ],
)
def test_what_stands_before_a_text(processor, chat_template, expected):
    assert text_start(tokenizer(processor, chat_template)) == expected


def test_without_a_begin_token_a_chat_begins_no_text():
    assert text_start(tokenizer(None, PIECES, bos_token=None)) == []
