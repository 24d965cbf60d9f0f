import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import evicted_logits, kept_entries, lookahead_model, tiny_model

from lkq_hf import LookaheadCache, TwoStageQuantizer

ROOT = Path(__file__).parents[2]


def test_a_missing_harness_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "lkq_hf.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install lkq-hf\[lm-eval\]"):
        import lkq_hf.evaluation.harness  # noqa: F401


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lkq-hf[lm-eval]")
    from lkq_hf.evaluation import harness

    return harness


@pytest.fixture(scope="module")
def tokenizer():
    from real_models import smollm2_directory
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_directory())


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


CONTEXTS = ("one two three four five six seven eight nine ten", "a shorter prompt of some words that are read")


@pytest.mark.real_model  # for the tokenizer; the models are tiny and random
def test_generation_is_that_of_the_cache(harness, tokenizer):
    model = lookahead_model(vocab_size=len(tokenizer))
    lm = harness.LookaheadLM(model, budget=4, tokenizer=tokenizer, batch_size=2)
    settings = {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False}
    found = lm.generate_until(instances("generate_until", *((text, settings) for text in CONTEXTS)))
    inputs = tokenizer(list(CONTEXTS), return_tensors="pt", padding=True, padding_side="left")
    answers = {}
    for budget in (4, 100):
        output = model.generate(**inputs, past_key_values=LookaheadCache(budget), max_new_tokens=6, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
        answers[budget] = tokenizer.batch_decode(output, skip_special_tokens=True)
    assert found == answers[4] != answers[100]


@pytest.mark.real_model
def test_likelihoods_are_those_over_what_was_kept(harness, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    lm = harness.LookaheadLM(model, budget=4, scorer="snapkv", tokenizer=tokenizer, batch_size=1)
    found = lm.loglikelihood(instances("loglikelihood", *((text, " eleven twelve thirteen") for text in CONTEXTS)))
    for text, (value, greedy) in zip(CONTEXTS, found, strict=True):
        prompt = tokenizer(text, return_tensors="pt")["input_ids"]
        ids = tokenizer(text + " eleven twelve thirteen", return_tensors="pt")["input_ids"]
        cache = LookaheadCache(4, scorer="snapkv")
        with torch.no_grad():
            model(prompt, past_key_values=cache)
        length = prompt.shape[1]
        # The first token is predicted while the prompt is still whole, the others from what was kept.
        whole = evicted_logits(model, ids, None, {}, length)[:, length - 1 : length]
        later = evicted_logits(model, ids, None, kept_entries(cache), length)[:, length:-1]
        expected = torch.cat([whole, later], 1).log_softmax(-1).gather(-1, ids[:, length:, None]).sum()
        assert value == pytest.approx(expected.item(), rel=1e-4)
        assert greedy is False
    full = harness.LookaheadLM(model, tokenizer=tokenizer, batch_size=1)
    assert full.loglikelihood(instances("loglikelihood", (CONTEXTS[0], " eleven twelve thirteen")))[0] != found[0]


@pytest.mark.real_model
def test_quantized_checkpoints(harness, tokenizer, tmp_path):
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    texts = tmp_path / "texts.txt"
    texts.write_text(" ".join(CONTEXTS) * 40)
    quantizer = TwoStageQuantizer.from_pretrained(tmp_path / "base")
    quantizer.quantize(
        tmp_path / "out", bits=4, group_size=32, dataset=str(texts), num_samples=2, model_seqlen=32, device="cpu"
    )
    lm = harness.LookaheadLM(str(tmp_path / "out"), budget=4, scorer="snapkv", device="cpu")
    assert any(type(module).__name__ == "QuantizedLinear" for module in lm.model.modules())
    settings = {"until": ["\n\n\n"], "max_gen_toks": 4, "do_sample": False}
    assert lm.generate_until(instances("generate_until", (CONTEXTS[0], settings)))


@pytest.mark.real_model
def test_arguments_that_do_not_fit(harness):
    with pytest.raises(ValueError, match="adapter"):
        harness.LookaheadLM("some/model", budget=8)
    with pytest.raises(ValueError, match="h2o"):
        harness.LookaheadLM("some/model", budget=8, scorer="h2o")


@pytest.mark.real_model
def test_the_example_task_runs_from_the_command_line(harness):
    from real_models import smollm2_directory

    adapter = "model_cards/smollm2-135m-instruct-lookahead"
    arguments = f"pretrained={smollm2_directory()},dtype=float32,adapter={adapter},budget=64"
    task = ["--include_path", "examples/lm_eval", "--tasks", "planted_facts", "--device", "cpu", "--batch_size", "3"]
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "lkq_hf.evaluation.harness",
            "run",
            "--model",
            "lkq-hf",
            "--model_args",
            arguments,
            *task,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("|planted_facts")]
    assert "exact_match" in line
    # Sinks and the most recent tokens alone answer none of these.
    assert float(line.split("|")[7]) > 0
