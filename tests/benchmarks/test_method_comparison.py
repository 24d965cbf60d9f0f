"""benchmarks/method_comparison.py: a JSON file and a loader make a row."""

import json
import re
from pathlib import Path

import pytest
from small_checkpoint import save_small_checkpoint

ROOT = Path(__file__).parents[2]
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


@pytest.fixture
def run(folder, run_script):
    def run(*methods, length=640):
        options = ["--model", folder / "model", "--texts", folder / "texts.jsonl", "--length", length]
        options += ["--prompts", 1, "--answer-tokens", 4, "--device", "cpu", "--out", folder / "rows"]
        run_script("method_comparison", *(folder / f"{name}.json" for name in methods), *options)

    return run


def test_one_command_adds_a_row(folder, run):
    run("press", "lookahead")
    before = json.loads((folder / "rows.json").read_text())["rows"]
    assert list(before) == ["full cache", "press", "lookahead"], "the full cache comes first, unasked"
    assert before["full cache"]["summarise"]["word_f1"] == 1
    assert before["press"]["bytes"] < before["full cache"]["bytes"] / 10
    assert before["lookahead"]["bytes"] < before["full cache"]["bytes"] / 4
    run("streaming")
    after = json.loads((folder / "rows.json").read_text())["rows"]
    assert list(after) == [*before, "streaming"] and {name: after[name] for name in before} == before
    table = (folder / "rows.md").read_text()
    assert all(f"| {name} |" in table for name in after) and "a test" in table


def test_rows_of_other_prompts_are_refused(folder, run):
    run("streaming")
    before = (folder / "rows.json").read_bytes()
    with pytest.raises(SystemExit, match="holds rows of other prompts"):
        run("streaming", length=700)
    assert (folder / "rows.json").read_bytes() == before


def test_every_file_is_a_method(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import method_comparison

    methods = [method_comparison.Method.read(path) for path in sorted(method_comparison.METHODS.glob("*.json"))]
    assert len({method.name for method in methods}) == len(methods) > 3
    assert method_comparison.FULL in {method.name for method in methods}
    assert all(method.source for method in methods)
