"""Masked diffusion (arXiv 2406.07524)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("process", "mdlm", "ddiff_mdlm.process:MaskedDiffusion")
