"""Diffusion transformer (arXiv 2212.09748) as a backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("backbone", "dit", "ddiff_dit.dit:DiT")
