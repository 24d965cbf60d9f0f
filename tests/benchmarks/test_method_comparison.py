"""benchmarks/method_comparison.py: a JSON file and a loader make a row."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_checkpoint import save_small_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "method_comparison.py"
PRESS = """
import contextlib

from transformers import DynamicCache


class LatestPress:
    def __init__(self, keep):
        self.keep = keep

    @contextlib.contextmanager
    def __call__(self, model):
        def cut(module, arguments, output):
            for layer in output.past_key_values.layers:
                layer.keys, layer.values = layer.keys[:, :, -self.keep :], layer.values[:, :, -self.keep :]

        handle = model.register_forward_hook(cut)
        try:
            yield
        finally:
            handle.remove()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, texts, and three methods: one of ours, a context manager, and an adapter."""
    directory = tmp_path_factory.mktemp("methods")
    save_small_checkpoint(directory / "model", directory / "adapter")
    text = " ".join((ROOT / "LICENSE").read_text().split())
    paragraphs = re.sub(r"(\. )(?=\d+\. |[A-Z])", ".\n\n", text)
    rows = [{"source": "license", "document": name, "text": paragraphs} for name in ("one", "two")]
    (directory / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "latest_press.py").write_text(PRESS)
    for name, method in {
        "streaming": {"cache": "lkq_hf:LookaheadCache", "arguments": {"budget": 16, "scorer": "streaming"}},
        "press": {"around": "latest_press:LatestPress", "around_arguments": {"keep": 16}, "source": "a test"},
        "lookahead": {
            "cache": "lkq_hf:LookaheadCache",
            "arguments": {"budget": 16},
            "adapter": str(directory / "adapter"),
        },
    }.items():
        (directory / f"{name}.json").write_text(json.dumps({"name": name, **method}))
    return directory


def run(folder, *methods, length=640):
    command = [sys.executable, str(SCRIPT), *(str(folder / f"{name}.json") for name in methods)]
    command += ["--model", str(folder / "model"), "--texts", str(folder / "texts.jsonl"), "--length", str(length)]
    command += ["--prompts", "1", "--answer-tokens", "4", "--device", "cpu", "--out", str(folder / "rows")]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_one_command_adds_a_row(folder):
    done = run(folder, "press", "lookahead")
    assert not done.returncode, done.stderr
    before = json.loads((folder / "rows.json").read_text())["rows"]
    assert list(before) == ["full cache", "press", "lookahead"], "the full cache comes first, unasked"
    assert before["full cache"]["summarise"]["word_f1"] == 1
    assert before["press"]["bytes"] < before["full cache"]["bytes"] / 10
    assert before["lookahead"]["bytes"] < before["full cache"]["bytes"] / 4
    done = run(folder, "streaming")
    assert not done.returncode, done.stderr
    after = json.loads((folder / "rows.json").read_text())["rows"]
    assert list(after) == [*before, "streaming"] and {name: after[name] for name in before} == before
    table = (folder / "rows.md").read_text()
    assert all(f"| {name} |" in table for name in after) and "a test" in table


def test_rows_of_other_prompts_are_refused(folder):
    run(folder, "streaming")
    before = (folder / "rows.json").read_bytes()
    done = run(folder, "streaming", length=700)
    assert done.returncode and "holds rows of other prompts" in done.stderr
    assert (folder / "rows.json").read_bytes() == before


def test_every_file_is_a_method(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import method_comparison

    methods = [method_comparison.Method.read(path) for path in sorted(method_comparison.METHODS.glob("*.json"))]
    assert len({method.name for method in methods}) == len(methods) > 3
    assert method_comparison.FULL in {method.name for method in methods}
    assert all(method.source for method in methods)
