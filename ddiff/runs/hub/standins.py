"""Simple replacements of pydantic classes in the source of a saved model.

The settings of a saved model were checked when its recipe was resolved. The program that loads the
model therefore needs only their names and values, and not the package pydantic.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ddiff.errors import ArgumentError, suggest

_VALUE_TYPE = re.compile(r"dict\[str, (\w+)\]")


class ComponentConfig:
    """Settings as attributes. Class attributes are the defaults.

    Raises ArgumentError for unknown settings: those of a sampler are arguments of `generate`.
    """

    def __init__(self, **settings: Any) -> None:
        known: dict[str, None] = {}
        for each in reversed(type(self).__mro__):
            known |= dict.fromkeys(vars(each).get("__annotations__", {}))
        for name, value in settings.items():
            if name not in known:
                raise ArgumentError(
                    f"{name} is no setting of {type(self).__qualname__}, which has "
                    f"{', '.join(known) or 'none'}.{suggest(name, known)}"
                )
            vars(self)[name] = self._build_tables(name, value)

    def _build_tables(self, name: str, value: Any) -> Any:
        """Convert a table of tables, such as the conditions of a network, to settings objects."""
        annotation = type(self).__annotations__.get(name, "")
        named = _VALUE_TYPE.fullmatch(str(annotation))
        kind = globals().get(named[1]) if named else None
        if isinstance(kind, type) and issubclass(kind, ComponentConfig):
            return {key: kind(**table) for key, table in value.items()}
        return value


def Field(
    default: Any = None, default_factory: Callable[[], Any] | None = None, **_limits: Any
) -> Any:
    """Return the default of a setting. Limits of the value were checked before."""
    return default if default_factory is None else default_factory()
