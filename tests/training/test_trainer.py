import json
import sys
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from models import (
    ARCHITECTURES,
    SIZES,
    base_and_adapted,
    full_layers,
    left_padded,
    lookahead_attention,
    positions,
    prompt_ids,
    tiny_model,
)
from peft import get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

from lkq_hf import LookaheadKVConfig, LookaheadTrainer, LookaheadTrainingArguments
from lkq_hf.adapter.model import adapter_parameters
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.sharing.cards import has_card
from lkq_hf.training import load_targets
from lkq_hf.training.importance import (
    PromptCache,
    importance_divergence,
    importance_recall,
    lookahead_importance,
    mean_over_query_heads,
    response_importance,
)


def rows(count=8, lengths=(30, 24, 18, 27), responses=(5, 2, 4, 3)):
    return [
        {
            "input_ids": prompt_ids(1, lengths[i % len(lengths)], seed=i)[0].tolist(),
            "response_ids": prompt_ids(1, responses[i % len(responses)], seed=100 + i)[0].tolist(),
        }
        for i in range(count)
    ]


def trainable():
    torch.manual_seed(1)
    return get_peft_model(tiny_model(), LookaheadKVConfig(num_lookahead_tokens=4, r=2))


def arguments(directory, **changes):
    values = {
        "output_dir": str(directory), "use_cpu": True, "report_to": [], "per_device_train_batch_size": 4,
        "max_steps": 4, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 0,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 5e-3,
    }  # fmt: skip
    return LookaheadTrainingArguments(**values | changes)


def weights(model):
    return {name: value.detach().clone() for name, value in adapter_parameters(model, "default").items()}


def padded_batch():
    ids, mask = left_padded([prompt_ids(1, 30)[0], prompt_ids(1, 17, seed=1)[0]])
    response = prompt_ids(2, 5, seed=2)
    response_mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    return ids, mask, response, response_mask


def power_mean(rows, power):
    return rows.pow(power).mean(-2).pow(1 / power)


