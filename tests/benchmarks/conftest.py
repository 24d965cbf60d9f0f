import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run_script(monkeypatch):
    """Runs a script of benchmarks/ in this process, in its own folder's company, with arguments."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run_script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        importlib.import_module(name).main()

    return run_script
