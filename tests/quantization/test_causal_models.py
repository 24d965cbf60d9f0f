"""Every type of causal language model of transformers: quantized, saved and loaded again, or clearly refused."""

import ast
import re

import pytest
import torch
from causal_models import CAUSAL_MODELS, tiny_causal_model

from lkq_hf.quantization import TwoStageQuantizer

pytestmark = pytest.mark.slow

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


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def quantized(model, directory):
    """The model, quantized without the layers that the refusals name; or the message of one that names none."""
    exclude: set[str] = set()
    while True:
        try:
            return TwoStageQuantizer.from_pretrained(model).quantize(
                directory,
                bits=4,
                group_size=32,
                sym=False,
                dataset=ROWS,
                num_samples=4,
                model_seqlen=16,
                modules_to_not_convert=sorted(exclude),
            )
        except ValueError as error:
            advice = re.search(r"modules_to_not_convert[=:] ?(\[.*?\])", str(error))
            named = set(ast.literal_eval(advice[1])) if advice else set()
            if named <= exclude:
                return str(error)
            exclude |= named


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_a_model_comes_back_as_it_was_quantized_or_is_refused(name, tmp_path):
    try:
        model = tiny_causal_model(name)
        before = logits(model)
    except Exception as error:
        pytest.skip(f"no tiny model: {type(error).__name__}: {str(error)[:200]}")
    assert torch.isfinite(before).all()
    result = quantized(model, tmp_path / "out")
    if isinstance(result, str):
        assert any(refusal in result for refusal in REFUSALS), result
        assert not (tmp_path / "out").exists()
        return
    after = logits(result)
    assert torch.isfinite(after).all() and not torch.equal(after, before)
    again = type(result).from_pretrained(tmp_path / "out", attn_implementation=result.config._attn_implementation)
    torch.testing.assert_close(logits(again), after, rtol=1e-4, atol=1e-4)
