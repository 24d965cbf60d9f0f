"""The numbers on the pages are the recorded ones."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEASURED = re.compile(r"\d[\d,.]* ?(?:%|ms\b|MiB\b|GiB\b|tokens/s|times\b|nats\b)")


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


def test_the_readme_has_no_measured_numbers_of_its_own():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    own = re.sub(r"<!-- (?:results|value): .*?<!-- end -->|```.*?```", "", text, flags=re.DOTALL)
    assert MEASURED.findall(own) == []
    assert text.count("\n") < 130
