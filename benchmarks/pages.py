"""Writes the measured numbers into the pages.

    python benchmarks/pages.py           # after new results
    python benchmarks/pages.py --check   # what `make test` asks

A page has places between ``<!-- results: NAME ... -->`` and ``<!-- end -->``: NAME is a table of tables.yaml or a
function of report.py, which is given the words that follow it. A number in a sentence stands between
``<!-- value: FILE PATH FORMAT -->`` and ``<!-- end -->``, not at the beginning of a line. PATH and FORMAT are those of
tables.py.
"""

import argparse
import re
import sys
from pathlib import Path

import report
from tables import DECLARATIONS, declared, load, look_up, shown

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md"]
for folder in ("docs/*.md", "model_cards/*/README.md", "benchmarks/results/*.md"):
    PAGES += sorted(ROOT.glob(folder))
PLACE = re.compile(r"(<!-- results: (\w+)((?: \w+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- value: (\w+) ([^<>]+?) (\S+) -->).*?(<!-- end -->)", re.DOTALL)


def block(name: str, *arguments: str) -> str:
    """A table, or several under headings.

    Raises:
        AttributeError: no table and no function has this name.
    """
    return declared(name) if name in DECLARATIONS and not arguments else getattr(report, name)(*arguments)


def value(file: str, path: str, form: str) -> str:
    """A number of a results file, or a line of text.

    Raises:
        LookupError: the file has nothing there.
    """
    return shown(look_up(load(file), path), form, load(file))


def rendered(text: str) -> str:
    """A page with its places filled."""
    text = PLACE.sub(lambda place: f"{place[1]}\n{block(place[2], *place[3].split())}\n\n{place[4]}", text)
    return VALUE.sub(lambda place: f"{place[1]}{value(*place.groups()[1:4])}{place[5]}", text)


def fill(check: bool = False) -> list[Path]:
    """The pages that differed from the results. They are written anew, but for a check."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    stale = {page: new for page, text in texts.items() if (new := rendered(text)) != text}
    for page, text in stale.items() if not check else ():
        page.write_text(text, encoding="utf-8")
    return list(stale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page and the results differ")
    check = parser.parse_args().check
    stale = fill(check)
    print("\n".join(str(page.relative_to(ROOT)) for page in stale) or "all pages show the results")
    sys.exit(bool(stale) and check)


if __name__ == "__main__":
    main()
