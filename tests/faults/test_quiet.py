"""No network, no telemetry, and no file outside of what a user named and the documented caches."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from warm_python import WarmPython

import lkq_hf

ROOT = Path(lkq_hf.__file__).parents[1]
PLACES = ("home", "temporary", "working")

# Every attempt to look up or reach another machine is an error; what it was is told at the end as well.
NO_NETWORK = """
import sys

tried = []

def hook(name, arguments):
    if name in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
            tried.append((name, address))
            raise OSError(f"tried to reach {address}")
    if name in ("socket.getaddrinfo", "socket.gethostbyname") and arguments[0] not in ("127.0.0.1", "localhost", None):
        tried.append((name, arguments[0]))
        raise OSError(f"tried to look up {arguments[0]}")

sys.addaudithook(hook)
"""

IMPORTS = """
import importlib, pkgutil, threading
import lkq_hf

for module in pkgutil.walk_packages(lkq_hf.__path__, "lkq_hf."):
    # Of a library that need not be installed, and what runs the command line.
    if not module.name.endswith(("__main__", "harness")):
        importlib.import_module(module.name)
threads = threading.enumerate()
"""


@dataclass
class Machine:
    """Empty directories for everything that a program may find by itself, and a Python whose environment points there.

    Python has imported every module; tests run in processes forked from it.
    """

    directory: Path
    python: WarmPython
    written_by_imports: set[str] = field(default_factory=set)

    def written(self):
        places = (self.directory / name for name in PLACES)
        return {
            str(path.relative_to(self.directory)) for place in places for path in place.rglob("*") if path.is_file()
        }


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("machine")
    for name in PLACES:
        (directory / name).mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "XDG_", "TRANSFORMERS_", "HUGGINGFACE_", "TRITON_", "TORCH"))
    }
    environment |= {
        "HOME": str(directory / "home"), "TMPDIR": str(directory / "temporary"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    with WarmPython(NO_NETWORK + IMPORTS, cwd=directory / "working", env=environment) as python:
        python.run("pass")  # all has been imported when this has run
        made = Machine(directory, python)
        made.written_by_imports = made.written()
        yield made


@pytest.fixture
def run(machine):
    """Runs code, and returns the files that it wrote to where nobody told it to."""

    def run(code):
        before = machine.written()
        code = f"from __main__ import tried\n{code}\nassert not tried, tried"
        done = machine.python.run(code)
        assert done.returncode == 0, done.stdout + done.stderr
        return sorted(machine.written() - before)

    return run


def test_importing_every_module(machine, run):
    run("from __main__ import threads; assert len(threads) == 1, threads")
    assert machine.written_by_imports == set()


def test_what_is_looked_for_is_found(machine, run):
    with pytest.raises(AssertionError, match="tried to look up example"):
        run("import socket; socket.create_connection(('example.org', 80))")
    with pytest.raises(AssertionError, match="getaddrinfo"):
        run("import contextlib, socket\nwith contextlib.suppress(OSError): socket.getaddrinfo('example.org', 80)")
    assert run("import pathlib; pathlib.Path.home().joinpath('a').write_text('b')") == ["home/a"]


def command(*arguments):
    words = ["lkq-hf", *map(str, arguments)]
    return f"""
import sys
from lkq_hf.cli import main

sys.argv = {words!r}
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


COMMANDS = {
    "generate-targets": lambda files, out: [
        "generate-targets", files / "base", "--prompts", files / "prompts.jsonl", "--out", out, "--max-new-tokens", 3,
        "--dtype", "float32", "--device", "cpu",
    ],
    "quantize": lambda files, out: [
        "quantize", files / "base", "--dataset", files / "calibration.jsonl", "--out", out, "--num-samples", 2,
        "--model-seqlen", 32, "--group-size", 32, "--device", "cpu",
    ],
    "evaluate": lambda files, out: [
        "evaluate", "eviction", files / "base", "--adapter", files / "adapter", "--tasks", "continue", "--text",
        files / "texts.jsonl", "--length", 96, "--examples", 1, "--budgets", 16, "--no-plots", "--device", "cpu",
        "--out", out,
    ],
    "inspect": lambda files, out: [
        "inspect", files / "base", "--adapter", files / "adapter", "--prompt", files / "prompt.txt", "--budget",
        32, "--device", "cpu", "--out", out / "report.html",
    ],
}  # fmt: skip

# What the data sets library keeps of a file that it has read (its documented cache, HF_DATASETS_CACHE).
CACHE = "home/.cache/huggingface/"


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, files, tmp_path, run):
    out = tmp_path / "out"
    if name == "inspect":
        out.mkdir()
    written = run(command(*COMMANDS[name](files, out)))
    assert any(out.iterdir())
    assert [path for path in written if not path.startswith(CACHE)] == []


def test_training(files, tmp_path, run):
    out, targets = tmp_path / "out", tmp_path / "targets"
    run(command(*COMMANDS["generate-targets"](files, targets)))
    written = run(
        "from huggingface_hub import constants; constants.HF_HUB_OFFLINE = True"
        + command(
            "train", files / "base", "--targets", targets, "--out", out, "--base-model-name", "a/b",
            "--num-lookahead-tokens", 2, "--rank", 2, "--max-steps", 1, "--batch-size", 1, "--dtype", "float32",
            "--device", "cpu",
        )
    )  # fmt: skip
    assert (out / "adapter_model.safetensors").exists()
    assert [path for path in written if not path.startswith(CACHE)] == []


def test_generation(files, run):
    written = run(
        f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from lkq_hf import LookaheadCache

model = AutoModelForCausalLM.from_pretrained({str(files / "base")!r})
model.load_adapter({str(files / "adapter")!r})
ids = torch.arange(3, 60)[None]
model.generate(input_ids=ids, past_key_values=LookaheadCache(8), max_new_tokens=4)
"""
    )
    assert written == []
