"""TOML text that remembers where each key was written.

`tomllib` gives values without places. `key_lines` walks the same text and gives places without values; a `Draft` holds
both, so that an error can say `recipes/mine.toml:14`. Drafts merge: what a recipe extends below it, `--set` above.
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

Replaces = Callable[[tuple[str, ...], Mapping[str, Any], Mapping[str, Any]], frozenset[str] | None]
"""(path, below, above) of a table -> None when `above` changes the table below; else the keys that are handed on."""

DEEPEST = 16  # tables and lists inside one another; a recipe has four
INTEGERS = -(2**63), 2**64  # what TOML's 64 bits hold, signed or not

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'[\s\S]*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', re.DOTALL
)
_SCALAR = re.compile(r"[^,\]}#\n]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_PARSER_LINE = re.compile(r" \(at line (\d+), column \d+\)$")
_WRITTEN = {  # by option: what it expects, and examples
    "--set": (
        "key=value with a dotted key, as in --set train.steps=200",
        "a dotted key and a TOML value: train.steps=200, denoiser.head=tied, 'vocabulary.sizes=[64]'",
    ),
    "--condition": (
        "NAME=VALUE, as in --condition author=2",
        "the name of a condition and a label or a vector: author=2, 'style=[0.5, 1.0]'",
    ),
}


@dataclass(frozen=True)
class RecipeTree:
    """Nested tables as they were written, and the printable place of every key in them."""

    tree: dict[str, Any]
    source: str
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where `path` was written, or the nearest table around it, or the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.source

    def under(self, base: RecipeTree, replaces: Replaces) -> RecipeTree:
        """This draft with the keys of `base` where it has none of its own, table by table. `replaces` may say
        that a table is a new one and no change of the old.
        """
        places = dict(base.places)
        tree = _merged(base.tree, self.tree, (), places, replaces)
        return RecipeTree(tree, self.source, {**places, **self.places})


def read_toml(text: str, source: str) -> RecipeTree:
    """Parse TOML; RecipeError names `source` and the line where the text is broken, or holds what no recipe may."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _PARSER_LINE.search(str(error))
        place = f"{source}:{found[1]}" if found else source
        raise RecipeError(
            f"{place}: this is not TOML: {_reason(error)}. Mend that line."
        ) from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{source}: this is not a recipe: {_unparsed(error)}.") from error
    if fault := _unfit(tree):
        raise RecipeError(
            f"{source}: {fault}."
        )  # before the lines are looked for: the scanner goes as deep as the text
    return RecipeTree(
        tree, source, {path: f"{source}:{line}" for path, line in key_lines(text).items()}
    )


def read_settings(settings: Iterable[str], source: str, option: str = "--set") -> RecipeTree:
    """The draft of `--set a.b=c` texts over `source`: a key path and a TOML value, where a bare word is a string.

    `option`, "--set" or "--condition", is what errors speak of. Raises RecipeError for a text without `=`, a broken key or
    value, more than one key, and a path through something that is no table.
    """
    draft = RecipeTree({}, source)
    for setting in settings:
        place = f"{option} {shorten(setting)}"
        path, value = _parse_setting(setting, option, place)
        if fault := _unfit(value):
            raise RecipeError(f"{place}: {fault}.")
        _put(draft.tree, path, value, place)
        for length in range(1, len(path) + 1):
            draft.places[path[:length]] = place
    return draft


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line (from 1) of every key, table header and array element of valid TOML text."""
    return _Scanner(text).lines()


def write_toml(tree: Mapping[str, Any], comment: str) -> str:
    """TOML text of nested tables under a comment line; None is left out, scalars come before sub-tables."""
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment(comment))
    for key, value in scalars_first(tree).items():
        document.add(key, tomlkit.item(value))
    return tomlkit.dumps(document)


def scalars_first(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same tables without None, each with its sub-tables last, as TOML needs them."""
    kept = {key: value for key, value in tree.items() if value is not None}
    ordered = sorted(kept.items(), key=lambda item: isinstance(item[1], Mapping))
    return {
        key: scalars_first(value) if isinstance(value, Mapping) else value for key, value in ordered
    }


def _merged(
    below: Mapping[str, Any],
    above: Mapping[str, Any],
    path: tuple[str, ...],
    places: dict[KeyPath, str],
    replaces: Replaces,
) -> dict[str, Any]:
    handed_on = replaces(path, below, above)
    merged = copy.deepcopy(
        {key: value for key, value in below.items() if handed_on is None or key in handed_on}
    )
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key, {}), Mapping):
            merged[key] = _merged(merged.get(key, {}), value, (*path, key), places, replaces)
        else:
            merged[key] = copy.deepcopy(value)
            _forget(places, (*path, key))
    return merged


def _forget(places: dict[KeyPath, str], path: KeyPath) -> None:
    """Drop the places below a value that is no longer the one written there."""
    for known in [known for known in places if known[: len(path)] == path]:
        del places[known]


def _parse_setting(setting: str, option: str, place: str) -> tuple[tuple[str, ...], Any]:
    """The key path and the value of one `key=value` text."""
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{place}: expected {_WRITTEN[option][0]}.")
    try:
        setting.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{place}: the bytes are no UTF-8 text (byte {setting[error.start : error.start + 1]!a} at {error.start})."
        ) from error
    try:
        path = _key_path(key)
        return path, _value_at(path, key, value)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{place}: {_reason(error)}. Write {_WRITTEN[option][1]}.") from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{place}: {_unparsed(error)}. Write {_WRITTEN[option][1]}.") from error


def _key_path(key: str) -> tuple[str, ...]:
    """The path of a dotted key. Raises TOMLDecodeError for what is none, a line break included."""
    if "\n" in key or "\r" in key:
        raise tomllib.TOMLDecodeError("a key stands on one line")
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


