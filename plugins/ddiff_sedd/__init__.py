"""Score entropy (arXiv 2310.16834): absorbing and uniform processes, and a score head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("process", "sedd", "ddiff_sedd.process:ScoreEntropyDiffusion")
    registry.add("head", "score", "ddiff_sedd.head:ScoreHead")
