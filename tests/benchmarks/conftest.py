import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run_script(monkeypatch):
    """Runs a script of benchmarks/ with arguments, in this process: importing the libraries takes longest."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("LKQ_KERNELS", "")  # some change it

    def run_script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        importlib.import_module(name).main()

    return run_script
