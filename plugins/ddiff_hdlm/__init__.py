"""Hierarchical diffusion (arXiv 2510.08632) on trees of any depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("process", "hdlm", "ddiff_hdlm.process:HierarchicalDiffusion")
    registry.add("training_loss", "empirical", "ddiff_hdlm.losses:Empirical")
    registry.add("training_loss", "hard", "ddiff_hdlm.losses:HardTokens")
