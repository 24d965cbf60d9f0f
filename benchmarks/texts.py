"""Plain-text documents from Debian documentation packages: the corpus of the shipped adapter and of the benchmarks.

    apt-get download debian-handbook fortunes
    python benchmarks/texts.py debian-handbook_*.deb fortunes_*.deb --out test.jsonl.gz

Takes .deb files or directories into which packages were unpacked. Each line of the result is
``{"source": package, "document": name, "text": ...}``. ``--characters`` with ``--sample`` bounds what one package
may give, so that none outweighs the others, and ``--english`` leaves out translations and listings. A package's HTML
pages are read in their own order (``rel="next"``) and small neighbors are joined; a package without HTML gives its
text files.
"""

import argparse
import gzip
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path, PurePosixPath

DOCUMENT_CHARACTERS = 60_000  # small pages of one book are joined up to here
SHORTEST_PAGE = 300
SHORTEST_DOCUMENT = 2_000

NOT_PROSE = re.compile(
    r"(genindex.*|py-modindex|search|contents|bookindex|biblio|a?r?links|changelog.*|copyright|readme.*|notes|"
    r"translations|supplementary|contact|book|pdf|new)(\.|$)",
    re.IGNORECASE,
)
NOT_DOCUMENTATION = {"lintian", "doc-base", "man", "info", "_sources", "_static", "_images", "_downloads"}
LOCALE = re.compile(r"[a-z]{2}-([A-Z][a-z]{3}-)?[A-Z]{2}")


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FREQUENT_WORDS = words("the of to and is in")

BLOCKS = words(
    "p div section article table tr ul ol dl li dt dd h1 h2 h3 h4 h5 h6 blockquote pre br hr figure figcaption "
    "header footer main body caption"
)
SKIPPED_TAGS = {"script", "style", "nav", "noscript", "template", "svg", "button", "form"}
SKIPPED_CLASSES = words(
    "navheader navfooter toc list-of-examples list-of-tables list-of-figures related sphinxsidebar headerlink footer "
    "docnav book-navigation indexterm breadcrumbs contents topic-contents footnotes"
)
SKIPPED_IDS = {"banner", "title", "breadcrumbs"}


class Page(HTMLParser):
    """The readable text of one HTML page, as paragraphs, and the address of the page that follows it."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self.next: str | None = None
        self.language = "en"
        self.table_characters = 0
        self.code_characters = 0
        self._pieces: list[str] = []
        self._skipping: tuple[str, int] | None = None  # tag that opened the skipped part, how often it is open
        self._preformatted = 0
        self._row_cells = 0
        self._in_head = False
        # Sphinx and others mark the text proper: all around it is navigation.
        self._outside_main = re.search(r"""role=["']main["']""", html) is not None
        self._main_depth = 0
        self.feed(html)
        self.close()
        self._end_paragraph()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        classes = set(attributes.get("class", "").lower().split())
        if tag == "html":
            self.language = attributes.get("lang", "en")
        if (tag == "link" and attributes.get("rel", "").lower() == "next") or "page-next" in classes:
            self.next = attributes.get("href")
        if tag == "head":
            self._in_head = True
        if self._skipping:
            if tag == self._skipping[0]:
                self._skipping = (tag, self._skipping[1] + 1)
            return
        if tag in SKIPPED_TAGS or classes & SKIPPED_CLASSES or attributes.get("id") in SKIPPED_IDS:
            self._skipping = (tag, 1)
            return
        if tag == "div" and (attributes.get("role") == "main" or self._main_depth):
            self._main_depth += 1
        if tag in ("td", "th"):
            self._row_cells += 1
            if self._row_cells > 1:
                self._pieces.append(" | ")
        if tag in BLOCKS and not (tag in ("p", "div") and self._row_cells):
            self._end_paragraph()
        if tag == "pre":
            self._preformatted += 1
        if tag == "li":
            self._pieces.append("- ")

    def handle_endtag(self, tag: str) -> None:
        if tag == "head":
            self._in_head = False
        if self._skipping:
            if tag == self._skipping[0]:
                count = self._skipping[1] - 1
                self._skipping = (tag, count) if count else None
            return
        if tag in BLOCKS and not (tag in ("p", "div") and self._row_cells):
            self._end_paragraph()
        if tag == "pre":
            self._preformatted = max(0, self._preformatted - 1)
        if tag == "div" and self._main_depth:
            self._main_depth -= 1

    def handle_data(self, data: str) -> None:
        if not (self._skipping or self._in_head or (self._outside_main and not self._main_depth)):
            self._pieces.append(data)

    def _end_paragraph(self) -> None:
        text = "".join(self._pieces).replace("\xa0", " ").replace("\xad", "").replace("¶", "")
        if self._preformatted:
            text = "\n".join(line.rstrip() for line in text.expandtabs(4).strip("\n").split("\n"))
            text = re.sub(r"\n{3,}", "\n\n", text)
            self.code_characters += len(text)
        else:
            text = re.sub(r"\s+", " ", text).strip().removeprefix("| ")  # a row whose first cell is a picture
        if self._row_cells > 1:
            self.table_characters += len(text)
        if re.search(r"\w", text):
            self.paragraphs.append(text)
            self._pieces = []
        elif text != "-":  # an item's dash waits for the paragraph inside the item
            self._pieces = []
        else:
            self._pieces = ["- "]
        self._row_cells = 0

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)

    @property
    def is_prose(self) -> bool:
        return max(self.table_characters, self.code_characters) < 0.8 * len(self.text) and is_prose(self.text)


def is_english(text: str) -> bool:
    """Whether prose is in English: some packages hold translations without saying so, or source code."""
    found = re.findall(r"[a-z]+", text.lower())
    return sum(word in FREQUENT_WORDS for word in found) > 0.12 * len(found)


