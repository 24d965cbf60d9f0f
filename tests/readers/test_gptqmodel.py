"""What GPTQModel, and transformers with it, make of our exports on a CPU: our log-probabilities.

The environment takes some minutes to make and 6 GB. `LKQ_READERS` names a directory to keep such environments in.
"""

import json
import os
from pathlib import Path

import pytest
from environments import build, run
from log_probabilities import assert_equal_to_rounding

from lkq_hf.quantization.export import export_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.timeout(7200)]

VERSION = "7.7.0"
BASIS = ["torch==2.14.1", "peft==0.21.*", "setuptools", "wheel", "optimum==2.3.0"]
# 8 bits lose no more than bfloat16 does, so log-probabilities cannot tell them from the original's.
SETTINGS = [(4, True), (4, False), (3, False)]

READER = """
import json, sys
import torch
from gptqmodel import BACKEND, GPTQModel
from transformers import AutoModelForCausalLM

def load(how, directory):
    if how == "gptqmodel":
        return GPTQModel.load(directory, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.bfloat16).model
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map="cpu")

rows, out = json.loads(sys.argv[1]), sys.argv[2]
found = {}
for directory in sys.argv[3:]:
    for how in ("gptqmodel", "transformers"):
        model = load(how, directory)
        assert any(hasattr(module, "qweight") for module in model.modules()), "nothing is packed"
        found[f"{how} {directory}"] = scores = []
        for row in rows:
            ids = torch.tensor([row])
            with torch.no_grad():
                every = model(ids).logits[0, :-1].float().log_softmax(-1)
            scores.append(every.gather(1, ids[0, 1:, None])[:, 0].tolist())
with open(out, "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def read(directory, checkpoints, rows):
    """What each engine says, by its name and the directory of the export."""
    home = Path(os.environ.get("LKQ_READERS", directory))
    python = build(home / f"gptqmodel-{VERSION}", BASIS, then=["--no-build-isolation", f"gptqmodel=={VERSION}"])
    exports = [
        export_checkpoint(checkpoints[each] / "ours", checkpoints[each] / "gptqmodel", "gptq") for each in SETTINGS
    ]
    run(python, READER, json.dumps(rows), directory / "gptqmodel.json", *exports)
    return json.loads((directory / "gptqmodel.json").read_text())


@pytest.mark.parametrize("how", ["gptqmodel", "transformers"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_log_probabilities_are_ours_to_rounding(read, checkpoints, rows, setting, how):
    assert_equal_to_rounding(read[f"{how} {checkpoints[setting] / 'gptqmodel'}"], checkpoints[setting] / "ours", rows)
