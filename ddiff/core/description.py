"""Short text forms of processes, schedules and clocks: class name and settings, without tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# Attributes whose names start with these prefixes are derived from other attributes, so they are
# not settings.
_DERIVED = (
    "closes_at_",
    "uniforms_per_",
    "exact_step",
    "has_events",
    "num_",
    "vocabulary",
    "prior",
)
_MAX_DEPTH = 2  # objects within objects
_MAX_ENTRIES = 8  # entries of a tuple


class SettingsRepr:
    """Mixin whose repr lists the settings of an object: `Class(setting=value, ...)`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(format_settings(self))})"


def format_settings(owner: object, depth: int = _MAX_DEPTH) -> Iterator[str]:
    """Yield `name=value` for each public attribute that is a setting.

    Numbers, strings, tuples of these, and objects with settings are settings. Tensors and modules
    are not. `depth` limits how deeply objects may be nested.
    """
    for name, value in vars(owner).items():
        if name.startswith(("_", *_DERIVED)):
            continue
        text = _format_value(value, depth)
        if text is not None:
            yield f"{name}={text}"


def _format_value(value: Any, depth: int) -> str | None:
    """Return the text of a setting, or None if the value is not a setting.

    `depth` limits how deeply objects may be nested.
    """
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, tuple | list):
        return _format_tuple(value, depth)
    is_table = isinstance(value, Tensor | nn.Module | type) or callable(value)
    if is_table or depth == 0 or not hasattr(value, "__dict__"):
        return None
    if "vocabulary" in vars(value):  # a process or a distribution
        return None
    return f"{type(value).__name__}({', '.join(format_settings(value, depth - 1))})"


def _format_tuple(values: tuple[Any, ...] | list[Any], depth: int) -> str | None:
    entries = [_format_value(entry, depth) for entry in values]
    if not 0 < len(entries) <= _MAX_ENTRIES or None in entries:
        return None
    comma = "," if len(entries) == 1 else ""
    return f"({', '.join(map(str, entries))}{comma})"
