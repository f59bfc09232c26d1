"""Base class and common types for the configuration of components."""

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
"""Exclusive upper bound of counts, steps and sizes.

torch and numpy use 64-bit indices, and a product of two counts must be below 2^63."""

LARGEST = 1e30
"""Exclusive upper bound of floats. Products of larger floats overflow float32."""

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
    """Keys of a component's table in a recipe, with types, ranges, defaults and descriptions.

    The attribute `Config` of a component is a subclass of this class. Unknown keys, infinity and
    NaN are refused. Instances are immutable. `ddiff plugins NAME` prints the docstring below each
    key as the description of the key. Values in a recipe are not converted: "3" is not accepted as
    a number, and 1 is not accepted as true. Python callers may pass lists for tuples.
    """

    # frozen, because a component and the recipe share one instance
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
