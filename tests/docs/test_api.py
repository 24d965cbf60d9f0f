"""The API reference is that of the code."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "make_api.py"


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_api", SCRIPT)
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.render(), "run: python docs/make_api.py"
