"""Every type of causal language model of transformers: quantized, saved and loaded again, or clearly refused."""

import ast
import re
from collections.abc import Callable
from textwrap import shorten
from typing import Any

import pytest
import torch
import transformers
from tiny import CAUSAL_MODELS, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lkq_hf.quantization import TwoStageGPTQConfig, TwoStageQuantizer
from lkq_hf.quantization.blocks import find_blocks
from lkq_hf.quantization.calibrate import default_group_size
from lkq_hf.quantization.coverage import Coverage, coverage
from lkq_hf.quantization.install import replace_by_packed

ROWS = [
    {"input_ids": row} for row in torch.randint(3, 120, (4, 50), generator=torch.Generator().manual_seed(0)).tolist()
]
IDS = torch.randint(3, 120, (2, 16), generator=torch.Generator().manual_seed(1))
REFUSALS = (
    "the model's forward did not reach its last block",
    "the model computes with what its blocks return besides hidden states",
    "could be saved, but not loaded again",
    "does not run with packed layers",
    "found no list of blocks with linear layers",
    "is left to quantize",
)

# What was wrong once, of each kind one: blocks that return lists or more than hidden states, weights that models read
# themselves, experts in matrices, shared weights, decays with several dimensions, blocks of nothing but linear layers.
QUICK = {"openai-gpt", "glm_moe_dsa", "dbrx", "zamba2", "kimi_linear", "opt"}

# Sizes of a published checkpoint, where those of its type's configuration by default do not pack or are no model's.
PUBLISHED: dict[str, dict[str, Any]] = {
    # GLM-4.5-Air, 107 billion parameters
    "glm4_moe": {"head_dim": 128},
    # DeepSeek-V2-Lite, 15.7 billion
    "deepseek_v2": {
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "first_k_dense_replace": 1, "num_attention_heads": 16, "q_lora_rank": None,
    },
    # Nemotron 3 Nano 30B-A3B, 31.6 billion
    "nemotron_h": {
        "hidden_size": 2688, "intermediate_size": 1856, "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712, "n_routed_experts": 128, "num_experts_per_tok": 6,
        "num_key_value_heads": 2, "mamba_num_heads": 64, "num_hidden_layers": 52,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    },
    # Zamba2-1.2B, 1.22 billion
    "zamba2": {
        "hidden_size": 2048, "num_hidden_layers": 38, "n_mamba_heads": 64, "mamba_d_state": 128,
        "use_shared_attention_adapter": True,
        "layers_block_type": (["linear_attention"] * 5 + ["hybrid"]) * 6 + ["linear_attention"] * 2,
    },
}  # fmt: skip
PARAMETERS = {"glm4_moe": 106.85, "deepseek_v2": 15.71, "nemotron_h": 31.58, "zamba2": 1.22}
"""Billions of these, as their makers count them: the sizes above are complete."""


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def without_what_is_refused(attempt: Callable[[list[str]], Any]) -> Any:
    """What ``attempt`` returns once it is given the names that its refusals name; or the message of the last one."""
    exclude: set[str] = set()
    while True:
        try:
            return attempt(sorted(exclude))
        except ValueError as error:
            advice = re.search(r"modules_to_not_convert[=:] ?(\[.*?\])", str(error))
            named = set(ast.literal_eval(advice[1])) if advice else set()
            if named <= exclude:
                return str(error)
            exclude |= named


def settings(exclude, **changes):
    return {
        "bits": 4, "sym": False, "dataset": ROWS, "num_samples": 4, "model_seqlen": 16,
        "modules_to_not_convert": exclude,
    } | changes  # fmt: skip


def stays(covered: Coverage, list_name: str) -> str:
    """What stays in full precision; inside of the blocks without the name of their list."""
    return " ".join(name.removeprefix(f"{list_name}.*.") for name in covered.dense)


def at_full_size(name: str) -> tuple[Coverage, str] | None:
    """What is covered of the model that the type's configuration makes without arguments, or of a `PUBLISHED` one, on
    the meta device, and the name of its list of blocks; None where it makes none."""
    config = CONFIG_MAPPING[name](**PUBLISHED.get(name, {}))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError, AssertionError):
        return None

    def attempt(exclude):
        own = TwoStageGPTQConfig(**settings(exclude))
        own.group_size = default_group_size(model, own)
        list_name, _ = find_blocks(model)
        replace_by_packed(model, own)
        return coverage(model), list_name

    found = without_what_is_refused(attempt)
    return None if isinstance(found, str) else found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_complete(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**PUBLISHED[name]))
    assert round(model.num_parameters() / 1e9, 2) == PARAMETERS[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CAUSAL_MODELS]
)
def test_a_model_comes_back_as_it_was_quantized_or_is_refused(name, tmp_path, record_property):
    """Writes what `docs/make_support.py` makes its table of quantization from."""

    def record(**values):
        for key, value in ({"quantized": name, "transformers": transformers.__version__} | values).items():
            record_property(key, value)

    try:
        model = tiny_model(name)
        before = logits(model)
    except (Exception, pytest.skip.Exception) as error:
        reason = shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
        record(state="not tried", reason=reason, share="", stays="")
        pytest.skip(reason)
    assert torch.isfinite(before).all()
    quantizer = TwoStageQuantizer.from_pretrained(model)
    result = without_what_is_refused(
        lambda exclude: quantizer.quantize(tmp_path / "out", **settings(exclude, group_size=32))
    )
    if isinstance(result, str):
        assert any(refusal in result for refusal in REFUSALS), result
        assert not (tmp_path / "out").exists()
        record(state="refused", reason=result, share="", stays="")
        return
    after = logits(result)
    assert torch.isfinite(after).all() and not torch.equal(after, before)
    again = type(result).from_pretrained(tmp_path / "out", attn_implementation=result.config._attn_implementation)
    torch.testing.assert_close(logits(again), after, rtol=1e-4, atol=1e-4)
    assert quantizer.report.coverage == coverage(again), "what is said before the work is what is done"
    full = at_full_size(name)
    covered, list_name = full or (coverage(again), result.config.quantization_config.block_name_to_quantize)
    record(state="works", reason="" if full else "tiny", share=covered.share, stays=stays(covered, list_name))
