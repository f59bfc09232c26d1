"""TOML text with the line of each key, and the merging of trees of tables.

`tomllib` returns values without places. `key_lines` walks the same text and returns places without
values. A `RecipeTree` holds both, so that an error can begin with `recipes/mine.toml:14`. Trees are
merged: the recipe that is extended below, `--set` texts above.
"""

from __future__ import annotations

import copy
import datetime
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ddiff.errors import RecipeError, shorten

KeyPath = tuple[str | int, ...]
"""A path into nested tables; integers index arrays."""

InheritedKeys = Callable[
    [tuple[str, ...], Mapping[str, Any], Mapping[str, Any]], frozenset[str] | None
]
"""(path, base table, table over it) -> keys of the base that are inherited; None: all."""

DEEPEST = 16
"""Largest depth of nested tables and lists; a recipe has four."""

SMALLEST_INTEGER = -(2**63)
INTEGER_LIMIT = 2**64
"""Integers are in [SMALLEST_INTEGER, INTEGER_LIMIT): 64 bits, signed or not."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'[\s\S]*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', re.DOTALL
)
_SCALAR = re.compile(r"[^,\]}#\n]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_PARSER_LINE = re.compile(r" \(at line (\d+), column \d+\)$")


@dataclass(frozen=True)
class RecipeTree:
    """Nested tables as they were written.

    Args:
        values: the tables.
        source: name of the file or option that they come from.
        places: printable place of every key, such as "mine.toml:14".
    """

    values: dict[str, Any]
    source: str
    places: dict[KeyPath, str] = field(default_factory=dict)

    def locate(self, path: KeyPath) -> str:
        """Return the place of a key, of the nearest table around it, or the source."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.source

    def merge_over(self, base: RecipeTree, inherited: InheritedKeys) -> RecipeTree:
        """Return this tree with the keys of `base` that it lacks, table by table.

        `inherited` may limit the keys that a table takes from the table below it.
        """
        places = dict(base.places)
        values = _merge_tables(base.values, self.values, (), places, inherited)
        return RecipeTree(values, self.source, {**places, **self.places})


# ---------------------------------------------------------------------- reading


