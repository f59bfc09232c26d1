"""Gaussian diffusion of vectors (arXiv 2006.11239, 2107.00630)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("process", "gaussian", "ddiff_gaussian.process:GaussianDiffusion")
