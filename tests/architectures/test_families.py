"""Every type of causal language model of transformers: equal to a masked full cache, or refused."""

import re
from pathlib import Path

import pytest
import transformers
from families import NOT_TRIED, REFUSED, SCORERS, WORKS, try_family
from tiny import CAUSAL_MODELS
from transformers import CONFIG_MAPPING

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

# Beside those of the other files here, which try more than these two turns: what people run, and of each reason one.
WORKING = [
    "qwen3_5_text", "qwen3_next", "granitemoehybrid", "lfm2", "nemotron_h", "jamba", "kimi_linear", "deepseek_v3",
    "glm4_moe_lite", "mistral4", "gpt_oss", "gemma3n_text", "gemma4_text", "gpt2", "bert", "bart", "stablelm",
    "modernbert-decoder", "whisper", "zamba", "zamba2",
]  # fmt: skip
REASONS = {
    "bloom": "computes attention by itself",
    "falcon": "computes attention by itself",
    "gpt_neo": "computes attention by itself",
    "mpt": "computes attention by itself",
    "mamba": "every layer of MambaModel keeps a state of fixed size",
    "xlnet": "no module of XLNetModel keeps keys and values in a cache",
    "deepseek_v32": "an indexer selects the few entries that each token attends to",
    "deepseek_v4": "the model compresses its cache itself",
    "recurrent_gemma": "every attention layer of this model .* has a sliding window",
    "diffllama": "changes keys or values after the cache has returned them",
    "inkling_text": "adds a bias by distance",
    "doge": "makes a mask for each head",
    "minimax": "works with a cache of its own",
    "mllama": "keeps what pictures were made of",
    "dory": "runs its layers in loops",
    "blt": "no num_hidden_layers, by which transformers lays out any cache",
}


def test_the_support_page_names_every_type():
    text = PAGE.read_text(encoding="utf-8")
    if f" {transformers.__version__}" not in text.partition("## Families")[2]:
        pytest.skip(f"{PAGE.name} was not made with transformers {transformers.__version__}")
    assert not [name for name in CAUSAL_MODELS if f"`{name}`" not in text]


def outcome(model_type, scorer):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return try_family(model_type, scorer)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("model_type", WORKING)
def test_what_people_run_works(model_type, scorer):
    found = outcome(model_type, scorer)
    assert found.state == WORKS, found.reason


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("model_type", REASONS)
def test_refusals_say_why(model_type, scorer):
    found = outcome(model_type, scorer)
    assert found.state == REFUSED
    assert re.search(REASONS[model_type], found.reason)
    assert re.search("Generate (with|without) ", found.reason), "what to do instead"


def test_modules_that_run_for_several_layers_are_refused():
    found = outcome("hrm_text", "snapkv")
    assert found.state == REFUSED and "among several layers of the cache" in found.reason


@pytest.mark.slow
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("model_type", CAUSAL_MODELS)
def test_every_family_works_or_is_refused(model_type, scorer, record_property):
    """Writes what `docs/make_support.py` makes its table of families from."""
    found = try_family(model_type, scorer)
    for name, value in {"family": model_type, "scorer": scorer, "state": found.state, "reason": found.reason}.items():
        record_property(name, value)
    record_property("transformers", transformers.__version__)
    if found.state == NOT_TRIED:
        pytest.skip(found.reason)