def is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in text)
    words = [len(paragraph.split()) for paragraph in text.split("\n\n")]
    return letters > 0.7 * len(text) and sum(count for count in words if count >= 12) > 0.4 * sum(words)


def read_text(path: Path) -> str | None:
    """The file's characters, or None for a binary file."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def files_of(root: Path) -> list[Path]:
    """The package's files that can be English documentation, sorted by name."""
    found = []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        locales = [part for part in parts if LOCALE.fullmatch(part)]
        if path.is_symlink() or not path.is_file() or NOT_PROSE.match(path.name):
            continue
        if NOT_DOCUMENTATION.isdisjoint(parts) and all(locale.startswith("en-") for locale in locales):
            found.append(path)
    return found


def in_reading_order(pages: dict[str, Page]) -> Iterator[list[str]]:
    """Chains of page names, each following its pages' links to the next one."""
    following: dict[str, str] = {}
    for name, page in pages.items():
        if page.next and "://" not in page.next:
            target = (PurePosixPath(name).parent / page.next.split("#")[0]).as_posix()
            parts: list[str] = []
            for part in target.split("/"):
                if part == ".." and parts:
                    parts.pop()
                elif part != ".":
                    parts.append(part)
            following[name] = "/".join(parts)
    starts = [name for name in pages if name not in set(following.values())]
    seen: set[str] = set()
    for start in [*starts, *pages]:
        chain: list[str] = []
        name: str | None = start
        while name in pages and name not in seen:
            seen.add(name)
            chain.append(name)
            name = following.get(name)
        if chain:
            yield chain


def html_documents(root: Path, files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    pages = {}
    for path in files:
        html = read_text(path)
        if html is not None:
            pages[path.relative_to(root).as_posix()] = Page(html)
    for chain in in_reading_order(pages):
        name, texts = "", []
        for page_name in chain:
            page = pages[page_name]
            if len(page.text) < SHORTEST_PAGE or not page.language.startswith("en") or not page.is_prose:
                continue
            length = sum(map(len, texts)) + len(page.text)
            other_folder = PurePosixPath(page_name).parent != PurePosixPath(name).parent
            if texts and (length > DOCUMENT_CHARACTERS or other_folder):
                yield name, "\n\n".join(texts)
                texts = []
            if not texts:
                name = page_name
            texts.append(page.text)
        if texts:
            yield name, "\n\n".join(texts)


def text_documents(root: Path, files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for path in files:
        text = read_text(path)
        if text is None:
            continue
        text = re.sub(r"^%$", "", text.expandtabs(4), flags=re.MULTILINE)  # what parts one fortune from the next
        text = re.sub(r"[ \t]+$", "", re.sub(r".\x08", "", text), flags=re.MULTILINE)
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        if is_prose(text):
            yield path.relative_to(root).as_posix(), text


def documents_of(root: Path, source: str) -> Iterator[dict[str, str]]:
    """The documents of one unpacked package, without those whose paragraphs are mostly in longer ones."""
    files = files_of(root)
    pages = [path for path in files if path.suffix in (".html", ".xhtml", ".htm")]
    found = list(html_documents(root, pages) if pages else text_documents(root, files))
    seen: set[str] = set()
    kept = set()
    for name, text in sorted(found, key=lambda item: -len(item[1])):
        paragraphs = [paragraph for paragraph in text.split("\n\n") if len(paragraph) >= 80]
        known = sum(paragraph in seen for paragraph in paragraphs)
        seen.update(paragraphs)
        if len(text) >= SHORTEST_DOCUMENT and 2 * known <= len(paragraphs):
            kept.add(name)
    for name, text in found:
        if name in kept:
            yield {"source": source, "document": name.split("usr/share/")[-1], "text": text}


def some_of(documents: list[dict[str, str]], characters: int) -> list[dict[str, str]]:
    """Random whole documents, always the same, of at most so many characters in all."""
    kept = []
    for document in random.Random(0).sample(documents, len(documents)):
        if len(document["text"]) <= characters:
            characters -= len(document["text"])
            kept.append(document)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, help=".deb files or directories of unpacked packages")
    parser.add_argument("--characters", type=int, help="of each package, only the first documents up to this length")
    parser.add_argument("--out", required=True, type=Path, help="where to write: .jsonl or .jsonl.gz")
    parser.add_argument("--english", action="store_true", help="leave out what does not read like English prose")
    parser.add_argument("--sample", action="store_true", help="with --characters: random documents, not the first")
    arguments = parser.parse_args()
    open_output = gzip.open if arguments.out.suffix == ".gz" else open
    total = 0
    with open_output(arguments.out, "wt", encoding="utf-8") as output:
        for package in arguments.packages:
            source = package.name.split("_")[0] if package.is_file() else package.name.removeprefix("x_")
            with tempfile.TemporaryDirectory() as directory:
                root = package
                if package.is_file():
                    root = Path(directory)
                    subprocess.run(["dpkg", "-x", str(package), directory], check=True)
                documents = list(documents_of(root, source))
            if arguments.english:
                documents = [document for document in documents if is_english(document["text"])]
            if arguments.characters is not None and arguments.sample:
                documents = some_of(documents, arguments.characters)
            elif arguments.characters is not None:
                lengths = accumulate(len(document["text"]) for document in documents)
                documents = [d for d, end in zip(documents, lengths, strict=True) if end <= arguments.characters]
            for document in documents:
                output.write(json.dumps(document, ensure_ascii=False) + "\n")
            characters = sum(len(document["text"]) for document in documents)
            total += characters
            print(f"{source}: {len(documents)} documents, {characters:,} characters")
    print(f"{arguments.out}: {total:,} characters")


if __name__ == "__main__":
    main()
