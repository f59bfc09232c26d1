"""Rewrite Markdown of the repository for Python-Markdown, the parser of the site.

The pages of the repository follow CommonMark. Python-Markdown differs in two points: the contents
of a list item must be indented by four columns for each level, and a list or a table after a
paragraph needs a blank line before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token

INDENT = 4
STARTERS = {"bullet_list_open", "ordered_list_open", "table_open"}


@dataclass(frozen=True)
class Item:
    """List item: its lines [start, stop), and the column at which its contents begin."""

    start: int
    stop: int
    content: int


def find_items(tokens: list[Token], lines: list[str]) -> list[Item]:
    """Return the list items of a page, outer items before the items that they contain."""
    items = []
    for token in tokens:
        if token.type == "list_item_open" and token.map is not None:
            start, stop = token.map
            marker = re.match(r"\s*(?:[-*+]|\d+[.)])\s+", lines[start])
            content = marker.end() if marker else INDENT
            items.append(Item(start, stop, content))
    return items


def find_joined_blocks(tokens: list[Token]) -> set[int]:
    """Return the first lines of lists and tables that follow a paragraph without a blank line."""
    ends = {token.map[1] for token in tokens if token.type == "paragraph_open" and token.map}
    starts = {token.map[0] for token in tokens if token.type in STARTERS and token.map}
    return starts & ends


def indent_line(line: str, number: int, items: list[Item]) -> str:
    """Return line `number` with four columns for each list item around its text."""
    around = [item for item in items if item.start <= number < item.stop]
    if not around or not line.strip():
        return line
    width = len(line) - len(line.lstrip())
    inner = around[-1]
    if inner.start == number:
        return " " * INDENT * (len(around) - 1) + line.lstrip()
    # A line of a paragraph may have a smaller indentation than the contents of its item.
    rest = max(0, width - inner.content)
    return " " * (INDENT * len(around) + rest) + line.lstrip()


def to_python_markdown(text: str) -> str:
    """Return the text of a CommonMark page in the form that Python-Markdown reads."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    lines = text.split("\n")
    items = find_items(tokens, lines)
    joined = find_joined_blocks(tokens)
    result = []
    for number, line in enumerate(lines):
        if number in joined:
            result.append("")
        result.append(indent_line(line, number, items))
    return "\n".join(result)
