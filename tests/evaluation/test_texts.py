"""benchmarks/texts.py: documents from packages."""

import gzip
import importlib.util
from pathlib import Path

import pytest


def prose(name):
    return f"The survey of northern islands took the whole of a long and rainy summer, as letter {name} tells. " * 8


@pytest.fixture(scope="module")
def texts():
    path = Path(__file__).parents[2] / "benchmarks" / "texts.py"
    spec = importlib.util.spec_from_file_location("texts", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def page(body, following=None):
    link = f'<link rel="next" href="{following}">' if following else ""
    return f"<html lang='en'><head><title>T</title>{link}</head><body>{body}</body></html>"


def test_a_page_keeps_its_text_and_code_and_loses_what_is_around(texts):
    html = page(
        "<div class='navheader'><div>Prev</div><a>Next</a></div><script>var x;</script>"
        "<h1>Heading<a class='headerlink'>¶</a></h1>"
        "<p>One &amp; two\n   three&nbsp;four</p><pre>if x:\n    y()\n</pre>"
        "<ul><li><p>item</p></li></ul>"
        "<table><tr><td>a</td><td>b</td></tr></table><p>last</p><div class='navfooter'>Up</div>"
    )
    assert texts.Page(html).text == "Heading\n\nOne & two three four\n\nif x:\n    y()\n\n- item\n\na | b\n\nlast"


def test_text_outside_the_main_part_is_navigation(texts):
    html = page("<div>menu</div><div role='main'><div><p>inside</p></div>still</div><p>after</p>")
    assert texts.Page(html).text == "inside\n\nstill"


def test_pages_are_joined_in_reading_order_and_repeated_or_foreign_ones_dropped(texts, tmp_path):
    book = tmp_path / "usr/share/doc/book"
    for name, number, following in (("z", 1, "a.html"), ("a", 2, "m.html"), ("m", 3, None)):
        paragraphs = "".join(f"<p>{prose(f'{number}.{index}')}</p>" for index in range(3))
        write(book / f"{name}.html", page(paragraphs, following))
    write(book / "x-copy.html", page("".join(f"<p>{prose(f'2.{index}')}</p>" for index in range(3))))
    write(book / "genindex.html", page(f"<p>{prose('index')}</p>"))
    write(book / "de-DE/a.html", page(f"<p>{prose('deutsch')}</p>"))
    write(book / "table.html", page("<table>" + f"<tr><td>{prose('t')}</td><td>1</td></tr>" * 9 + "</table>"))
    documents = list(texts.documents_of(tmp_path, "book"))
    assert [document["document"] for document in documents] == ["doc/book/z.html"]
    text = documents[0]["text"]
    assert text.index("letter 1.0") < text.index("letter 2.0") < text.index("letter 3.0")
    for absent in ("index", "deutsch", "letter t"):
        assert f"letter {absent}" not in text


def test_long_books_are_parted_at_pages(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "DOCUMENT_CHARACTERS", 5_000)
    for number in range(6):
        body = "".join(f"<p>{prose(f'{number}.{index}')}</p>" for index in range(3))
        write(tmp_path / f"p{number}.html", page(body, f"p{number + 1}.html"))
    documents = list(texts.documents_of(tmp_path, "book"))
    assert [document["document"] for document in documents] == ["p0.html", "p2.html", "p4.html"]
    assert all(len(document["text"]) <= 5_000 for document in documents)


def test_a_package_without_pages_gives_its_text_files(texts, tmp_path):
    write(tmp_path / "usr/share/games/fortunes/wisdom", f"{prose(1)}\n%\n{prose(2)}\n%\n{prose(3)}")
    (tmp_path / "usr/share/games/fortunes/wisdom.dat").write_bytes(b"\0\1" * 3000)
    (tmp_path / "usr/share/games/fortunes/more.gz").write_bytes(gzip.compress(prose(9).encode() * 3))
    documents = {document["document"]: document["text"] for document in texts.documents_of(tmp_path, "fortunes")}
    assert set(documents) == {"games/fortunes/wisdom", "games/fortunes/more.gz"}
    assert "%" not in documents["games/fortunes/wisdom"]


def test_translations_and_listings_are_told_from_english_prose(texts):
    assert texts.is_english(prose("a"))
    assert not texts.is_english("Die Vermessung der Inseln im Norden dauerte den ganzen langen Sommer. " * 9)
    assert not texts.is_english("int main(void) { return run(argument, count); } static char buffer[12]; " * 9)


def test_a_package_can_be_bounded(texts):
    documents = [{"document": str(index), "text": "x" * size} for index, size in enumerate((500, 300, 300, 200))]
    some = texts.some_of(documents, 600)
    assert 0 < sum(len(document["text"]) for document in some) <= 600
    assert some == texts.some_of(documents, 600)
    assert sorted(texts.some_of(documents, 1300), key=lambda d: d["document"]) == documents
