"""What a command costs before it has work to do, and that imports in any order register what has to be."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import lkq_hf
from lkq_hf.cache.allocation import ALLOCATIONS
from lkq_hf.cli import checks
from lkq_hf.evaluation.tasks import TASKS, QuestionAnswering
from lkq_hf.quantization import config as quantization_config
from lkq_hf.scoring import SCORERS
from lkq_hf.training.soft_allocation import SOFT_ALLOCATIONS

ROOT = Path(lkq_hf.__file__).parents[1]
CPU_SECONDS = 0.7
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "optimum", "numpy")


def python(*arguments, cwd=None):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def cpu_seconds(*arguments, cwd=None):
    """Of user and system, and what the process printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = python(*arguments, cwd=cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, process


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A working directory with a text, a directory without a model, and one with an adapter alone."""
    directory = tmp_path_factory.mktemp("places")
    (directory / "text.txt").write_text("A text.")
    (directory / "empty").mkdir()
    (directory / "adapter").mkdir()
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "alice/base"}))
    return directory


QUICK = {
    "--version": (["--version"], 0, "lkq-hf 0"),
    "--help": (["--help"], 0, "Commands:"),
    "help of a command": (["evaluate", "eviction", "--help"], 0, "--budgets"),
    "no such command": (["quantise"], 2, "No such command"),
    "no such option": (["quantize", "m", "--dtaset", "x"], 2, "--dtaset"),
    "no such text": (["evaluate", "perplexity", "m", "--text", "none", "--out", "o"], 2, "'none' does not exist"),
    "no such documents": (["generate-targets", "m", "--documents", "none", "--out", "o"], 1, "there is no file none"),
    "no such prompts": (["generate-targets", "m", "--prompts", "none", "--out", "o"], 2, "'none' does not exist"),
    "no such targets": (["train", "m", "--targets", "none", "--out", "o"], 2, "'none' does not exist"),
    "targets without responses": (["train", "empty/", "--targets", "empty", "--out", "o"], 1, "holds no model"),
    "no such prompt": (["inspect", "m", "--prompt", "none", "--out", "o"], 2, "'none' does not exist"),
    "no such directory to push": (["push", "none", "a/b"], 2, "'none' does not exist"),
    "no such directory to export": (["export", "none", "--format", "gptq", "--out", "o"], 2, "'none' does not exist"),
    "nothing to export": (["export", "empty", "--format", "gptq", "--out", "o"], 1, "holds no config.json"),
    "no such calibration file": (["quantize", "m", "--dataset", "none.jsonl", "--out", "o"], 1, "no file none.jsonl"),
    "no such model": (["evaluate", "perplexity", "./none", "--text", "text.txt", "--out", "o"], 1, "no directory ./n"),
    "an empty model": (["evaluate", "perplexity", "empty", "--text", "text.txt", "--out", "o"], 1, "found nothing"),
    "a file as model": (["inspect", "text.txt", "--prompt", "text.txt", "--out", "o"], 1, "text.txt is a file"),
    "an adapter as model": (["inspect", "adapter", "--prompt", "text.txt", "--out", "o"], 1, "Pass alice/base in its"),
    "no such adapter": (
        ["inspect", "m", "--adapter", "none/", "--prompt", "text.txt", "--out", "o"], 1, "no directory none/",
    ),
    "a directory as adapter": (
        ["inspect", "m", "--adapter", "empty", "--prompt", "text.txt", "--out", "o"], 1, "empty holds no adapter",
    ),
    "no such scorer": (
        ["evaluate", "eviction", "m", "--text", "text.txt", "--out", "o", "--scorers", "h2o"], 1, "got 'h2o'",
    ),
    "no such task": (
        ["evaluate", "eviction", "m", "--text", "text.txt", "--out", "o", "--tasks", "riddles"], 1, "got 'riddles'",
    ),
    "a wrong budget": (["inspect", "m", "--prompt", "text.txt", "--out", "o", "--budget", "1.5"], 1, "got '1.5'"),
    "a wrong number of bits": (["quantize", "m", "--dataset", "text.txt", "--bits", "5", "--out", "o"], 1, "got 5"),
    "a wrong data type": (["quantize", "m", "--dataset", "text.txt", "--dtype", "int3", "--out", "o"], 1, "'int3'"),
    "an output that is not empty": (
        ["quantize", "m", "--dataset", "text.txt", "--out", "adapter"], 1, "is not an empty directory",
    ),
    "an output that cannot be written": (
        ["inspect", "m", "--prompt", "text.txt", "--out", "text.txt/o"], 1, "text.txt/o cannot be written",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUICK)
def test_an_answer_without_work_is_quick(case, places):
    arguments, code, message = QUICK[case]
    seconds, process = cpu_seconds("-m", "lkq_hf.cli", *arguments, cwd=places)
    assert process.returncode == code, process.stderr
    assert message in process.stdout + process.stderr
    assert seconds < CPU_SECONDS
    assert sorted(path.name for path in places.iterdir()) == ["adapter", "empty", "text.txt"]


def test_importing_the_package_imports_nothing_heavy():
    seconds, process = cpu_seconds("-c", f"import sys, lkq_hf; print([m for m in {HEAVY} if m in sys.modules])")
    assert process.stdout == "[]\n", process.stderr
    assert seconds < CPU_SECONDS


def test_the_names_that_are_checked_early_are_those_of_the_library():
    assert checks.ALLOCATIONS == ALLOCATIONS
    assert checks.SOFT_ALLOCATIONS == SOFT_ALLOCATIONS
    assert {*checks.SCORERS} == {*SCORERS, "oracle"}
    assert {*checks.TASKS} == {*TASKS, QuestionAnswering.kind}
    assert checks.BITS == quantization_config.BITS and [*checks.PRESETS] == [*quantization_config.PRESETS]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("a/b", False), ("gpt2", False), ("./a", True), ("~/a", True), ("/a", True), ("a/b/c", True), ("a/", True)],
)
def test_what_looks_like_a_path(name, is_one):
    assert checks.looks_like_path(name) is is_one


# Orders of imports; after each, adapters and checkpoints have to load.
ORDERS = """
lkq_hf transformers
lkq_hf peft
peft lkq_hf
transformers.quantizers.auto lkq_hf
lkq_hf transformers.trainer
lkq_hf.cache.prepare
lkq_hf.quantization.calibrate
"""
MORE_ORDERS = """
transformers lkq_hf
transformers.trainer lkq_hf
lkq_hf transformers.models.llama.modeling_llama
lkq_hf peft.tuners.lora
lkq_hf.registration peft
lkq_hf.adapter
lkq_hf.adapter.config
lkq_hf.cache
lkq_hf.quantization.config
lkq_hf.quantization.quantizer
lkq_hf.quantization.linear
lkq_hf.scoring
lkq_hf.hub
lkq_hf.training
lkq_hf.evaluation.eviction
lkq_hf.inspection
"""

LOADING = """
import importlib, os, sys, traceback
import accelerate, datasets, torch, torch._dynamo, torch.distributed.tensor

base, adapter, quantized = sys.argv[1:4]


def load():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quantized)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantizedLinear"
    model.load_adapter(adapter)
    from peft import PeftModel

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    import lkq_hf

    assert AUTO_QUANTIZER_MAPPING["two_stage_gptq"].__name__ == "TwoStageGPTQHfQuantizer"
    assert all(getattr(lkq_hf, name) is not None for name in lkq_hf.__all__)


for order in sys.stdin.read().split("\\n"):
    if (child := os.fork()) == 0:
        try:
            for module in order.split():
                importlib.import_module(module)
            load()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(order)
"""


@pytest.mark.parametrize("orders", [ORDERS, pytest.param(MORE_ORDERS, marks=pytest.mark.slow)], ids=["few", "many"])
def test_imports_in_any_order_register(orders, tmp_path):
    """In children of a process that has imported what nothing is registered with, as if each were one of its own."""
    from small_checkpoint import save_small_checkpoint

    from lkq_hf import TwoStageQuantizer

    save_small_checkpoint(tmp_path / "base", tmp_path / "adapter")
    rows = [{"input_ids": list(range(3, 60))}] * 4
    TwoStageQuantizer(tmp_path / "base").quantize(
        tmp_path / "w4", dataset=rows, num_samples=2, model_seqlen=16, group_size=32, device="cpu"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", LOADING, *(str(tmp_path / name) for name in ("base", "adapter", "w4"))],
        input=orders.strip(),
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert (process.returncode, process.stdout) == (0, ""), process.stderr
