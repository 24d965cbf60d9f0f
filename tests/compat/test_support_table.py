"""docs/support.md has a row for every item of the tests here, and no other."""

import ast
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def items():
    """What the tests of this folder are marked with, read from their source."""
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "item":
                yield ast.literal_eval(node.args[0])


def test_the_page_has_a_row_for_every_item():
    items_of_page, _, _ = PAGE.read_text(encoding="utf-8").partition("## Families")
    rows = [line for line in items_of_page.splitlines() if line.startswith("| ")]
    found = [row.split(" | ")[0].removeprefix("| ") for row in rows if not row.startswith("|  | ")]
    assert sorted(found) == sorted(set(items()))
