"""Sampler with a wrong declaration, for tests of the conformance checks of samplers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ddiff.sampling.loop import Canvas


class DeclaredSampler:
    """Sampler that behaves like `inner` and declares the given quality and order."""

    cached = False
    looks_ahead = True

    def __init__(self, inner: Any, quality: str = "of an order", order: int = 1) -> None:
        self.inner = inner
        self.quality = quality
        self.order = order

    @property
    def steps(self) -> int | None:
        return self.inner.steps

    def check_supported(self, process: Any, predicts: Any) -> None:
        self.inner.check_supported(process, predicts)

    def run(self, *arguments: Any) -> Iterator[Canvas]:
        yield from self.inner.run(*arguments)


class DeclaredVectorSampler(DeclaredSampler):
    """Sampler of vectors that declares the given quality and order."""

    states = "vectors"
