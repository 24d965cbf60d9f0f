"""Files of earlier versions and calls written for them still work.

The files in this folder were made when each advanced option was an argument of `TwoStageGPTQConfig`: two checkpoints
of a Llama of two layers, quantized on 4 windows of 16 tokens (4 bits by default; 3 bits and an 8-bit layer, with
arguments that have moved), and an adapter for the same model. `expected.json` has what that version made of them.
"""

import inspect
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lkq_hf import LookaheadCache, TwoStageGPTQConfig

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
IDS = torch.arange(2, 42)[None]
MOVED = {
    "stages": ("stage1",), "damp_percent": 0.02, "column_order": "stored", "corrected_target": False,
    "corrected_residual": False, "alpha": 0.5, "sweeps": 3, "scale_search": "mse", "round_to_nearest": True,
    "true_sequential": False, "block_name_to_quantize": "model.layers", "batch_size": 2, "seed": 1, "offload": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint_of_moved_arguments"])
def test_a_checkpoint(name, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="TwoStageGPTQConfig")
        model = AutoModelForCausalLM.from_pretrained(HERE / name)
    with torch.no_grad():
        found = model(IDS).logits[0, -1, :8]
    torch.testing.assert_close(found, torch.tensor(EXPECTED[name]), rtol=1e-3, atol=1e-3)
    # Saved anew, its config.json says the same.
    model.save_pretrained(tmp_path)
    before, after = (
        json.loads((directory / "config.json").read_text())["quantization_config"]
        for directory in (HERE / name, tmp_path)
    )
    assert before == after


def test_an_adapter():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = PeftModel.from_pretrained(LlamaForCausalLM(config).eval(), HERE / "adapter")
    cache = LookaheadCache(budget=8)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    _, _, positions, valid = cache.layers[0].prefix.padded()
    kept = [row[mask].tolist() for row, mask in zip(positions.flatten(0, 1), valid.flatten(0, 1), strict=True)]
    assert kept == EXPECTED["adapter"]


@pytest.mark.parametrize("name", MOVED)
def test_an_argument_that_has_moved_is_taken_with_a_warning(name):
    with pytest.warns(FutureWarning, match=rf'pass advanced={{"{name}": .*refuses {name}='):
        moved = TwoStageGPTQConfig(bits=3, **{name: MOVED[name]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moved.to_dict() == TwoStageGPTQConfig(bits=3, advanced={name: MOVED[name]}).to_dict()
    assert getattr(moved, name) == MOVED[name] != getattr(TwoStageGPTQConfig(bits=3), name)


def test_none_still_stands_for_the_presets_value():
    with pytest.warns(FutureWarning, match="alpha"):
        assert TwoStageGPTQConfig(preset="paper", alpha=None, damp_percent=None).damp_percent == 0.01


def test_few_arguments():
    arguments = inspect.signature(TwoStageGPTQConfig).parameters.values()
    assert sum(argument.kind is not inspect.Parameter.VAR_KEYWORD for argument in arguments) <= 15
