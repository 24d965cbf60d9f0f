"""No network, no telemetry, and no file outside of what a user named and the documented caches."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lkq_hf

ROOT = Path(lkq_hf.__file__).parents[1]

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


@pytest.fixture
def places(tmp_path):
    """Empty directories for everything that a program may find by itself, and the environment that points there."""
    names = ("home", "temporary", "working")
    for name in names:
        (tmp_path / name).mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "XDG_", "TRANSFORMERS_", "HUGGINGFACE_", "TRITON_", "TORCH"))
    }
    environment |= {
        "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    return tmp_path, environment


def run(places, code):
    directory, environment = places
    process = subprocess.run(
        [sys.executable, "-c", NO_NETWORK + textwrap.dedent(code) + "\nassert not tried, tried"],
        cwd=directory / "working", env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr


def written(places):
    directory, _ = places
    return sorted(
        str(path.relative_to(directory))
        for name in ("home", "temporary", "working")
        for path in (directory / name).rglob("*")
        if path.is_file()
    )


def test_importing_every_module(places):
    run(
        places,
        """
        import importlib, pkgutil, threading
        import lkq_hf
        for module in pkgutil.walk_packages(lkq_hf.__path__, "lkq_hf."):
            # Of a library that need not be installed, and what runs the command line.
            if not module.name.endswith(("__main__", "harness")):
                importlib.import_module(module.name)
        assert threading.active_count() == 1, threading.enumerate()
        """,
    )
    assert written(places) == []


def command(*arguments):
    words = ["lkq-hf", *map(str, arguments)]
    return f"""
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
def test_commands(name, files, places):
    out = places[0] / "out"
    if name == "inspect":
        out.mkdir()
    run(places, command(*COMMANDS[name](files, out)))
    assert any(out.iterdir())
    assert [path for path in written(places) if not path.startswith(CACHE)] == []


def test_training(files, places):
    out = places[0] / "out"
    run(places, command(*COMMANDS["generate-targets"](files, places[0] / "targets")))
    run(
        places,
        command(
            "train", files / "base", "--targets", places[0] / "targets", "--out", out, "--base-model-name", "a/b",
            "--num-lookahead-tokens", 2, "--rank", 2, "--max-steps", 1, "--batch-size", 1, "--dtype", "float32",
            "--device", "cpu",
        ).replace("\n    try:", "\n    import os; os.environ['HF_HUB_OFFLINE'] = '1'\n    try:"),
    )  # fmt: skip
    assert (out / "adapter_model.safetensors").exists()
    assert [path for path in written(places) if not path.startswith(CACHE)] == []


def test_generation(files, places):
    run(
        places,
        f"""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from lkq_hf import LookaheadCache

        model = AutoModelForCausalLM.from_pretrained({str(files / "base")!r})
        model.load_adapter({str(files / "adapter")!r})
        ids = torch.arange(3, 60)[None]
        model.generate(input_ids=ids, past_key_values=LookaheadCache(8), max_new_tokens=4)
        """,
    )
    assert written(places) == []
