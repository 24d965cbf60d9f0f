import importlib.util
import re
from pathlib import Path

import pytest
import torch
from children import run, script
from models import add_lookahead, tiny_model
from small_checkpoint import small_tokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "read_once_answer_often.py"
LICENSE = Path(__file__).parents[2] / "LICENSE"
QUESTION = "What is the name of this license?"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("read_once_answer_often", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_answer_is_that_of_the_process_that_read(example, tmp_path):
    """With a model of random weights, a saved and loaded cache answers as the one in memory."""
    model, tokenizer = add_lookahead(tiny_model(attention="sdpa", vocab_size=1024)), small_tokenizer()
    text = LICENSE.read_text()[:1500]
    cache = example.read(model, tokenizer, text, 16, tmp_path / "cache")
    found = example.answer(model, tokenizer, tmp_path / "cache", QUESTION, max_new_tokens=8)
    before, after = example.split_chat(tokenizer, text)
    ids, question = (
        tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids for part in (before, QUESTION + after)
    )
    ids = torch.cat([ids, question], dim=1)
    output = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert found == " ".join(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split())


@pytest.mark.real_model
def test_a_second_process_answers_from_the_file(tmp_path):
    options = ("--question", QUESTION, "--budget", 256, "--max-new-tokens", 16, "--out", tmp_path / "cache")
    output = run(script, SCRIPT, LICENSE, *options)
    saved, whole = map(float, re.findall(r"([\d.]+) MiB", output))
    assert saved < whole / 8
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".safetensors"]
    # The script starts itself anew with --load.
    assert re.search(r"Apache.* s, loading included\)", output)
