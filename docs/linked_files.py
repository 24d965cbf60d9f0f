"""A hook of mkdocs: files of the repository that a page links to become files of the site.

On GitHub `../examples/chat.py` leads out of `docs/`. The site has nothing above its first folder, so the file is
copied to `examples/chat.py` of the site, and links are rewritten.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[#)])")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds what pages link to, and what these link to. mkdocs itself warns of links to nothing."""
    root = Path(config.docs_dir).parent
    pages = list(files.documentation_pages())
    for page in pages:  # grows
        for link in LINK.findall(page.content_string):
            path = target(page.src_uri, link, config)
            if files.get_file_from_path(path) is None and (root / path).is_file():
                file = File.generated(config, path, abs_src_path=str(root / path))
                file.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(file)
                if file.is_documentation_page():
                    pages.append(file)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page."""

    def rewritten(link: re.Match[str]) -> str:
        path = target(page.file.src_uri, link[0], config)
        if files.get_file_from_path(path) is None:
            return link[0]
        return posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewritten, markdown)


def target(page: str, link: str, config: MkDocsConfig) -> str:
    """Where the site has what a page links to.

    Args:
        page: the path of the page in the site.
        link: as it is written in the repository.
        config: of mkdocs.
    """
    folder = posixpath.dirname(page)
    if Path(config.docs_dir, page).is_file():
        folder = posixpath.join("docs", folder)
    return posixpath.normpath(posixpath.join(folder, link)).removeprefix("docs/")
