"""Calibration windows that the model writes itself."""

import copy
import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig

from lkq_hf.quantization import QuantizedLinear, TwoStageGPTQConfig, TwoStageQuantizer
from lkq_hf.quantization.calibrate import calibrate
from lkq_hf.quantization.calibration_data import calibration_tokens
from lkq_hf.quantization.config import REFINEMENTS
from lkq_hf.quantization.own_text import OwnTextError, interleave, write_windows


def test_tokens_are_drawn_as_the_model_predicts_them(tiny_llama, beginning):
    start = beginning.bos_token_id
    with torch.no_grad():
        expected = tiny_llama(torch.tensor([[start]])).logits[0, -1].softmax(-1)
    likely = int(expected.argmax())
    # What the model's authors advise changes the distribution, or ends texts.
    advised = GenerationConfig(temperature=0.1, top_k=2, repetition_penalty=9.0, eos_token_id=likely, do_sample=True)
    tiny_llama.generation_config = advised
    state = torch.get_rng_state()
    windows = write_windows(tiny_llama, beginning, 3000, 4)
    assert windows.shape == (3000, 4) and windows.dtype == torch.int64 and (windows[:, 0] == start).all()
    found = torch.bincount(windows[:, 1], minlength=128) / 3000
    other = torch.multinomial(expected, 3000, replacement=True, generator=torch.Generator().manual_seed(1))
    by_chance = (torch.bincount(other, minlength=128) / 3000 - expected).abs().sum()
    assert (found - expected).abs().sum() < 1.3 * by_chance < (expected - 1 / 128).abs().sum() / 2
    after = windows[windows[:, 1] == likely, 2]
    assert len(after) > 30 and len(after.unique()) > 10  # a text goes on after its end
    assert tiny_llama.generation_config is advised and torch.equal(torch.get_rng_state(), state)


@pytest.mark.one_version
def test_the_decoding_loop_writes_the_same(tiny_llama, beginning, switch_loop_on):
    plain = write_windows(tiny_llama, beginning, 40, 24)
    hooks, methods = len(tiny_llama.model._forward_hooks), set(vars(tiny_llama))
    batches = switch_loop_on()
    assert torch.equal(write_windows(tiny_llama, beginning, 40, 24), plain)
    assert batches == [(32, 1), (8, 1)]
    assert (len(tiny_llama.model._forward_hooks), set(vars(tiny_llama))) == (hooks, methods)


def test_another_seed_and_another_piece_are_other_text(tiny_llama, beginning):
    windows = torch.cat([write_windows(tiny_llama, beginning, 70, 8, seed=seed) for seed in (0, 1, 2)])
    assert len({tuple(window) for window in windows.tolist()}) == 210


def test_windows_begin_with_any_ordinary_token_where_the_tokenizer_adds_none(tiny_llama, tokenizer):
    windows = write_windows(tiny_llama, tokenizer, 300, 3, seed=1)
    assert not torch.isin(windows[:, 0], torch.tensor(tokenizer.all_special_ids)).any()
    assert len(windows[:, 0].unique()) > 90
    assert torch.equal(windows, write_windows(tiny_llama, tokenizer, 300, 3, seed=1))
    assert not torch.equal(windows, write_windows(tiny_llama, tokenizer, 300, 3, seed=2))
    assert set(write_windows(tiny_llama, None, 1000, 2)[:, 0].tolist()) > {0, 1, 127}


def test_tokens_that_the_model_does_not_know_are_not_begun_with(tiny_llama, tokenizer, beginning):
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([f"more{i}" for i in range(1000)])
    longer.add_tokens(["<special>"], special_tokens=True)
    assert write_windows(tiny_llama, longer, 50, 2).max() < 128
    beginning.add_special_tokens({"bos_token": "<begin>"})
    number = beginning.bos_token_id
    template = TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", number)])
    beginning._tokenizer.post_processor = template
    with pytest.raises(ValueError, match="beyond the model's vocabulary"):
        write_windows(tiny_llama, beginning, 2, 4)


def test_windows_are_mixed_evenly():
    dataset, own = torch.zeros(6, 2, dtype=torch.int64), torch.arange(1, 3).expand(2, 2).T.contiguous()
    assert interleave(dataset, own)[:, 0].tolist() == [0, 0, 0, 1, 0, 0, 0, 2]
    assert interleave(dataset[:2], own)[:, 1].tolist() == [0, 1, 0, 2]
    assert torch.equal(interleave(dataset[:0], own), own)


def asked_for(own_text):
    return {"advanced": {"own_text": own_text}}


def quantized(model, **options):
    config = TwoStageGPTQConfig(bits=4, group_size=32, num_samples=8, model_seqlen=16, **options)
    calibrate(model, config)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    return config


