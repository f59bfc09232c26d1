"""What a denoiser can be told of a sample: one of so many labels, or a vector of so many numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Label:
    """A whole number in [0, classes); None where nobody says how many classes there are."""

    classes: int | None = None

    def __str__(self) -> str:
        if self.classes is None:
            return "a label (a whole number from 0)"
        return f"a label of {self.classes} classes (a whole number from 0 to {self.classes - 1})"


@final
@dataclass(frozen=True)
class Vector:
    """`width` finite numbers; None where nobody says how many."""

    width: int | None = None

    def __str__(self) -> str:
        if self.width is None:
            return "a vector (a list of finite numbers)"
        return f"a vector of width {self.width} (a list of {self.width} finite numbers)"


Form = Label | Vector
