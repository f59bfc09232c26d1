"""The one sampling loop: a sampler's steps, clamped positions, network calls counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ddiff.core.elbo import Ask
from ddiff.core.noise import Noise
from ddiff.core.process import ForwardProcess, RowFunction, Visit
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError

Quality = Literal["exact", "first order", "second order", "heuristic"]
NoiseAt = Callable[[int], Noise]
OnStep = Callable[[int, "Canvas"], None]


@dataclass(frozen=True)
class Canvas:
    """Sequences on their way: states zt [B,L], own times t [B,L] float64, clamped [B,L] bool (given, never changed)."""

    zt: Tensor
    t: Tensor
    clamped: Tensor

    def noisy(self) -> Noisy:
        """What the network is shown: clamped positions are clean, at time 0."""
        return Noisy(self.zt, torch.where(self.clamped, 0.0, self.t), self.clamped)


class Sampler(Protocol):
    """A way from noise to text; `quality` says what it is when the network is right."""

    quality: Quality

    @property
    def steps(self) -> int:
        """How many canvases `run` yields."""

    def run(self, process: ForwardProcess, ask: Ask, canvas: Canvas, noise_at: NoiseAt) -> Iterator[Canvas]:
        """The canvas after each step; the last one holds words everywhere. Step k draws from `noise_at(k)`."""


@dataclass(frozen=True)
class Samples:
    """ids [B,L] words; `nfe`, how often the network ran over the batch."""

    ids: Tensor
    nfe: int


def generate(
    sampler: Sampler,
    process: ForwardProcess,
    ask: Ask,
    *,
    index: Tensor,
    length: int,
    seed: int,
    given: Tensor | None = None,
    clamped: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Samples:
    """Draw one sequence per entry of `index` [B] (the samples' numbers: a sample does not depend on its batch).

    `given` [B,L] words with `clamped` [B,L] bool are kept bit for bit. Raises ArgumentError when they do not fit.
    """
    noise_at = lambda step: Noise(seed, step, index, length, "sample")  # noqa: E731
    counted = _CountedAsk(ask)
    canvas = _first_canvas(process, noise_at(0), index, length, given, clamped)
    for step, canvas in enumerate(sampler.run(process, counted, canvas, noise_at), start=1):  # noqa: B020
        if on_step:
            on_step(step, canvas)
    return Samples(canvas.zt, counted.calls)


def step_rows(
    process: ForwardProcess, ask: Ask, canvas: Canvas, draw: Callable[[Visit, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """[B,L] states after `draw(visit, zt[r], t[r], rows[r])` over the positions that are not clamped, flat rows."""
    free = (~canvas.clamped).reshape(-1).nonzero().squeeze(-1)
    visit_canvas = ask(canvas.noisy())

    def visit(rows: Tensor, node: Tensor, fn: RowFunction) -> Any:
        return visit_canvas(free[rows], node, fn)

    moved = canvas.zt.reshape(-1).clone()
    moved[free] = draw(visit, moved[free], canvas.t.reshape(-1)[free], free)
    return moved.reshape(canvas.zt.shape)


def _first_canvas(
    process: ForwardProcess, noise: Noise, index: Tensor, length: int, given: Tensor | None, clamped: Tensor | None
) -> Canvas:
    """Prior draws at t = 1 everywhere, given words where clamped."""
    shape = (len(index), length)
    prior = process.prior.draw(noise.uniform("start"))
    if clamped is not None and given is None:
        raise ArgumentError("generate: clamped needs given, the words to keep at those positions.")
    if clamped is None:
        clamped = torch.zeros(shape, dtype=torch.bool, device=index.device)
    given = prior if given is None else given
    if given.shape != shape or clamped.shape != shape:
        raise ArgumentError(
            f"generate: given and clamped must be [{shape[0]}, {shape[1]}] like the canvas; got {tuple(given.shape)} and "
            f"{tuple(clamped.shape)}. A prompt longer than the canvas needs a larger length."
        )
    kept, num_tokens = given[clamped], process.vocabulary.num_tokens
    if bool(((kept < 0) | (kept >= num_tokens)).any()):
        raise ArgumentError(
            f"generate: clamped positions of given must hold words, ids 0..{num_tokens - 1}; got ids from "
            f"{int(kept.min())} to {int(kept.max())}. Clamp only where there is a word."
        )
    times = torch.ones(shape, dtype=torch.float64, device=index.device)
    return Canvas(torch.where(clamped, given, prior), times, clamped)


class _CountedAsk:
    """Counts the asks that reached the network."""

    def __init__(self, ask: Ask) -> None:
        self.ask, self.calls = ask, 0

    def __call__(self, noisy: Noisy) -> Visit:
        visit, ran = self.ask(noisy), False

        def counted(rows: Tensor, node: Tensor, fn: RowFunction) -> Any:
            nonlocal ran
            self.calls += not ran
            ran = True
            return visit(rows, node, fn)

        return counted
