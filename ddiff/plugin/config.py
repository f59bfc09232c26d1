"""What a component of a plugin declares about its own table of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ComponentConfig",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "Probability",
    "Seed",
    "Share",
]

COUNTS = 2**31
"""Counts, steps and sizes are below this: torch and numpy index with 64 bits, and products of three of them must fit."""

LARGEST = 1e30
"""Floats are below this: a larger one times a weight has no float32."""

PositiveInt = Annotated[int, Field(gt=0, lt=COUNTS)]
"""A count in [1, 2^31)."""

NonNegativeInt = Annotated[int, Field(ge=0, lt=COUNTS)]
"""A count or label in [0, 2^31)."""

Seed = Annotated[int, Field(ge=0, lt=2**64)]
"""A seed of the random generators, in [0, 2^64)."""

PositiveFloat = Annotated[float, Field(gt=0.0, lt=LARGEST)]
"""A number in (0, 1e30)."""

NonNegativeFloat = Annotated[float, Field(ge=0.0, lt=LARGEST)]
"""A number in [0, 1e30)."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
"""A number in [0, 1]."""

Share = Annotated[float, Field(gt=0.0, le=1.0)]
"""A number in (0, 1]."""


class ComponentConfig(BaseModel):
    """The keys of a component's table, with their types, ranges and defaults.

    A component nests one as `Config`; keys that it does not name are refused, values cannot change later, and infinity
    and NaN are no numbers. A recipe reads it strictly (no "3" for 3, no 1 for true); Python callers may pass lists for
    tuples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
