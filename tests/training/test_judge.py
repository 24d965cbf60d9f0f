import pytest
import torch
from models import add_lookahead, prompt_ids, tiny_model
from peft import get_peft_model
from torch.nn import functional as F

from lkq_hf import LookaheadCache, LookaheadKVConfig, LookaheadTrainer, LookaheadTrainingArguments
from lkq_hf.evaluation.judge import AnswerJudge


def rows(lengths=(30, 24, 30, 12), responses=(5, 2, 4, 3)):
    return [
        {
            "input_ids": prompt_ids(1, length, seed=i)[0].tolist(),
            "response_ids": prompt_ids(1, count, seed=100 + i)[0].tolist(),
        }
        for i, (length, count) in enumerate(zip(lengths, responses, strict=True))
    ]


def nll(model, row, cache):
    """Of the answer's tokens, as a plain use of the cache finds it, and whether each is the model's own choice."""
    prompt, answer = torch.tensor([row["input_ids"]]), torch.tensor([row["response_ids"]])
    with torch.no_grad():
        first = model(prompt, past_key_values=cache).logits[:, -1:]
        rest = model(answer, past_key_values=cache).logits[:, :-1]
    logits = torch.cat([first, rest], 1)
    return F.cross_entropy(logits[0], answer[0]), bool((logits.argmax(-1) == answer).all())


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_what_is_lost_is_what_a_cache_in_use_loses(allocation):
    model = add_lookahead(tiny_model())
    found = AnswerJudge(rows(), budgets=(5, 14), allocation=allocation)(model)
    for budget, counted in ((5, rows()), (14, [rows()[0], rows()[2]])):
        counted = [row for row in counted if len(row["input_ids"]) >= 2 * budget]
        lost = []
        for row in counted:
            evicted, _ = nll(model, row, LookaheadCache(budget, allocation=allocation, evict_later_turns=False))
            lost.append(float(evicted - nll(model, row, LookaheadCache(10_000))[0]))
        assert found[f"lost@{budget}"] == pytest.approx(sum(lost) / len(lost), abs=1e-5)
    assert found["lost"] == pytest.approx((found["lost@5"] + found["lost@14"]) / 2)
    assert found["same@5"] == found["same"] == 0  # answers are random


def test_answers_that_stay_the_same_are_counted():
    model = add_lookahead(tiny_model())
    own = []
    for row in rows():
        cache = LookaheadCache(5, evict_later_turns=False)
        ids = torch.tensor([row["input_ids"]])
        tokens = model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
        own.append({**row, "response_ids": tokens.tolist()})
    assert AnswerJudge(own, budgets=(5,))(model)["same@5"] == 1
    changed = {**own[0], "response_ids": [(own[0]["response_ids"][0] + 1) % 100, *own[0]["response_ids"][1:]]}
    assert AnswerJudge([changed, *own[1:]], budgets=(5,))(model)["same@5"] == 0.75


def test_prompts_that_are_too_short_do_not_count():
    judge = AnswerJudge(rows(), budgets=(64,))
    assert not judge and judge(tiny_model()) == {}


def test_the_best_evaluation_gives_the_adapter(tmp_path):
    model = get_peft_model(tiny_model(), LookaheadKVConfig(num_lookahead_tokens=4, r=2))
    verdicts, seen = iter([3.0, 1.0, 2.0, 1.0]), []

    def judge(judged):
        assert not judged.training
        seen.append({name: value.clone() for name, value in judged.named_parameters() if value.requires_grad})
        return {"lost": next(verdicts)}

    arguments = LookaheadTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=2, max_steps=5,
        eval_strategy="steps", eval_steps=2, save_steps=50, save_total_limit=2, learning_rate=1e-2,
        metric_for_best_model="lost", greater_is_better=False, eviction_budgets=[4, 8], disable_tqdm=True,
    )  # fmt: skip
    trainer = LookaheadTrainer(model, arguments, judge=judge, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    assert len(seen) == 3  # after steps 2 and 4, and after the last
    assert trainer.load_best() == 4
    now = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all(torch.equal(value, seen[1][name]) for name, value in now.items())
    assert any(not torch.equal(value, seen[2][name]) for name, value in now.items())
    assert trainer.evaluate()["eval_lost"] == 1.0