@pytest.mark.parametrize("row_power", [1.0, 2.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_targets_are_those_of_one_plain_forward(architecture, row_power):
    model = tiny_model(architecture)
    ids, mask, response, response_mask = padded_batch()
    whole = torch.cat([mask, response_mask.long()], dim=1)
    with torch.no_grad():
        attentions = model(
            torch.cat([ids, response], 1), attention_mask=whole, position_ids=positions(whole), output_attentions=True
        ).attentions
    decoder = get_decoder(model)
    found = response_importance(decoder, PromptCache(decoder, ids, mask), response, response_mask, row_power)
    assert set(found) == set(full_layers(model))
    for layer, scores in found.items():
        rows_of_response = attentions[layer][:, :, 30:, :30]
        expected = torch.stack(
            [power_mean(rows_of_response[0], row_power), power_mean(rows_of_response[1, :, :2], row_power)]
        )
        real = mask.bool()[:, None].expand_as(scores)
        torch.testing.assert_close(scores[real], expected[real], atol=1e-5, rtol=1e-5)
        assert (scores[~real] == -torch.inf).all()


@pytest.mark.parametrize(("padded", "row_power"), [(False, 1.0), (True, 1.0), (True, 2.0)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predictions_are_those_of_one_plain_forward(architecture, padded, row_power):
    base, adapted = base_and_adapted(architecture)
    ids, mask, *_ = padded_batch()
    if not padded:
        ids, mask = prompt_ids(2, 30), None
    decoder = get_decoder(adapted)
    tokens = decoder.lookahead.active_tokens()
    found = lookahead_importance(adapted, decoder, PromptCache(decoder, ids, mask), tokens, row_power)
    for layer, attention in lookahead_attention(base, adapted, ids, mask).items():
        expected = power_mean(attention, row_power)
        real = (
            torch.ones_like(expected, dtype=torch.bool) if mask is None else mask.bool()[:, None].expand_as(expected)
        )
        torch.testing.assert_close(found[layer][real], expected[real], atol=1e-5, rtol=1e-5)


def test_reading_on_top_of_a_prompt_does_not_change_its_cache():
    _, adapted = base_and_adapted()
    ids, mask, response, response_mask = padded_batch()
    decoder = get_decoder(adapted)
    prompt = PromptCache(decoder, ids, mask)
    before = [layer.keys.clone() for layer in prompt.layers]
    response_importance(decoder, prompt, response, response_mask)
    lookahead_importance(adapted, decoder, prompt, decoder.lookahead.active_tokens())
    assert prompt.get_seq_length() == 30
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prompt.layers, before, strict=True))


def test_the_divergence_is_the_kl_of_normalized_scores():
    target, predicted = torch.tensor([[[0.2, 0.1, 0.1]]]), torch.tensor([[[0.3, 0.3, 0.0]]]) + 1e-6
    p, q = target / target.sum(), predicted / predicted.sum()
    torch.testing.assert_close(importance_divergence(target, predicted), (p * (p / q).log()).sum())
    assert importance_divergence(target, 5 * target).abs() < 1e-6
    p, q = target.sqrt() / target.sqrt().sum(), predicted.sqrt() / predicted.sqrt().sum()
    torch.testing.assert_close(importance_divergence(target, predicted, power=0.5), (p * (p / q).log()).sum())
    padded = [F.pad(x, (2, 0), value=-torch.inf) for x in (target, predicted)]
    torch.testing.assert_close(importance_divergence(*padded), importance_divergence(target, predicted))


def test_recall_counts_common_entries_of_each_kv_head():
    target = torch.tensor([[[5.0, 4, 1, 0], [5, 4, 1, 0], [0, 1, 4, 5], [0, 1, 4, 5]]])
    predicted = torch.tensor([[[5.0, 4, 1, 0], [5, 4, 1, 0], [5, 1, 0, 4], [5, 1, 0, 4]]])
    assert mean_over_query_heads(target, 2).shape == (1, 2, 4)
    assert importance_recall(target, predicted, kv_heads=2, budget=2).tolist() == [(1 + 0.5) / 2]


def test_the_loss_falls_and_only_the_adapter_learns(tmp_path):
    model = trainable()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = LookaheadTrainer(model, arguments(tmp_path, max_steps=15, learning_rate=2e-2), train_dataset=rows(4))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == set(adapter_parameters(model, "default"))


def test_gradients_reach_every_weight_of_the_adapter_and_nothing_else(tmp_path):
    _, model = base_and_adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.peft_config["default"].inference_mode = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lookahead_kv_" in name)
    trainer = LookaheadTrainer(model, arguments(tmp_path), train_dataset=rows(4))
    trainer.compute_loss(model, trainer.data_collator(rows(4))).backward()
    for name, parameter in model.named_parameters():
        if "lookahead_kv_" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_the_gradient_is_that_of_one_plain_forward(tmp_path):
    """The cheap step leaves out the prompt's positions, through which no gradient flows."""
    base, model = base_and_adapted()
    ids, response = prompt_ids(2, 20), prompt_ids(2, 4, seed=1)
    trainer = LookaheadTrainer(model, arguments(tmp_path, importance_power=1.0), train_dataset=rows(4))
    batch = [{"input_ids": a.tolist(), "response_ids": b.tolist()} for a, b in zip(ids, response, strict=True)]
    loss = trainer.compute_loss(model, trainer.data_collator(batch))
    loss.backward()

    with torch.no_grad():
        answers = base(torch.cat([ids, response], 1), output_attentions=True).attentions
    tokens = next(p for n, p in adapter_parameters(model, "default").items() if "tokens" in n)
    from lkq_hf.attention import lookahead_positions

    embeds = torch.cat([base.get_input_embeddings()(ids).detach(), tokens.detach().expand(2, -1, -1)], 1)
    embeds.requires_grad_()
    with lookahead_positions(5, embeds.shape[:2]):
        attentions = model(inputs_embeds=embeds, output_attentions=True, use_cache=False).attentions
    divergences = []
    for answer, attention in zip(answers, attentions, strict=True):
        p, q = answer[:, :, 20:, :20].mean(2), attention[:, :, 20:, :20].mean(2)
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        divergences.append((p * (p / q).log()).sum(-1).mean())
    expected = torch.stack(divergences).mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(expected, embeds)
    torch.testing.assert_close(tokens.grad, gradient[:, 20:].sum(0), atol=1e-5, rtol=1e-3)


def test_accumulated_gradients_equal_a_big_batch(tmp_path):
    results = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = trainable()
        changes = {
            "per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2,
            "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1,
        }  # fmt: skip
        data = rows(4, lengths=(24,), responses=(4,))
        LookaheadTrainer(model, arguments(tmp_path, **changes), train_dataset=data).train()
        results.append(weights(model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-4)
    start = weights(trainable())
    assert any(not torch.allclose(results[0][name], start[name], atol=1e-4) for name in start)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    whole = trainable()
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    LookaheadTrainer(whole, arguments(tmp_path / "whole", **changes), train_dataset=rows(8)).train()
    resumed = trainable()
    trainer = LookaheadTrainer(resumed, arguments(tmp_path / "whole", **changes), train_dataset=rows(8))
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert trainer.state.global_step == 6
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_is_trained_like_any_other(tmp_path, reset_compiler):
    found = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = trainable()
        train = rows(8, lengths=(24,), responses=(4,))
        LookaheadTrainer(model, arguments(tmp_path, max_steps=2, **options), train_dataset=train).train()
        found.append(weights(model))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_the_evaluation_reports_loss_and_recall(tmp_path):
    model = trainable()
    trainer = LookaheadTrainer(
        model, arguments(tmp_path, recall_budgets=[5, 64], per_device_eval_batch_size=3), eval_dataset=rows(8)
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert 0 < metrics["eval_recall@5"] < 1
    assert "eval_recall@64" not in metrics  # every prompt is shorter


def test_adapters_are_trained_in_float32_on_a_half_precision_base(tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model().to(torch.bfloat16), LookaheadKVConfig(num_lookahead_tokens=4, r=2))
    LookaheadTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(4)).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_process_trains_on_one_gpu_however_many_it_sees(tmp_path, monkeypatch):
    found = arguments(tmp_path)
    monkeypatch.setattr(found, "_n_gpu", 4)
    assert found.n_gpu == 1 and found.train_batch_size == 4 and found.parallel_mode.value != "not_distributed"


def test_a_model_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="get_peft_model"):
        LookaheadTrainer(tiny_model(), arguments(tmp_path), train_dataset=rows(4))


@pytest.mark.parametrize("values", [{"importance_heads": "all"}, {"importance_power": 0.0}, {"importance_power": 5.0}])
def test_arguments_out_of_range_are_refused(tmp_path, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        arguments(tmp_path, **values)


def save_model_and_documents(directory, named=False):
    """Writes ``model`` (tiny, with SmolLM2's tokenizer) and ``documents.jsonl``; ``named`` says where each is from."""
    from real_models import smollm2_directory
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_directory())
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    sentence = "The {} of the harbour keeps the {} lamp in the {} tower. "
    with (directory / "documents.jsonl").open("w") as file:
        for index in range(8):
            words = [(f"keeper{index}{i}", f"green{i}", f"north{index}") for i in range(120)]
            text = "\n\n".join("".join(sentence.format(*word) for word in words[i : i + 6]) for i in range(0, 120, 6))
            file.write(json.dumps({"text": text} | ({"document": f"d{index}", "source": "s"} if named else {})) + "\n")


@pytest.mark.real_model
def test_from_documents_to_an_adapter_on_the_command_line(tmp_path):
    from lkq_hf.cli import app

    save_model_and_documents(tmp_path, named=True)
    runner = CliRunner()
    command = [
        "generate-targets", str(tmp_path / "model"), "--documents", str(tmp_path / "documents.jsonl"),
        "--out", str(tmp_path / "targets"), "--count", "4", "--validation-count", "2",
        "--validation-fraction", "0.3", "--min-length", "512", "--max-length", "512", "--max-new-tokens", "4",
        "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    result = runner.invoke(app, [*command, "--prompts-only"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "train: 4 prompts in" in result.output
    assert not list(tmp_path.glob("targets/*/shard-*"))
    built = Dataset.from_parquet(str(tmp_path / "targets" / "train" / "prompts.parquet"))
    # The documents need not be there any more.
    (tmp_path / "documents.jsonl").unlink()
    result = runner.invoke(app, [*command, "--seed", "1"])
    assert isinstance(result.exception, ValueError) and "seed was 0, now 1" in str(result.exception)
    result = runner.invoke(app, command)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "train: 4 prompts with responses" in result.output
    assert load_targets(tmp_path / "targets" / "train")["input_ids"] == built["input_ids"]
    command = [
        "train", str(tmp_path / "model"), "--targets", str(tmp_path / "targets"), "--out", str(tmp_path / "adapter"),
        "--base-model-name", "someone/something", "--num-lookahead-tokens", "4", "--rank", "2", "--max-steps", "2",
        "--batch-size", "2", "--device-batch-size", "2", "--dtype", "float32", "--device", "cpu",
        "--eviction-weight", "1", "--cut-loops",
        "--pooling-kernel-size", "3", "--pooling", "sum", "--neighbor-weight", "0.2",
    ]  # fmt: skip
    result = runner.invoke(app, command)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "adapter of step 2 saved" in result.output and "validation KL" in result.output
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/something"
    assert [config[name] for name in ("pooling_kernel_size", "pooling", "neighbor_weight")] == [3, "sum", 0.2]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.model.lookahead.lookahead_kv_tokens"].shape == (4, SIZES["hidden_size"])


@pytest.mark.one_version
def test_training_on_what_the_response_loses_lowers_it(tmp_path):
    def losses(weight):
        """Importance and what is lost by a hard choice of four entries, before and after a training."""
        args = arguments(
            tmp_path, eviction_weight=weight, eviction_budgets=[4, 4], max_steps=60, per_device_train_batch_size=8
        )
        trainer = LookaheadTrainer(trainable(), args, train_dataset=rows())
        batch = trainer.data_collator(rows())

        def now():
            args.eviction_weight = 0.0
            importance = trainer.compute_loss(trainer.model, batch).item()
            args.eviction_weight, args.eviction_temperature = 1.0, 0.01
            lost = trainer.compute_loss(trainer.model, batch).item() - importance
            args.eviction_weight, args.eviction_temperature = weight, 0.1
            return importance, lost

        before = now()
        trainer.train()
        return before, now()

    before, with_it = losses(5.0)
    _, without = losses(0.0)
    assert with_it[0] < before[0] and with_it[1] < 0.75 * before[1]
    assert with_it[1] < without[1]


def test_the_eviction_objective_needs_an_attention_with_masks(tmp_path):
    model = trainable()
    get_decoder(model).config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="set_attn_implementation"):
        LookaheadTrainer(model, arguments(tmp_path, eviction_weight=1.0), train_dataset=rows())


def test_budgets_of_the_eviction_objective_are_those_of_every_process(tmp_path):
    trainer = LookaheadTrainer(trainable(), arguments(tmp_path, eviction_budgets=[10, 90]), train_dataset=rows())
    drawn = []
    for trainer.state.global_step in range(200):
        drawn.append(trainer._draw_budget())
    assert 10 <= min(drawn) < 15 and 70 < max(drawn) <= 90
    trainer.state.global_step = 7
    assert trainer._draw_budget() == drawn[7]


@pytest.mark.parametrize(
    "values",
    [
        {"eviction_weight": -1.0},
        {"eviction_temperature": 0.0},
        {"eviction_budgets": [9, 3]},
        {"eviction_budgets": [3]},
    ],
)
def test_arguments_of_the_eviction_objective_are_checked(tmp_path, values):
    with pytest.raises(ValueError, match="eviction_"):
        arguments(tmp_path, **values)


@pytest.mark.real_model
def test_one_command_does_all_from_documents(tmp_path, monkeypatch):
    from lkq_hf.cli import app

    save_model_and_documents(tmp_path)
    train = sys.modules["lkq_hf.cli.train"]
    make_targets = train.make_targets
    few = lambda options: make_targets(replace(options, validation_count=6))  # noqa: E731  # for speed
    monkeypatch.setattr(train, "make_targets", few)
    out = tmp_path / "adapter"
    command = [
        "train", str(tmp_path / "model"), "--documents", str(tmp_path / "documents.jsonl"), "--out", str(out),
        "--base-model-name", "someone/something", "--count", "6", "--max-length", "512", "--max-new-tokens", "12",
        "--num-lookahead-tokens", "4", "--rank", "2", "--max-steps", "3", "--eval-steps", "1", "--batch-size", "2",
        "--judge-prompts", "6", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, (result.output, result.exception)
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["budget_profile"]) == {"64", "128"} and config["row_power"] == 2
    record = json.loads((out / "training.json").read_text())
    assert record["options"]["of"] == 3 and record["options"]["allocation"] == "global"
    lost = {step["step"]: step["eval_lost"] for step in json.loads(
        (out / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text()
    )["log_history"] if "eval_lost" in step}  # fmt: skip
    assert set(lost) == {1, 2, 3} and record["options"]["steps"] == min(lost, key=lost.get)
    assert record["metrics"]["eval_lost"] == pytest.approx(min(lost.values()), abs=1e-6)
    assert record["metrics"]["eval_lost"] == pytest.approx(
        sum(record["metrics"][f"eval_lost@{budget}"] for budget in (64, 128, 256)) / 3
    )
    card = (out / "README.md").read_text()
    assert "someone/something" in card and "NLL gap to the full cache at budget 64" in card
    assert not has_card(out)  # a draft, which pushing writes anew
    # Started again, it finds everything and changes nothing.
    files = {path: path.read_bytes() for path in (out / "adapter_model.safetensors", out / "README.md")}
    again = CliRunner().invoke(app, [*command, "--json"])
    assert again.exit_code == 0, (again.output, again.exception)
    assert all(path.read_bytes() == content for path, content in files.items())
    other = CliRunner().invoke(app, [*command, "--count", "7"])
    assert isinstance(other.exception, ValueError) and "count was 6, now 7" in str(other.exception)
    both = CliRunner().invoke(app, [*command, "--targets", str(out / "targets")])
    assert isinstance(both.exception, ValueError) and "either --documents" in str(both.exception)