def _value_at(path: tuple[str, ...], key: str, value: str) -> Any:
    """The TOML value, or the bare word as a string. A broken bracket or quote does not become one silently."""
    try:
        tree: Any = tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
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


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any, place: str) -> None:
    for depth, key in enumerate(path[:-1], start=1):
        below = tree.setdefault(key, {})
        if isinstance(below, str):  # the shorthand for {kind = "..."}, given by an earlier --set
            below = tree[key] = {"kind": below}
        if not isinstance(below, dict):
            raise RecipeError(
                f"{place}: another setting gives {'.'.join(path[:depth])} a value that is no table."
            )
        tree = below
    if isinstance(tree.get(path[-1]), dict) and isinstance(value, str):
        tree[path[-1]]["kind"] = value
    else:
        tree[path[-1]] = value


def _unfit(value: Any) -> str | None:
    """What a recipe may not hold anywhere: depth without end, integers of more than 64 bits, dates. None if all is well.

    Iterative, because what is nested too deep for this function is what it looks for.
    """
    pending: list[tuple[Any, int, str]] = [(value, 0, "")]
    while pending:
        current, depth, name = pending.pop()
        about = f"{shorten(name)} " if name else "it "
        if depth > DEEPEST:
            return f"{about}is nested deeper than {DEEPEST} tables and lists, and no recipe has more than a few"
        if isinstance(current, dict):
            pending += [(below, depth + 1, name or key) for key, below in current.items()]
        elif isinstance(current, list):
            pending += [(below, depth + 1, name) for below in current]
        elif isinstance(current, int) and not INTEGERS[0] <= current < INTEGERS[1]:
            return f"{about}holds an integer of more than 64 bits, which no key takes"
        elif isinstance(current, datetime.date | datetime.time):
            return f"{about}holds a date or time, {current}, which no key takes: put it in quotes"
    return None


def _reason(error: tomllib.TOMLDecodeError) -> str:
    reason = shorten(_PARSER_LINE.sub("", str(error)))
    return reason[:1].lower() + reason[1:]


def _unparsed(error: Exception) -> str:
    """Why the parser gave up on text that it did not find broken."""
    if isinstance(error, RecursionError):
        return f"it is nested deeper than {DEEPEST} tables and lists"
    return f"the parser refuses it ({shorten(str(error))})"


class _Scanner:
    """One pass over text that tomllib has accepted, so only the shape of keys and values matters here."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.counted = (0, 1)  # a place, and its line: lines are counted from there on
        self.found: dict[KeyPath, int] = {}
        self.array_sizes: dict[KeyPath, int] = {}

    def lines(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self.skip(_BLANK)
        while self.at < len(self.text):
            if self.peek("["):
                table = self.header()
            else:
                self.pair(table)
            self.skip(_BLANK)
        return self.found

    def header(self) -> KeyPath:
        line, is_array = self.line(), self.peek("[[")
        self.at += 2 if is_array else 1
        path = self.resolve(self.key())
        self.at += 2 if is_array else 1
        if is_array:
            index = self.array_sizes[path] = self.array_sizes.get(path, -1) + 1
            self.mark(path, line)
            path = (*path, index)
        self.mark(path, line)
        return path

    def resolve(self, path: KeyPath) -> KeyPath:
        """A header below an array of tables means the array's last element."""
        resolved: KeyPath = ()
        for key in path[:-1]:
            resolved = (*resolved, key)
            if resolved in self.array_sizes:
                resolved = (*resolved, self.array_sizes[resolved])
        return (*resolved, path[-1])

    def pair(self, table: KeyPath) -> None:
        line = self.line()
        path = (*table, *self.key())
        for length in range(len(table) + 1, len(path) + 1):
            self.mark(path[:length], line)
        self.at += 1  # the equals sign
        self.value(path)

    def key(self) -> KeyPath:
        """A dotted key; stops at what follows it."""
        parts: list[str] = []
        while True:
            self.skip(_BLANK)
            quoted = _STRING.match(self.text, self.at)
            word = quoted or _BARE_KEY.match(self.text, self.at)
            assert word is not None, "tomllib accepted a key that is neither bare nor quoted"
            parts.append(next(iter(tomllib.loads(f"{word[0]} = 0"))))
            self.at = word.end()
            self.skip(_BLANK)
            if not self.peek("."):
                return tuple(parts)
            self.at += 1

    def value(self, path: KeyPath) -> None:
        self.skip(_BLANK)
        if self.peek("["):
            self.items("]", lambda index: self.element((*path, index)))
        elif self.peek("{"):
            self.items("}", lambda index: self.pair(path))
        elif not self.skip(_STRING):
            self.skip(_SCALAR)

    def element(self, path: KeyPath) -> None:
        self.mark(path, self.line())
        self.value(path)

    def items(self, closing: str, read: Callable[[int], None]) -> None:
        index = 0
        self.at += 1
        self.skip(_BLANK)
        while not self.peek(closing):
            read(index)
            index += 1
            self.skip(_BLANK)
            if self.peek(","):
                self.at += 1
                self.skip(_BLANK)
        self.at += 1

    def mark(self, path: KeyPath, line: int) -> None:
        self.found.setdefault(path, line)

    def line(self) -> int:
        place, line = self.counted
        line += self.text.count("\n", place, self.at)
        self.counted = (self.at, line)
        return line

    def peek(self, token: str) -> bool:
        return self.text.startswith(token, self.at)

    def skip(self, pattern: re.Pattern[str]) -> bool:
        found = pattern.match(self.text, self.at)
        if found is not None:
            self.at = found.end()
        return found is not None