def read_toml(text: str, source: str) -> RecipeTree:
    """Parse TOML text. RecipeError names `source` and the line that is broken or not allowed."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _PARSER_LINE.search(str(error))
        place = f"{source}:{found[1]}" if found else source
        raise RecipeError(
            f"{place}: this is not TOML: {_toml_reason(error)}. Fix that line."
        ) from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{source}: this is not a recipe: {_parser_reason(error)}.") from error
    # before the lines are found: the scanner recurses as deep as the text is nested
    fault = _find_fault(values)
    if fault:
        raise RecipeError(f"{source}: {fault}.")
    places = {path: f"{source}:{line}" for path, line in key_lines(text).items()}
    return RecipeTree(values, source, places)


def key_lines(text: str) -> dict[KeyPath, int]:
    """Find the line (from 1) of every key, table header and array element of valid TOML text."""
    return _Scanner(text).scan()


def _find_fault(value: Any) -> str | None:
    """Describe a value that no recipe may hold; None if there is none.

    Refused are nesting below DEEPEST, integers of more than 64 bits, and dates.
    """
    # iterative, because it must survive values that are nested too deep for recursion
    pending: list[tuple[Any, int, str]] = [(value, 0, "")]
    while pending:
        current, depth, name = pending.pop()
        about = f"{shorten(name)} " if name else "it "
        if depth > DEEPEST:
            return (
                f"{about}is nested deeper than {DEEPEST} tables and lists, and no recipe has more "
                "than a few"
            )
        if isinstance(current, dict):
            for key, below in current.items():
                pending.append((below, depth + 1, name or key))
        elif isinstance(current, list):
            for below in current:
                pending.append((below, depth + 1, name))
        elif isinstance(current, int) and not SMALLEST_INTEGER <= current < INTEGER_LIMIT:
            return f"{about}holds an integer of more than 64 bits, which no key takes"
        elif isinstance(current, datetime.date | datetime.time):
            return f"{about}holds a date or time, {current}, which no key takes: put it in quotes"
    return None


def _toml_reason(error: tomllib.TOMLDecodeError) -> str:
    """Reason of a TOML error without its position, to stand inside a sentence."""
    reason = shorten(_PARSER_LINE.sub("", str(error)))
    return reason[:1].lower() + reason[1:]


def _parser_reason(error: Exception) -> str:
    """Reason why the parser gave up on text whose syntax it accepted."""
    if isinstance(error, RecursionError):
        return f"it is nested deeper than {DEEPEST} tables and lists"
    return f"the parser refuses it ({shorten(str(error))})"


# ---------------------------------------------------------------------- settings


@dataclass(frozen=True)
class _Option:
    """Parts of messages about a command-line option that takes `key=value` texts."""

    expected: str
    examples: str


_OPTIONS = {
    "--set": _Option(
        "key=value with a dotted key, as in --set train.steps=200",
        "a dotted key and a TOML value: "
        "train.steps=200, denoiser.head=tied, 'vocabulary.sizes=[64]'",
    ),
    "--condition": _Option(
        "NAME=VALUE, as in --condition author=2",
        "the name of a condition and a label or a vector: author=2, 'style=[0.5, 1.0]'",
    ),
}


def read_settings(settings: Iterable[str], source: str, option: str = "--set") -> RecipeTree:
    """Read `a.b=c` texts; the value is TOML, or a bare word for a string.

    `option`, "--set" or "--condition", is named in errors. Raises RecipeError for a text without
    `=`, a broken key or value, more than one key, and a path through a value that is not a table.
    """
    tree = RecipeTree({}, source)
    for setting in settings:
        place = f"{option} {shorten(setting)}"
        path, value = _parse_setting(setting, option, place)
        fault = _find_fault(value)
        if fault:
            raise RecipeError(f"{place}: {fault}.")
        _insert(tree.values, path, value, place)
        # the tables around the key as well, since the file may not have them
        for length in range(1, len(path) + 1):
            tree.places[path[:length]] = place
    return tree


def _parse_setting(setting: str, option: str, place: str) -> tuple[tuple[str, ...], Any]:
    """Key path and value of one `key=value` text."""
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{place}: expected {_OPTIONS[option].expected}.")
    try:
        setting.encode()
    except UnicodeEncodeError as error:
        byte = setting[error.start : error.start + 1]
        raise RecipeError(
            f"{place}: the bytes are not UTF-8 text (byte {byte!a} at {error.start})."
        ) from error
    examples = _OPTIONS[option].examples
    try:
        path = _parse_key(key)
        return path, _parse_value(path, key, value)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{place}: {_toml_reason(error)}. Write {examples}.") from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{place}: {_parser_reason(error)}. Write {examples}.") from error


def _parse_key(key: str) -> tuple[str, ...]:
    """Path of a dotted key. Raises TOMLDecodeError for a malformed one or a line break."""
    if "\n" in key or "\r" in key:
        raise tomllib.TOMLDecodeError("a key stands on one line")
    # before tomllib, which recurses for every dot
    if key.count(".") > DEEPEST:
        raise ValueError(f"the key has more than {DEEPEST} parts")
    path: tuple[str, ...] = ()
    tree: Any = tomllib.loads(f"{key} = 0")
    while isinstance(tree, dict):
        if len(tree) != 1:
            raise tomllib.TOMLDecodeError("expected one key")
        ((name, tree),) = tree.items()
        path = (*path, name)
    return path


def _parse_value(path: tuple[str, ...], key: str, value: str) -> Any:
    """TOML value, or the bare word as a string."""
    try:
        tree: Any = tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        # a broken list, table or string must not become a bare word silently
        if value.strip()[:1] in tuple("[{\"'"):
            raise
        return value.strip()
    for name in path:
        if not isinstance(tree, dict) or list(tree) != [name]:
            raise tomllib.TOMLDecodeError(
                "one setting takes one key; repeat the option for the next one"
            )
        tree = tree[name]
    return tree


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any, place: str) -> None:
    """Insert a value at a path, and a string over a table as its kind."""
    for depth, key in enumerate(path[:-1], start=1):
        below = tree.setdefault(key, {})
        if isinstance(below, str):  # an earlier setting used the shorthand for {kind = "..."}
            below = tree[key] = {"kind": below}
        if not isinstance(below, dict):
            raise RecipeError(
                f"{place}: another setting gives {'.'.join(path[:depth])} a value that is not a "
                "table."
            )
        tree = below
    # train.optimizer=muon after train.optimizer.lr=0.5 is the shorthand for the kind
    if isinstance(tree.get(path[-1]), dict) and isinstance(value, str):
        tree[path[-1]]["kind"] = value
    else:
        tree[path[-1]] = value


# ---------------------------------------------------------------------- writing and merging


def write_toml(tree: Mapping[str, Any], comment: str) -> str:
    """Write nested tables as TOML text under a comment line; None is left out."""
    import tomlkit  # here, because reading a recipe does not need it

    document = tomlkit.document()
    document.add(tomlkit.comment(comment))
    for key, value in scalars_first(tree).items():
        document.add(key, tomlkit.item(value))
    return tomlkit.dumps(document)


def scalars_first(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Order tables as TOML needs it: sub-tables last, at every level. None is left out."""
    scalars: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            tables[key] = scalars_first(value)
        elif value is not None:
            scalars[key] = value
    return scalars | tables


