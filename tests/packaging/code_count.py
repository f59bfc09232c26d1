"""Style measurements of source code: tokens per line, widths, comments, function lengths, words.

Run as a script, this module prints the measurements of `ddiff` and `plugins`. With the name of a
measurement, the script prints the lines that count:

    python tests/packaging/code_count.py
    python tests/packaging/code_count.py waiting    # lines with a word of WORDS
    python tests/packaging/code_count.py probes     # getattr and hasattr calls; or: wide, long
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
WIDEST = 100  # columns
LONG_FUNCTION = 80  # lines

SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
# From Python 3.12 on, an f-string consists of several tokens. An f-string is counted as one token,
# so that the counts do not depend on the version.
FSTRING_START = getattr(tokenize, "FSTRING_START", None)
FSTRING_END = getattr(tokenize, "FSTRING_END", None)

WORDS = {
    "What ...": r"\A(What|Who|Whose|How|Whether|Whatever)\b",
    "is no": r"(?<!there )\bis no\b",
    "trunk": r"\btrunks?\b",
    "the law of": r"\bthe laws? of\b",
    "waiting": r"\bwaiting\b",
    "told": r"\btold\b",
    "beside": r"\bbeside\b",
    "anew": r"\banew\b",
    "whom": r"\bwhom\b",
    "nobody": r"\b(nobody|everybody)\b",
    "mend": r"\bmend(ed|s|ing)?\b",
    "go on": r"\bgo(es|ing)? on\b",
    "of its own": r"\bof (its|their) own\b",
    "alone": r"\balone\b",
}
"""Patterns of discouraged words. "What ..." is matched only at the beginning of a docstring."""


# ---------------------------------------------------------------------- tokens and lines of code


def code_tokens(source: str) -> list[tokenize.TokenInfo]:
    """List the tokens of a file without comments, docstrings and whitespace."""
    docs = _docstring_lines(source)
    kept = []
    depth = 0  # nesting of f-strings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if FSTRING_END is not None and token.type == FSTRING_END:
            depth -= 1
            continue
        if token.type not in SILENT and token.start[0] not in docs and depth == 0:
            kept.append(token)
        if FSTRING_START is not None and token.type == FSTRING_START:
            depth += 1
    return kept


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines that contain code."""
    lines: set[int] = set()
    docs = _docstring_lines(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docs


def class_size(path: Path, name: str) -> tuple[int, int]:
    """Return (code tokens, methods) of the top-level class `name`, including decorators."""
    source = path.read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            break
    else:
        raise LookupError(f"{path} has no class {name}")
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    last = node.end_lineno or first
    tokens = [token for token in code_tokens(source) if first <= token.start[0] <= last]
    methods = [member for member in node.body if isinstance(member, ast.FunctionDef)]
    return len(tokens), len(methods)


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Iterate over the string nodes of docstrings of modules, classes, functions and fields."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.value


def names_and_strings(source: str) -> Iterator[str]:
    """Iterate over the identifiers and strings of a file, without docstrings."""
    yield from (text for _, text in _messages(ast.parse(source)))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from (token.string for token in tokens if token.type == tokenize.NAME)


# ---------------------------------------------------------------------- measurements


@dataclass
class Style:
    """Sums of style measurements over files.

    `functions` contains (length in lines, location) of each function.
    """

    tokens: int = 0
    code_lines: int = 0
    lines: int = 0
    comments: int = 0
    wide: list[str] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    functions: list[tuple[int, str]] = field(default_factory=list)

    @property
    def tokens_per_line(self) -> float:
        return self.tokens / self.code_lines

    @property
    def wide_share(self) -> float:
        """Return the percentage of lines with more than WIDEST columns."""
        return 100 * len(self.wide) / self.lines

    @property
    def comments_per_thousand(self) -> float:
        """Return the number of comments per 1000 lines of code."""
        return 1000 * self.comments / self.code_lines

    @property
    def ninetieth_length(self) -> int:
        """Return the 90th percentile of the function lengths, in lines."""
        lengths = sorted(length for length, _ in self.functions)
        return lengths[int(0.9 * len(lengths))]

    @property
    def longest_function(self) -> int:
        return max(length for length, _ in self.functions)


def measure_style(paths: Iterable[Path]) -> Style:
    """Measure the style of Python files."""
    style = Style()
    for path in paths:
        source = path.read_text(encoding="utf-8")
        style.tokens += len(code_tokens(source))
        style.code_lines += len(code_lines(source))
        for number, line in enumerate(source.splitlines(), start=1):
            style.lines += 1
            if len(line) > WIDEST:
                style.wide.append(f"{_relative(path)}:{number}")
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            style.comments += token.type == tokenize.COMMENT
        _measure_functions(path, ast.parse(source), style)
    return style


def _measure_functions(path: Path, tree: ast.AST, style: Style) -> None:
    for node in ast.walk(tree):
        place = f"{_relative(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            style.functions.append((length, f"{place} {node.name}"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            is_probe = node.func.id in ("getattr", "hasattr")
            style.probes.extend([place] * is_probe)


# ---------------------------------------------------------------------- words


def find_words(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Find the lines that contain each of WORDS, in prose of Python files and Markdown pages."""
    found: dict[str, list[str]] = {name: [] for name in WORDS}
    for path in paths:
        source = path.read_text(encoding="utf-8")
        prose = _python_prose(source) if path.suffix == ".py" else _page_prose(source)
        for line, text, is_docstring in prose:
            for name, pattern in WORDS.items():
                # "law" is a term of ddiff.testing
                if name == "the law of" and "testing" in path.parts:
                    continue
                if name == "What ..." and not is_docstring:
                    continue
                flags = 0 if name == "What ..." else re.IGNORECASE
                for match in re.finditer(pattern, text, flags):
                    number = line + text.count("\n", 0, match.start())
                    found[name].append(f"{_relative(path)}:{number}")
    return found


def _python_prose(source: str) -> Iterator[tuple[int, str, bool]]:
    """Iterate over (line, text, whether a docstring) of docstrings, strings and comments."""
    tree = ast.parse(source)
    for node in docstrings(tree):
        yield node.lineno, str(node.value), True
    for node, text in _messages(tree):
        yield node.lineno, text, False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string, False


def _page_prose(source: str) -> Iterator[tuple[int, str, bool]]:
    yield 1, source, False


def _messages(tree: ast.AST) -> Iterator[tuple[ast.Constant, str]]:
    """Iterate over strings that are not docstrings, including literal parts of f-strings."""
    docs = set(map(id, docstrings(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node, node.value


# ---------------------------------------------------------------------- files


def python_files() -> list[Path]:
    """List the Python files of the engine and of the first-party plugins."""
    files = [path for room in ("ddiff", "plugins") for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in files if "__pycache__" not in path.parts]


def pages() -> list[Path]:
    """List README.md, CONTRIBUTING.md, the pages below docs, and the READMEs of plugins."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [*found, *sorted((ROOT / "plugins").glob("*/README.md"))]


def _docstring_lines(source: str) -> set[int]:
    lines: set[int] = set()
    for node in docstrings(ast.parse(source)):
        lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def main(arguments: list[str]) -> None:
    """Print all measurements, or the lines that count in one measurement."""
    style = measure_style(python_files())
    words = find_words([*python_files(), *pages()])
    long_functions = [
        f"{name}: {length} lines"
        for length, name in sorted(style.functions, reverse=True)
        if length > min(LONG_FUNCTION, style.ninetieth_length)
    ]
    places = {**words, "wide": style.wide, "probes": style.probes, "long": long_functions}
    if arguments:
        print(*places[" ".join(arguments)], sep="\n")
        return
    print(f"tokens per code line      {style.tokens_per_line:.2f}")
    print(f"wide lines, %             {style.wide_share:.2f}")
    print(f"comments per 1000         {style.comments_per_thousand:.1f}")
    print(f"function length, p90      {style.ninetieth_length}")
    print(f"function length, largest  {style.longest_function}")
    print(f"getattr and hasattr       {len(style.probes)}")
    for name, found in words.items():
        print(f"{name:25} {len(found)}")


if __name__ == "__main__":
    main(sys.argv[1:])
