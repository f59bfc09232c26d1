"""Epsilon-hybrid and gamma-hybrid: processes with masks and uniform noise (arXiv 2504.06416)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("process", "hybrid_epsilon", "ddiff_hybrid.epsilon:EpsilonHybrid")
    registry.add("process", "hybrid_gamma", "ddiff_hybrid.gamma:GammaHybrid")
    registry.add("training_loss", "published", "ddiff_hybrid.losses:Published")
