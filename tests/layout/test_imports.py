"""Imports point down and have no circles; the layers are in pyproject.toml."""

from pathlib import Path

from importlinter.cli import lint_imports

import lkq_hf

PROJECT = Path(lkq_hf.__file__).parents[1] / "pyproject.toml"


def test_imports_point_down_without_circles(capsys):
    failed = lint_imports(config_filename=str(PROJECT), no_cache=True)
    assert not failed, capsys.readouterr().out
