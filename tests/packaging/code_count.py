"""Counting code: lines that are neither blank nor comment nor docstring."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def classes(path: Path) -> dict[str, int]:
    """Code lines of every class at the top of a file, its own line and decorators included."""
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), code_lines(source)
    found = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        node.name: sum(_first(node) <= line <= (node.end_lineno or 0) for line in lines)
        for node in found
    }


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    spoken = {
        line
        for token in tokens
        if token.type not in SILENT
        for line in range(token.start[0], token.end[0] + 1)
    }
    return spoken - {
        line
        for node in docstrings(ast.parse(source))
        for line in range(node.lineno, _end(node) + 1)
    }


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Strings that stand alone: of a module, a class, a function, or below a field."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.value


def names_and_strings(source: str) -> Iterator[str]:
    """Every identifier, argument name, imported module and string of a file; no comment, no docstring."""
    tree = ast.parse(source)
    silent = set(map(id, docstrings(tree)))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in silent
        ):
            yield node.value
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from (token.string for token in tokens if token.type == tokenize.NAME)


def _first(node: ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _end(node: ast.Constant) -> int:
    return node.end_lineno or node.lineno
