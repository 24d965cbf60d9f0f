"""The snippets of docs/evaluating.md, with the real model in the place of its id on the Hub.

tests/docs/test_snippets.py runs them with a tiny one.
"""

import gzip
import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from real_models import SMOLLM2_NAME, smollm2_directory

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluating.md").read_text(encoding="utf-8")
# The last of an option given twice counts: small runs of the same commands.
SMALL = {
    "eviction": "--length 384 --examples 1 --tasks needle --budgets 32 --device cpu",
    "perplexity": "--window 128 --max-windows 2 --device cpu",
    "inspect": "--max-new-tokens 8 --device cpu",
}


def snippets(language):
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return [snippet.replace(SMOLLM2_NAME, str(smollm2_directory())) for snippet in found]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with the files that the page speaks of."""
    text = " ".join((ROOT / "LICENSE").read_text().split())
    paragraphs = re.sub(r"(\. )(?=\d+\. |[A-Z])", ".\n\n", text)
    (tmp_path / "handbook.txt").write_text(paragraphs)
    (tmp_path / "prompt.txt").write_text(paragraphs[:2500])
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": paragraphs}).encode()))
    for name in ("model_cards", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
def test_python(folder):
    namespace = {}
    for snippet in snippets("python"):
        exec(snippet, namespace)
    assert namespace["figure"].axes


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
def test_commands(folder, monkeypatch):
    from lkq_hf.cli import main

    ran = []
    for snippet in snippets("sh"):
        words = shlex.split(snippet.replace("\\\n", " "))
        if words[0] != "lkq-hf":
            continue  # lm-eval's, which test_harness.py runs
        command = words[2] if words[1] == "evaluate" else words[1]
        monkeypatch.setattr(sys, "argv", [*words, *SMALL[command].split()])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        ran.append(command)
    assert ran == list(SMALL)
    for path in ("results/results.json", "results/pareto.png", "perplexity/results.json", "report.html"):
        assert (folder / path).stat().st_size > 100
    assert (ROOT / "docs" / "images" / "inspect.png").is_file()
