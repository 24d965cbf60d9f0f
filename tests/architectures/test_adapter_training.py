"""Adapters of models with recurrent layers, latent attention, sinks and embeddings for each layer: what is trained is
what decides, training learns, and files hold everything."""

import copy

import pytest
import torch
from models import add_lookahead, left_padded, positions, prompt_ids
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from lkq_hf import LookaheadCache, LookaheadKVConfig, LookaheadTrainer, LookaheadTrainingArguments
from lkq_hf.adapter.model import adapter_parameters
from lkq_hf.cache.eviction import Eviction
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.training.importance import PromptCache, lookahead_importance, response_importance

FAMILIES = [
    "qwen3_5_text",
    "lfm2",
    "granitemoehybrid",
    "deepseek_v3",
    "kimi_linear",
    "gpt_oss",
    "gemma3n_text",
    "gemma4_text",
    "gpt2",
    "bert",
]


def trainable(family):
    torch.manual_seed(1)
    return get_peft_model(tiny_model(family), LookaheadKVConfig(num_lookahead_tokens=4, r=2))


def targets(count=8):
    return [
        {
            "input_ids": prompt_ids(1, (30, 24, 18, 27)[i % 4], seed=i)[0].tolist(),
            "response_ids": prompt_ids(1, (5, 2, 4, 3)[i % 4], seed=100 + i)[0].tolist(),
        }
        for i in range(count)
    ]


def arguments(directory, **changes):
    values = {
        "output_dir": str(directory), "use_cpu": True, "report_to": [], "per_device_train_batch_size": 8,
        "max_steps": 8, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 0,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 1e-2,
        "eviction_weight": 0.5, "eviction_budgets": [3, 8],
    }  # fmt: skip
    return LookaheadTrainingArguments(**values | changes)


def weights(model):
    return {name: value.detach().clone() for name, value in adapter_parameters(model, "default").items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_is_what_decides(family, monkeypatch):
    """The importance that training compares with a response's is the score by which a prompt is evicted."""
    model = add_lookahead(tiny_model(family))
    decoder = get_decoder(model)
    ids, mask = left_padded([prompt_ids(1, 30)[0], prompt_ids(1, 17, seed=1)[0]])
    scores, add = {}, Eviction.add

    def recorded(eviction, index, candidates, found):
        scores[index] = found
        add(eviction, index, candidates, found)

    monkeypatch.setattr(Eviction, "add", recorded)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=LookaheadCache(7))
        tokens = decoder.lookahead
        predicted = lookahead_importance(
            model, decoder, PromptCache(decoder, ids, mask), tokens.active_tokens(), rows=tokens.active_rows()
        )
    assert predicted.keys() == scores.keys()
    for layer, found in scores.items():
        expected = predicted[layer].unflatten(1, (found.shape[1], -1)).mean(2)
        real = mask.bool()[:, None].expand_as(found)
        torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_leave_the_prompt_as_it_was(family):
    model = add_lookahead(tiny_model(family))
    decoder = get_decoder(model)
    ids, mask = left_padded([prompt_ids(1, 30)[0], prompt_ids(1, 17, seed=1)[0]])
    prompt = PromptCache(decoder, ids, mask)
    before = copy.deepcopy(prompt)
    for length in (1, 5):
        found = response_importance(decoder, prompt, prompt_ids(2, length, seed=2))
        again = response_importance(decoder, before, prompt_ids(2, length, seed=2))
        assert all(torch.equal(found[layer], again[layer]) for layer in found)
        before = copy.deepcopy(prompt)
    for layer, other in zip(prompt.layers, before.layers, strict=True):
        for name in ("conv_states", "recurrent_states"):
            for place, state in getattr(layer, name, {}).items():
                assert state is None or torch.equal(state, getattr(other, name)[place])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_only_the_adapter_changes(family, tmp_path):
    model = trainable(family)
    adapter = set(adapter_parameters(model, "default"))
    base = {name: value.clone() for name, value in model.named_parameters() if name not in adapter}
    start = weights(model)
    trainer = LookaheadTrainer(model, arguments(tmp_path), train_dataset=targets(), eval_dataset=targets())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    assert all(torch.equal(value, base[name]) for name, value in model.named_parameters() if name in base)
    moved = {name.rsplit(".", 2)[-2] for name, value in weights(model).items() if not torch.equal(value, start[name])}
    assert {"lookahead_kv_tokens", "lookahead_kv_A", "lookahead_kv_B"} <= moved
    assert ("lookahead_kv_rows" in moved) == (family in ("gemma3n_text", "gemma4_text"))


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "gemma3n_text"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(family, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}
    whole, resumed = trainable(family), trainable(family)
    LookaheadTrainer(whole, arguments(tmp_path, **changes), train_dataset=targets()).train()
    trainer = LookaheadTrainer(resumed, arguments(tmp_path, **changes), train_dataset=targets())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_5_text", "deepseek_v3", "gemma3n_text"])
def test_files_hold_the_whole_adapter(family, tmp_path):
    model = trainable(family)
    with torch.no_grad():
        for value in adapter_parameters(model, "default").values():
            value.copy_(torch.randn_like(value))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    assert weights(loaded).keys() == weights(model).keys()
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(loaded).items())
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    rows = [name for name in tensors if "lookahead_kv_rows" in name]
    assert len(rows) == (family == "gemma3n_text")
    if rows:
        del tensors[rows[0]]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="1 tensors are missing"):
            PeftModel.from_pretrained(tiny_model(family), tmp_path)


def test_layers_that_forget_are_not_trained():
    model = add_lookahead(tiny_model("jamba"))
    with pytest.raises(NotImplementedError, match=r"Mamba 1.*snapkv"):
        PromptCache(get_decoder(model), prompt_ids(1, 20))
