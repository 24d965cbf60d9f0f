"""The documentation as a site: it builds, and its pages name all that is public."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lkq_hf

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
API = {
    name: page
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}
"""Names on the pages of the API reference, with the page of each."""

PUBLIC = (
    "",
    "adapter",
    "cache",
    "evaluation.tasks",
    "hub",
    "inspection",
    "quantization",
    "scoring",
    "training",
)


def found(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_page_is_in_the_navigation() -> None:
    navigation = set(re.findall(r"^ +- ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert navigation == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_all_that_is_public_has_an_entry() -> None:
    entries = {name.rpartition(".")[2] for name in API}
    for package in PUBLIC:
        module = importlib.import_module(f"lkq_hf.{package}" if package else "lkq_hf")
        assert {name for name in module.__all__ if name != "__version__"} <= entries, module.__name__


@pytest.mark.parametrize("name", API)
def test_an_entry_is_explained(name: str) -> None:
    thing = found(name)
    if isinstance(thing, dict | str):
        return  # a constant
    assert (thing.__doc__ or "").strip()
    short = name.rpartition(".")[2]
    assert f"# `{short}`\n\n::: {name}\n" in API[name].read_text(encoding="utf-8") + "\n"
    assert f"[`{short}`]({API[name].name}#{short.lower()})" in (DOCS / "api" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", API)
def test_examples_of_docstrings_fit_the_signatures(name: str) -> None:
    from test_snippets import check_names

    doc = getattr(found(name), "__doc__", None) or ""
    lines = [line.strip()[4:] for line in doc.splitlines() if line.strip().startswith((">>> ", "... "))]
    check_names(f"from lkq_hf import {', '.join(lkq_hf.__all__)}\n" + "\n".join(lines))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    page = (tmp_path / "api" / "cache.html").read_text(encoding="utf-8")
    assert "A KV cache that holds a budget of entries" in page, "no docstring was rendered"
    assert (tmp_path / "examples" / "chat.py").read_bytes() == (ROOT / "examples" / "chat.py").read_bytes()
    for html in tmp_path.rglob("*.html"):
        assert not re.search(r":[a-z]+:<code>", html.read_text(encoding="utf-8")), f"a role of reST in {html.name}"


def test_the_hook_maps_links_of_both_places() -> None:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("linked_files", DOCS / "linked_files.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    config = type("Config", (), {"docs_dir": str(DOCS)})
    assert hook.target("quantizing.md", "../examples/chat.py", config) == "examples/chat.py"
    assert hook.target("api/hub.md", "../sharing-on-the-hub.md", config) == "sharing-on-the-hub.md"
    assert hook.target("examples/accelerate/README.md", "../../docs/scaling.md", config) == "scaling.md"


def test_every_drawing_is_whole() -> None:
    from xml.etree import ElementTree

    drawings = sorted((DOCS / "images").glob("*.svg"))
    assert len(drawings) == 3
    text = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
    for drawing in drawings:
        root = ElementTree.parse(drawing).getroot()
        assert root.find("{http://www.w3.org/2000/svg}title").text
        assert f"images/{drawing.name}" in text
