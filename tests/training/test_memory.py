"""How many prompts share a forward of the training."""

import pytest
import torch
from models import prompt_ids, tiny_model
from peft import get_peft_model

from lkq_hf import LookaheadKVConfig, LookaheadTrainer, LookaheadTrainingArguments
from lkq_hf.training import memory
from lkq_hf.training.memory import fitting, prompts_that_fit


def test_what_the_second_prompt_takes_decides():
    assert fitting(one=20, two=23, memory=100) == 24  # 20 + 23 * 3 of 90
    assert fitting(one=20, two=23, memory=23) == 1
    assert fitting(one=20, two=20, memory=20) == 1


def trainer_of(directory, lengths=(30, 12, 18), **changes):
    rows = [{"input_ids": prompt_ids(1, length)[0].tolist(), "response_ids": [3, 4, 5]} for length in lengths]
    model = get_peft_model(tiny_model("llama", "sdpa"), LookaheadKVConfig(num_lookahead_tokens=4, r=2))
    arguments = LookaheadTrainingArguments(output_dir=str(directory), report_to=[], save_strategy="no", **changes)
    return LookaheadTrainer(model, arguments, train_dataset=rows)


def test_nothing_is_tried_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_peak", None)
    assert prompts_that_fit(trainer_of(tmp_path, use_cpu=True), 7) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tries_the_longest_prompt(tmp_path, monkeypatch):
    trainer, peak, tried = trainer_of(tmp_path), memory._peak, []

    def noted(trainer, rows):
        tried.append([len(row["input_ids"]) for row in rows])
        return peak(trainer, rows)

    monkeypatch.setattr(memory, "_peak", noted)
    assert prompts_that_fit(trainer, 7) == 7
    assert tried == [[30], [30, 30]]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    used = torch.cuda.memory_allocated()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: used)
    assert prompts_that_fit(trainer, 7) == 1
