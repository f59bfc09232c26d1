"""What a component of a plugin declares about its own table of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

__all__ = [
    "ComponentConfig",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "Probability",
    "Share",
]

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
