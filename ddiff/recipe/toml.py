"""Read TOML text with the line number of each key, and write TOML text.

`tomllib` returns values without line numbers. `key_lines` scans the same text and returns the line
numbers, so that an error message can begin with `recipes/mine.toml:14`.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from ddiff.errors import RecipeError, shorten
from ddiff.recipe.tree import KeyPath, RecipeTree

DEEPEST = 16
"""Largest depth of nested tables and lists. Recipes usually have four levels."""

SMALLEST_INTEGER = -(2**63)
INTEGER_LIMIT = 2**64
"""Integers are in [SMALLEST_INTEGER, INTEGER_LIMIT), the range of int64 and uint64."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'[\s\S]*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', re.DOTALL
)
_SCALAR = re.compile(r"[^,\]}#\n]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_PARSER_LINE = re.compile(r" \(at line (\d+), column \d+\)$")


# ---------------------------------------------------------------------- reading


def read_toml(text: str, source: str) -> RecipeTree:
    """Parse TOML text of a recipe.

    Raises RecipeError if the text is not valid TOML, or contains a value that no recipe may
    contain. `source`: file name of the text, for messages.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _PARSER_LINE.search(str(error))
        place = f"{source}:{found[1]}" if found else source
        raise RecipeError(
            f"{place}: the text is not valid TOML: {explain_toml_error(error)}. Fix this line."
        ) from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(
            f"{source}: the text is not a recipe: {explain_parser_error(error)}."
        ) from error
    # checked before the scan for lines, which recurses once per level of nesting
    fault = find_fault(values)
    if fault:
        raise RecipeError(f"{source}: {fault}.")
    places = {path: f"{source}:{line}" for path, line in key_lines(text).items()}
    return RecipeTree(values, source, places)


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line, counted from 1, of every key, table header and array element.

    The text must be valid TOML.
    """
    return _Scanner(text).scan()


def find_fault(value: Any) -> str | None:
    """Describe a value that no recipe may contain. Returns None if `value` is allowed.

    A recipe may not contain dates, integers of more than 64 bits, or more than DEEPEST levels of
    nested tables and lists.
    """
    # iterative, because the value may be nested too deeply for recursion
    pending: list[tuple[Any, int, str]] = [(value, 0, "")]
    while pending:
        current, depth, name = pending.pop()
        about = f"{shorten(name)} " if name else "the value "
        if depth > DEEPEST:
            return (
                f"{about}has more than {DEEPEST} levels of nested tables and lists, the limit for "
                "a recipe"
            )
        if isinstance(current, dict):
            for key, below in current.items():
                pending.append((below, depth + 1, name or key))
        elif isinstance(current, list):
            for below in current:
                pending.append((below, depth + 1, name))
        elif isinstance(current, int) and not SMALLEST_INTEGER <= current < INTEGER_LIMIT:
            return f"{about}contains an integer of more than 64 bits, which no key accepts"
        elif isinstance(current, datetime.date | datetime.time):
            return (
                f"{about}contains a date or time, {current}, which no key accepts. Put quotes "
                "around the value"
            )
    return None


def explain_toml_error(error: tomllib.TOMLDecodeError) -> str:
    """Return the reason that tomllib gives for invalid TOML, without the line and column."""
    reason = shorten(_PARSER_LINE.sub("", str(error)))
    return reason[:1].lower() + reason[1:]


def explain_parser_error(error: Exception) -> str:
    """Return the reason why tomllib failed on text with valid syntax."""
    if isinstance(error, RecursionError):
        return f"it has more than {DEEPEST} levels of nested tables and lists"
    return f"the parser refuses the text ({shorten(str(error))})"


# ---------------------------------------------------------------------- writing


def write_toml(tree: Mapping[str, Any], comment: str) -> str:
    """Return nested tables as TOML text below a comment line. Keys with value None are omitted."""
    import tomlkit  # imported here, because reading a recipe does not need tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment(comment))
    for key, value in scalars_first(tree).items():
        document.add(key, tomlkit.item(value))
    return tomlkit.dumps(document)


def scalars_first(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Put the sub-tables last at every level of nested tables, as TOML requires.

    Keys with value None are omitted, also in tables that are items of a list.
    """
    scalars: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            tables[key] = scalars_first(value)
        elif isinstance(value, list):
            scalars[key] = [
                scalars_first(item) if isinstance(item, Mapping) else item for item in value
            ]
        elif value is not None:
            scalars[key] = value
    return scalars | tables


# ---------------------------------------------------------------------- lines


class _Scanner:
    """Scanner that finds the line of each key in TOML text.

    The scanner does not check the syntax, so the text must be text that tomllib accepts.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[KeyPath, int] = {}
        self.array_sizes: dict[KeyPath, int] = {}
        # line numbers are counted incrementally from the last counted position
        self.counted_at = 0
        self.counted_line = 1

    def scan(self) -> dict[KeyPath, int]:
        """Return the line number of every key."""
        table: KeyPath = ()
        self.skip(_BLANK)
        while self.at < len(self.text):
            if self.peek("["):
                table = self.read_header()
            else:
                self.read_pair(table)
            self.skip(_BLANK)
        return self.found

    def read_header(self) -> KeyPath:
        """Read `[table]` or `[[array]]`, and return the path of the table."""
        line = self.line()
        is_array = self.peek("[[")
        brackets = 2 if is_array else 1
        self.at += brackets
        path = self.resolve(self.read_key())
        self.at += brackets
        if is_array:
            index = self.array_sizes.get(path, 0)
            self.array_sizes[path] = index + 1
            self.mark(path, line)
            path = (*path, index)
        self.mark(path, line)
        return path

    def resolve(self, path: KeyPath) -> KeyPath:
        """Insert array indices into a header's path: a header refers to the last array element."""
        resolved: KeyPath = ()
        for key in path[:-1]:
            resolved = (*resolved, key)
            if resolved in self.array_sizes:
                resolved = (*resolved, self.array_sizes[resolved] - 1)
        return (*resolved, path[-1])

    def read_pair(self, table: KeyPath) -> None:
        """Read a line `key = value`."""
        line = self.line()
        path = (*table, *self.read_key())
        for length in range(len(table) + 1, len(path) + 1):
            self.mark(path[:length], line)
        self.at += 1  # the equals sign
        self.read_value(path)

    def read_key(self) -> KeyPath:
        """Read a dotted key and the blanks after the key."""
        parts: list[str] = []
        while True:
            self.skip(_BLANK)
            quoted = _STRING.match(self.text, self.at)
            word = quoted or _BARE_KEY.match(self.text, self.at)
            assert word is not None, "tomllib accepted a key that is neither bare nor quoted"
            # tomllib decodes the escapes of a quoted key
            parts.append(next(iter(tomllib.loads(f"{word[0]} = 0"))))
            self.at = word.end()
            self.skip(_BLANK)
            if not self.peek("."):
                return tuple(parts)
            self.at += 1

    def read_value(self, path: KeyPath) -> None:
        """Read the value of the key `path`, and record the lines of the keys and items in it."""
        self.skip(_BLANK)
        if self.peek("["):
            self.read_array(path)
        elif self.peek("{"):
            self.read_inline_table(path)
        elif not self.skip(_STRING):
            self.skip(_SCALAR)

    def read_array(self, path: KeyPath) -> None:
        index = 0
        self.enter()
        while not self.peek("]"):
            element = (*path, index)
            self.mark(element, self.line())
            self.read_value(element)
            index += 1
            self.skip_comma()
        self.at += 1

    def read_inline_table(self, path: KeyPath) -> None:
        self.enter()
        while not self.peek("}"):
            self.read_pair(path)
            self.skip_comma()
        self.at += 1

    def enter(self) -> None:
        """Skip an opening bracket and the blanks after the bracket."""
        self.at += 1
        self.skip(_BLANK)

    def skip_comma(self) -> None:
        """Skip an optional comma with the blanks around the comma."""
        self.skip(_BLANK)
        if self.peek(","):
            self.at += 1
            self.skip(_BLANK)

    def mark(self, path: KeyPath, line: int) -> None:
        """Record the line of the key `path`, unless a line is already recorded for it."""
        self.found.setdefault(path, line)

    def line(self) -> int:
        """Return the line number of the current position."""
        self.counted_line += self.text.count("\n", self.counted_at, self.at)
        self.counted_at = self.at
        return self.counted_line

    def peek(self, token: str) -> bool:
        """Return whether the text continues with a token."""
        return self.text.startswith(token, self.at)

    def skip(self, pattern: re.Pattern[str]) -> bool:
        """Skip a match of the pattern, and return whether the pattern matched."""
        found = pattern.match(self.text, self.at)
        if found is not None:
            self.at = found.end()
        return found is not None