@pytest.mark.parametrize("share", [0.5, 0.3, 1])
def test_a_share_of_the_windows_is_the_models_own(tiny_llama, tokenizer, texts, monkeypatch, share):
    from lkq_hf.quantization import calibrate as module

    seen = []
    real = module.quantize_blocks
    monkeypatch.setattr(module, "quantize_blocks", lambda *args, **kw: seen.append(args[3]) or real(*args, **kw))
    own_windows = {0.5: 4, 0.3: 2, 1: 8}[share]
    written = write_windows(tiny_llama, tokenizer, own_windows, 16)
    given = [] if share == 1 else calibration_tokens(texts, tokenizer, 8 - own_windows, 16)[0].tolist()
    data = {} if share == 1 else {"dataset": texts}
    config = quantized(tiny_llama, **asked_for(share), tokenizer=tokenizer, **data)
    assert sorted(seen[0].tolist()) == sorted(given + written.tolist())
    recipe = config.meta["calibration"]
    assert (recipe["samples"], recipe["written_by_model"]) == (8, own_windows)
    assert recipe["dataset"] == (None if share == 1 else "list of 40 texts")
    assert "own_text" not in config.to_dict() and "no_own_text" not in config.meta


def test_the_refined_preset_writes_half(tiny_llama, tokenizer, texts, monkeypatch):
    monkeypatch.setitem(REFINEMENTS, "refined", {})
    own = {
        preset: quantized(copy.deepcopy(tiny_llama), preset=preset, dataset=texts, tokenizer=tokenizer)
        .meta["calibration"]["written_by_model"]
        for preset in ("default", "refined")
    }  # fmt: skip
    assert own == {"default": 0, "refined": 4}
    config = quantized(tiny_llama, preset="refined", **asked_for(0), dataset=texts, tokenizer=tokenizer)
    assert config.meta["calibration"]["written_by_model"] == 0


def test_no_data_and_unused_data_are_refused(tiny_llama, texts):
    for options, message in (
        ({"preset": "refined"}, "pass dataset= .* or own_text=1"),
        (asked_for(0.9), "pass dataset="),
        ({"dataset": texts, **asked_for(1)}, "leave one of them out"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(tiny_llama, TwoStageGPTQConfig(**options))
    for share in (-0.1, 1.5, "half"):
        with pytest.raises(ValueError, match="own_text must be a number from 0 to 1"):
            TwoStageGPTQConfig(**asked_for(share))


def test_an_interrupted_run_keeps_what_was_written(tiny_llama, tokenizer, tmp_path, monkeypatch):
    written = write_windows(tiny_llama, tokenizer, 40, 8, resume_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_llama), "generate", None)
        assert torch.equal(write_windows(tiny_llama, tokenizer, 40, 8, resume_dir=tmp_path), written)
    with pytest.raises(ValueError, match="length was 8, now 9"):
        write_windows(tiny_llama, tokenizer, 40, 9, resume_dir=tmp_path)


def out_of_memory(monkeypatch, model, limit):
    real, sizes = type(model).generate, []

    def generate(self, input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > limit:
            raise torch.OutOfMemoryError
        return real(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "generate", generate)
    return sizes


def test_fewer_windows_are_written_at_once_where_memory_is_short(tiny_llama, tokenizer, monkeypatch):
    sizes = out_of_memory(monkeypatch, tiny_llama, limit=10)
    windows = write_windows(tiny_llama, tokenizer, 40, 8)
    assert sizes == [32, 16, 8, 8, 8, 8, 8] and windows.shape == (40, 8)
    assert len({tuple(window) for window in windows.tolist()}) == 40


def test_a_model_that_cannot_write_is_refused_or_left_without(tiny_llama, tokenizer, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(REFINEMENTS, "refined", {})
    tiny_llama.save_pretrained(tmp_path / "base")
    options = {"dataset": texts, "tokenizer": tokenizer, "num_samples": 8, "model_seqlen": 16, "block_by_block": True}
    quantizer = TwoStageQuantizer(tmp_path / "base")
    quantizer.quantize(tmp_path / "out", preset="refined", **options)
    meta = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["meta"]
    assert "block_by_block reads one block at a time" in meta["no_own_text"]
    assert (meta["calibration"]["samples"], meta["calibration"]["written_by_model"]) == (8, 0)
    with pytest.raises(OwnTextError, match="block_by_block"):
        quantizer.quantize(tmp_path / "other", **asked_for(0.5), **options)

    out_of_memory(monkeypatch, tiny_llama, limit=0)
    with pytest.raises(OwnTextError, match="do not fit on cpu"):
        write_windows(tiny_llama, tokenizer, 4, 8)
    monkeypatch.setattr(type(tiny_llama), "can_generate", lambda self: False)
    with pytest.raises(OwnTextError, match="LlamaForCausalLM does not generate text"):
        write_windows(tiny_llama, tokenizer, 4, 8)


def test_a_checkpoint_needs_no_dataset(tiny_llama, tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = TwoStageGPTQConfig(bits=4, **asked_for(1), num_samples=8, model_seqlen=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(2, 20).view(1, -1)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="quantized already, and quantization_config has calibration data"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=config)
