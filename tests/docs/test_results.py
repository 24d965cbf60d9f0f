"""The numbers on the pages are the recorded ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("model_cards/*/README.md"))]
MEASURED = re.compile(
    r"\d(?:[\d,.]*\d)? ?(?:%|ms\b|s\b|seconds?\b|minutes?\b|hours?\b|MB\b|MiB\b|GiB\b|tokens/s|times\b|nats?\b)"
)
FILLED = re.compile(r"<!-- (?:results|value|tables): .*?<!-- end(?: of tables)? -->|```.*?```", re.DOTALL)
# What looks measured and is not: settings, arithmetic on sizes, sizes of files.
GIVEN = {
    "docs/choosing-a-budget.md": {"5.6 MiB", "0.2 times"},
    "docs/evaluating.md": {"5 %"},
    "docs/quantizing.md": {"4.5GiB"},
    "docs/sharing-on-the-hub.md": {"11 MiB"},
    "docs/training-an-adapter.md": {"47 GiB"},
    "model_cards/gemma-3-270m-lookahead/README.md": {"3.7 MB", "4 minutes"},
    "model_cards/smollm2-135m-instruct-lookahead/README.md": {"4.8 MB", "5 %", "60 %", "8 minutes", "0.2 times"},
    "model_cards/smollm2-135m-instruct-lookahead-later/README.md": {"4.8 MB"},
    "model_cards/smollm2-135m-instruct-w3-g64/README.md": {"101.1 MB"},
    "model_cards/smollm2-135m-instruct-w4-g64/README.md": {"114.6 MB"},
}


def run(*options):
    script = ROOT / "benchmarks" / "pages.py"
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)


def test_the_pages_show_the_results():
    done = run("--check")
    assert not done.returncode, f"run: python benchmarks/pages.py, which changes {done.stdout}{done.stderr}"


def test_a_stale_page_is_found(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import pages
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    text = "Before.\n<!-- results: decode -->\n1,000,000 tokens/s\n<!-- end -->\nAfter."
    filled = pages.rendered(text)
    assert filled != text and filled.startswith("Before.\n<!-- results: decode -->") and filled.endswith("-->\nAfter.")
    assert pages.rendered(filled) == filled


def test_a_number_in_a_sentence_is_written(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import pages
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    text = "It took <!-- value: refresh lookahead, static::step_ms .1f -->1<!-- end --> ms."
    step = pages.load("refresh")["lookahead, static"]["step_ms"]
    assert pages.rendered(text) == text.replace("-->1<", f"-->{step:.1f}<")
    assert pages.value("refresh", "lookahead, static::step_ms", "60*.0f") == f"{60 * step:.0f}"


def test_scripts_that_pages_name_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    pages += [*(ROOT / "model_cards").rglob("*.md"), *(ROOT / "benchmarks").glob("*.py")]
    for page in pages:
        for name in re.findall(r"benchmarks/([\w/]+\.(?:py|sh))", page.read_text(encoding="utf-8")):
            assert (ROOT / "benchmarks" / name).is_file(), f"{page.name} names benchmarks/{name}"


def test_no_number_begins_a_line():
    """A comment at the beginning of a line ends the paragraph."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"^\s*<!-- value", page.read_text(encoding="utf-8"), re.MULTILINE), page.name


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "support.md"], ids=str)
def test_measured_numbers_stand_between_markers(page):
    name = page.relative_to(ROOT).as_posix()
    own = FILLED.sub("", page.read_text(encoding="utf-8"))
    assert set(MEASURED.findall(own)) == GIVEN.get(name, set()), "write it from benchmarks/results, between markers"


def test_a_measured_number_outside_of_markers_is_noticed():
    text = "It took <!-- value: a b .0f -->1<!-- end --> s in 1,024 tokens and 30 layers.\n```sh\n# 5 minutes\n```\n"
    assert MEASURED.findall(FILLED.sub("", text)) == []
    assert MEASURED.findall(FILLED.sub("", text + "Before, 0.25 nats, 3 % and 17 tokens/s.")) == [
        "0.25 nats", "3 %", "17 tokens/s"
    ]  # fmt: skip


def test_the_metadata_of_cards_shows_the_results():
    """The Hub reads these numbers from the head of a card, where no marker can stand."""
    for card in ROOT.glob("model_cards/*-w?-g64/README.md"):
        text = card.read_text(encoding="utf-8")
        head, table = re.findall(r"^ +value: ([\d.]+)$", text, re.MULTILINE), text.split("<!-- results: checkpoint")[1]
        assert head == re.findall(r"\| ([\d.]+) \|$", table.split("<!-- end -->")[0], re.MULTILINE) and len(head) == 6


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") < 130
