"""Each test says which item of the support table it belongs to, and leaves the process as it found it."""

import pytest
import transformers
from reference import assert_nothing_is_left_behind
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "item(name, refused=None): row of docs/support.md; refused: what to do instead of it",
    )


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in item.iter_markers("item"):
            # Read by docs/make_support.py from the report (--junit-xml).
            item.user_properties += [
                ("item", mark.args[0]),
                ("refused", mark.kwargs.get("refused", "")),
                ("transformers", transformers.__version__),
            ]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    entries = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    yield
    assert_nothing_is_left_behind(entries)
