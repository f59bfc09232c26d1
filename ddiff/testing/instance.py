"""Instance of a component that `ddiff check` checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ddiff.testing.report import LawReport


class Instance(NamedTuple):
    """Object to check.

    Attributes:
        label: name in the table.
        check: function that checks the object.
        settings: settings of the object as text, or "" for defaults or unknown settings.
    """

    label: str
    check: Callable[[], list[LawReport]]
    settings: str = ""
