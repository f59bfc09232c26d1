"""Types of a condition: a class label or a vector of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Label:
    """Class label: an integer in [0, classes). `classes` is None if the number is not known yet."""

    classes: int | None = None

    def __str__(self) -> str:
        if self.classes is None:
            return "a label (a whole number from 0)"
        return f"a label of {self.classes} classes (a whole number from 0 to {self.classes - 1})"


@final
@dataclass(frozen=True)
class Vector:
    """Vector of `width` finite numbers. `width` is None if the width is not known yet."""

    width: int | None = None

    def __str__(self) -> str:
        if self.width is None:
            return "a vector (a list of finite numbers)"
        return f"a vector of width {self.width} (a list of {self.width} finite numbers)"


Form = Label | Vector
