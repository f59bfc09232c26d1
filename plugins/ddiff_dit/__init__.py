"""A diffusion transformer as a backbone. Names only: nothing heavy is imported until a recipe asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("backbone", "dit", "ddiff_dit.dit:DiT")
