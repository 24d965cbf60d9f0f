import importlib.util
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from children import run, script
from models import add_lookahead, tiny_model
from small_checkpoint import small_tokenizer

from lkq_hf import LookaheadCache

SCRIPT = Path(__file__).parents[2] / "examples" / "chat.py"
LICENSE = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("chat", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("park", ["cpu", None])
def test_a_conversation_is_that_of_the_template(example, park):
    model, tokenizer = add_lookahead(tiny_model(attention="sdpa", vocab_size=1024)), small_tokenizer()
    cache = LookaheadCache(16, park=park)
    chat, messages = example.Chat(model, tokenizer, cache, 6), []
    for question in (LICENSE.read_text()[:800], "What is it about?", "And how does it end?"):
        messages.append({"role": "user", "content": question})
        before = None if chat.ids is None else chat.ids.shape[1]
        chat.ask(question)
        text = tokenizer.decode(chat.ids[0])
        assert question in text
        if before is None:
            assert text.startswith(example.render(tokenizer, messages))
        else:
            asked = [messages[0], {"role": "assistant", "content": "\0"}, messages[-1]]
            between = example.render(tokenizer, asked).split("\0")[1]
            assert tokenizer.decode(chat.ids[0, before:]).startswith(between)
        held = cache.summary()
        assert held["entries_stored"] <= 16 + 6 and held["tokens_seen"] >= chat.ids.shape[1] - 1
        assert (held["entries_parked"] > 16) == (park is not None)


def test_the_end_of_an_answer_is_written_once(example):
    model, tokenizer = add_lookahead(tiny_model(attention="sdpa", vocab_size=1024)), small_tokenizer()
    model.generation_config.eos_token_id = [7]
    chat = example.Chat(model, tokenizer, LookaheadCache(16), 4)
    handle = model.lm_head.register_forward_hook(lambda *_: torch.eye(1024)[7].expand(1, 1, -1))
    chat.ask("Hello")
    handle.remove()
    assert 7 not in chat.ids[0, -4:]
    chat.ask("Go on")


@pytest.mark.real_model
def test_the_real_model_chats():
    questions = "What is the name of this license?\nWhat is its version?\n\n"
    options = ("--file", LICENSE, "--budget", 128, "--max-new-tokens", 12)
    output = run(partial(script, typed=questions), SCRIPT, *options)
    assert "Apache" in output
    lines = re.findall(r"\[([\d,]+) entries a head on the device, ([\d,]+) parked, .* s\]", output)
    stored, parked = ([int(number.replace(",", "")) for number in column] for column in zip(*lines, strict=True))
    assert len(lines) == 2 and all(128 <= number <= 128 + 12 for number in stored)
    assert parked[0] > 2000 and parked[1] > parked[0]
