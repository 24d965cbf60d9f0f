"""The messages that the documentation quotes are those of the package."""

import ast
import re
from pathlib import Path

import pytest

from lkq_hf.formats import PEFT_TYPE

ROOT = Path(__file__).parents[2]
GAP = "\0"


def texts() -> list[str]:
    """The text of every error that the package raises, with GAP in the place of what is filled in."""
    found = []
    for path in sorted((ROOT / "lkq_hf").rglob("*.py")):
        for error in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(error, ast.Raise):
                found += [literal(node) for node in ast.walk(error) if isinstance(node, ast.JoinedStr | ast.Constant)]
    return found


def literal(node: ast.JoinedStr | ast.Constant) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(
        str(part.value)
        if isinstance(part, ast.Constant)
        else PEFT_TYPE
        if isinstance(part, ast.FormattedValue) and ast.unparse(part.value) == "PEFT_TYPE"
        else GAP
        for part in node.values
    )


def quoted(page: str) -> list[str]:
    """The messages in a page's tables: the code in the first column of those with the title `message`."""
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    return [message for table in tables for row in table.splitlines() for message in codes(row.split(" | ")[0])]


def codes(cell: str) -> list[str]:
    return [double or single for double, single in re.findall(r"``\s?(.+?)\s?``|`([^`]+)`", cell)]


TEXTS = texts()
MESSAGES = [(page, message) for page in ("troubleshooting.md", "sharing-on-the-hub.md") for message in quoted(page)]


def is_told(message: str) -> bool:
    """Whether one text of the package holds the pieces between the `…` of a message, in their order."""
    pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip()]
    return any(re.search(".*".join(pieces), text, re.DOTALL) for text in TEXTS)


@pytest.mark.parametrize(("page", "message"), MESSAGES)
def test_the_package_says_so(page: str, message: str) -> None:
    assert is_told(message)


def test_the_page_is_short_and_not_empty() -> None:
    messages = [message for page, message in MESSAGES if page == "troubleshooting.md"]
    rows = re.findall(r"^\| .*`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert 15 < len(messages) < len(rows) <= 25


def test_what_the_package_does_not_say_is_found() -> None:
    assert not is_told("there is no such message … anywhere")
    assert not is_told("in the wrong order: … the batch is padded")
