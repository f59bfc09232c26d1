"""Short text forms of processes, schedules and clocks: class and settings, no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_DERIVED = (
    "closes_at_",
    "uniforms_per_",
    "exact_step",
    "has_events",
    "num_",
    "vocabulary",
    "prior",
)
_DEEPEST = 2  # objects within objects
_LONGEST = 8  # entries of a tuple


class SettingsRepr:
    """Print as `Class(setting=value, ...)`, of the public attributes that are settings and not tables."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(format_settings(self))})"


def format_settings(owner: object, depth: int = _DEEPEST) -> Iterator[str]:
    """`name=value` of each public attribute that is a number, a text, a tuple of such, or an object with settings."""
    for name, value in vars(owner).items():
        if name.startswith(("_", *_DERIVED)):
            continue
        shown = _shown(value, depth)
        if shown is not None:
            yield f"{name}={shown}"


def _shown(value: Any, depth: int) -> str | None:
    """The text of a setting; None for what is none."""
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, tuple | list):
        entries = [_shown(entry, depth) for entry in value]
        if not 0 < len(entries) <= _LONGEST or None in entries:
            return None
        return f"({', '.join(map(str, entries))}{',' if len(entries) == 1 else ''})"
    is_table = isinstance(value, Tensor | nn.Module | type) or callable(value)
    if is_table or depth == 0 or not hasattr(value, "__dict__") or hasattr(value, "vocabulary"):
        return None
    return f"{type(value).__name__}({', '.join(format_settings(value, depth - 1))})"