def _merge_tables(
    base: Mapping[str, Any],
    over: Mapping[str, Any],
    path: tuple[str, ...],
    places: dict[KeyPath, str],
    inherited: InheritedKeys,
) -> dict[str, Any]:
    """Merge two tables; places of replaced values are deleted from `places`."""
    keys = inherited(path, base, over)
    kept = {key: value for key, value in base.items() if keys is None or key in keys}
    # copied, because settings and shorthand change a tree in place
    merged = copy.deepcopy(kept)
    for key, value in over.items():
        below = merged.get(key, {})
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = _merge_tables(below, value, (*path, key), places, inherited)
        else:
            merged[key] = copy.deepcopy(value)
            # they point at lines of the base, and the new value is written elsewhere
            _delete_places(places, (*path, key))
    return merged


def _delete_places(places: dict[KeyPath, str], path: KeyPath) -> None:
    """Delete the places of a value and of everything inside it."""
    for known in list(places):
        if known[: len(path)] == path:
            del places[known]


# ---------------------------------------------------------------------- lines


class _Scanner:
    """One pass over TOML text that finds the line of each key.

    tomllib has accepted the text before, so only the shape of keys and values matters here.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[KeyPath, int] = {}
        self.array_sizes: dict[KeyPath, int] = {}
        # lines are counted from the last counted position on, not from the start each time
        self.counted_at = 0
        self.counted_line = 1

    def scan(self) -> dict[KeyPath, int]:
        """Return the line of every key."""
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
        """Read `[table]` or `[[array]]`; return the path of the keys below it."""
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
        """Insert indices: a header below an array of tables means the array's last element."""
        resolved: KeyPath = ()
        for key in path[:-1]:
            resolved = (*resolved, key)
            if resolved in self.array_sizes:
                resolved = (*resolved, self.array_sizes[resolved] - 1)
        return (*resolved, path[-1])

    def read_pair(self, table: KeyPath) -> None:
        """Read `key = value`."""
        line = self.line()
        path = (*table, *self.read_key())
        for length in range(len(table) + 1, len(path) + 1):
            self.mark(path[:length], line)
        self.at += 1  # the equals sign
        self.read_value(path)

    def read_key(self) -> KeyPath:
        """Read a dotted key, up to the text that follows it."""
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
        """Read a value; mark the elements of an array and the keys of an inline table."""
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
        """Skip an opening bracket."""
        self.at += 1
        self.skip(_BLANK)

    def skip_comma(self) -> None:
        """Skip the comma after an element, if there is one, and blanks around it."""
        self.skip(_BLANK)
        if self.peek(","):
            self.at += 1
            self.skip(_BLANK)

    def mark(self, path: KeyPath, line: int) -> None:
        """Record the first line of a path."""
        self.found.setdefault(path, line)

    def line(self) -> int:
        """Return the line of the current position."""
        self.counted_line += self.text.count("\n", self.counted_at, self.at)
        self.counted_at = self.at
        return self.counted_line

    def peek(self, token: str) -> bool:
        """Return whether the text continues with a token."""
        return self.text.startswith(token, self.at)

    def skip(self, pattern: re.Pattern[str]) -> bool:
        """Skip a match of the pattern; whether there was one."""
        found = pattern.match(self.text, self.at)
        if found is not None:
            self.at = found.end()
        return found is not None
