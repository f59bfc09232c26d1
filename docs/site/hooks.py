"""Hooks of the site: which files are pages, and how their text becomes HTML.

The site has the folders of the repository, so that every relative link between files of the
repository is also a link of the site, which MkDocs checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from api import write_api_pages
from commonmark import to_python_markdown
from formulas import replace_formulas
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from notebook_pages import NotebookPage

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/**/*.md",
    "plugins/*/README.md",
    "recipes/**/README.md",
    "examples/*/README.md",
)
"""Files of the repository that are pages of the site."""

LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")
"""Relative link to a file: its path."""

FETCHED = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)
"""Element for which a browser reads another server."""


def find_pages() -> dict[str, Path]:
    """Return the pages of the repository by their path from the root."""
    found = (path for pattern in PAGES for path in sorted(ROOT.glob(pattern)))
    return {path.relative_to(ROOT).as_posix(): path for path in found}


def find_linked_files(page: Path) -> Iterator[str]:
    """Return the files to which a page links, for example pictures and scripts."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve()
        if target.is_file() and target.suffix not in (".md", ".ipynb"):
            yield target.relative_to(ROOT).as_posix()


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Replace the files of docs/ by the files of the site."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    pages = find_pages()
    linked = {name for page in pages.values() for name in find_linked_files(page)}
    for name in [*pages, *sorted(linked), "docs/site/extra.css"]:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = NotebookPage(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page.markdown))
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
        for name, content in page.pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for name, text in write_api_pages(ROOT / "ddiff").items():
        files.append(File.generated(config, f"api/{name}", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write the text of a page in the dialect of the site, with links to the pages of notebooks."""
    # A link without a folder is that of a notebook page to its own file.
    linked = re.sub(r"(\]\(\S*notebooks/\w+)\.ipynb\)", r"\1.md)", markdown)
    return to_python_markdown(linked)


def on_page_content(html: str, **_: Any) -> str:
    return replace_formulas(html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse pages that need the network, because the site is read without it."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: {found[0]} is read from the network.")
    return output
