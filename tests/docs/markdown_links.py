"""Read headings and links of Markdown files as GitHub shows them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "plugins", "recipes", "examples")


def find_markdown_files() -> list[Path]:
    """Return the pages of the repository, without the templates of plugins."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")]
    return sorted([*ROOT.glob("*.md"), *found])


def parse(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def make_anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def read_anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page. A repeated heading gets a number."""
    repeats: Counter[str] = Counter()
    anchors = set()
    for token, text in pairwise(parse(path)):
        if token.type == "heading_open":
            anchor = make_anchor("".join(part.content for part in text.children or ()))
            anchors.add(f"{anchor}-{repeats[anchor]}" if repeats[anchor] else anchor)
            repeats[anchor] += 1
    return anchors


def read_links(path: Path) -> Iterator[tuple[Path, str]]:
    """Return file and anchor of every link to a file of the repository, pictures included."""
    for token in parse(path):
        for part in token.children or ():
            target = str(part.attrs.get("href") or part.attrs.get("src") or "")
            if target and "://" not in target:
                name, _, anchor = target.partition("#")
                yield ((path.parent / name).resolve() if name else path), anchor
