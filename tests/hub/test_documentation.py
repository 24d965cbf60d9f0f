"""docs/sharing-on-the-hub.md, executed from top to bottom."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from sharing import BASE

from lkq_hf.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "sharing-on-the-hub.md"


def test_the_page_runs(hub, saved_adapter, saved_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved_adapter, "adapter")
    shutil.copytree(saved_checkpoint, "model-w4")
    text = PAGE.read_text().replace("your-name", "alice").replace("HuggingFaceTB/SmolLM2-135M-Instruct", BASE)
    names: dict = {}
    blocks = re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "python", "python", "python", "python", "python"]
    for language, block in blocks:
        if language == "python":
            exec(compile(block, PAGE.name, "exec"), names)
            continue
        for line in block.splitlines():
            monkeypatch.setattr(sys, "argv", shlex.split(line))
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code
    assert hub.repositories["alice/smollm2-w4"].private
    assert "adapter_model.safetensors" in hub.files("alice/smollm2-lookahead", "v2")
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
