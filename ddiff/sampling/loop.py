"""The one sampling loop: a canvas that a sampler moves, positions that are kept, network calls counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.process import ForwardProcess, Query, RowFunction
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError

Quality = Literal["exact", "of an order", "heuristic"]
Says = Literal["law", "score"]
NoiseAt = Callable[[int], CounterRng]
OnStep = Callable[[int, "Canvas"], None]
Draw = Callable[[Query, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Canvas:
    """Sequences on their way: states zt [B,L], own times t [B,L] float64, and who may still move.

    `clean` [B,L] bool: given or settled, never changed. `free` [B,L] bool: may move now; what is neither waits at the
    prior. `block` [1 or B,L] long says who sees whom (`Noisy`). `notes` are [B,L] tensors that a sampler keeps from step to
    step, by name; `clamped` among them counts probability that was negative and set to 0.
    """

    zt: Tensor
    t: Tensor
    clean: Tensor
    free: Tensor
    block: Tensor | None = None
    notes: Mapping[str, Tensor] = field(default_factory=dict)

    def noisy(self) -> Noisy:
        """What the network is shown: clean positions are clean, at time 0."""
        return Noisy(self.zt, torch.where(self.clean, 0.0, self.t), self.clean, self.block)

    def moved(self, zt: Tensor, s: Tensor, **notes: Tensor) -> Canvas:
        """The canvas with states zt, free positions at time s [B,L]."""
        return replace(
            self, zt=zt, t=torch.where(self.free, s, self.t), notes={**self.notes, **notes}
        )


class Sampler(Protocol):
    """A way from noise to text; `quality` says what it is when the network is right.

    "exact": the law of the samples is the network's own, whatever the steps. "of an order": it tends to it as
    1/steps^order. "heuristic": it does not, or nobody has shown that it does. Two things a sampler may say beside:
    `cached = True`, settled positions see nothing that comes later; `looks_ahead = False`, see `looks_ahead`.
    """

    quality: Quality
    order: int  # 0 where there is none

    @property
    def steps(self) -> int | None:
        """How many canvases `run` yields; None where that depends on the draws or on the length."""

    def needs(self, process: ForwardProcess | None, predicts: Says) -> None:
        """Raises ArgumentError with the reason where this sampler makes no sense for a process or for what is answered."""

    def run(
        self, process: Any, network: Network, canvas: Canvas, rng_at: NoiseAt
    ) -> Iterator[Canvas]:
        """The canvas after each step; the last one holds words at free positions. Step k draws from `rng_at(k)`."""


def looks_ahead(sampler: Sampler) -> bool:
    """Whether words given after a gap guide what is drawn into it: all samplers but those from left to right.

    Those keep such words, bit for bit, and draw the gap as if they were not there: `looks_ahead = False` is theirs to say.
    """
    return bool(getattr(sampler, "looks_ahead", True))


@dataclass(frozen=True)
class Samples:
    """ids [B,L] words; `nfe`, network calls over the batch; runs [B] those in which a sequence took part; clamped [B].

    `clamped` is the probability that came out negative, in states per position, and was set to 0 (scores only).
    """

    ids: Tensor
    nfe: int
    runs: Tensor
    clamped: Tensor

    def __repr__(self) -> str:
        count, length = self.ids.shape
        return f"Samples({count} sequences of {length} tokens; {self.nfe} network evaluations)"


def generate(
    sampler: Sampler,
    process: ForwardProcess | None,
    network: Network,
    *,
    index: Tensor,
    length: int,
    seed: int,
    given: Tensor | None = None,
    clamped: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Samples:
    """Draw one sequence per entry of `index` [B] (the samples' numbers: a sample does not depend on its batch).

    `given` [B,L] words with `clamped` [B,L] bool, any positions of each row, are kept bit for bit. `on_step(k, canvas)`
    sees every canvas, k = 1, 2, ... Raises ArgumentError when they do not fit, or the sampler not the process.
    """
    sampler.needs(process, getattr(network, "predicts", "law"))
    rng_at = lambda step: CounterRng(seed, step, index, length, "sample")  # noqa: E731
    counted, batch = counting(network), len(index)
    calls, runs = counted.calls, runs_of(counted, batch)
    start = _first_canvas(process, rng_at(0), index, length, given, clamped)
    canvas = start
    for step, canvas in enumerate(sampler.run(process, counted, start, rng_at), start=1):
        if on_step:
            on_step(step, canvas)
    lost = canvas.notes.get("clamped", torch.zeros_like(canvas.t))
    return Samples(canvas.zt, counted.calls - calls, runs_of(counted, batch) - runs, lost.sum(-1))


def step_rows(network: Network, canvas: Canvas, draw: Draw, among: Tensor | None = None) -> Tensor:
    """[B,L] states after `draw(visit, zt[r], t[r], rows[r])` over the free positions, or those of `among` [B,L] bool.

    `rows` are flat positions b * L + i. Nobody is asked when there are none.
    """
    chosen = canvas.free if among is None else canvas.free & among
    rows = chosen.reshape(-1).nonzero().squeeze(-1)
    moved = canvas.zt.reshape(-1).clone()
    if len(rows):
        query = restrict(network(canvas.noisy()), rows)
        moved[rows] = draw(query, moved[rows], canvas.t.reshape(-1)[rows], rows)
    return moved.reshape(canvas.zt.shape)


def restrict(query: Query, rows: Tensor) -> Query:
    """Restrict a query to some rows and renumber them: row k of the result is rows[k] of `query`."""

    def restricted(chosen: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        return query(rows[chosen], node, fn, *per_row)

    return restricted


def need_process(sampler: object, process: ForwardProcess | None) -> None:
    if process is None:
        raise ArgumentError(
            f"{type(sampler).__name__}: process must be a forward process; this run has none. A model without a process is "
            "sampled from left to right."
        )


def need_law(sampler: object, predicts: Says) -> None:
    if predicts != "law":
        raise ArgumentError(
            f"{type(sampler).__name__}: the denoiser must answer with a law of the clean token; this one answers with a "
            "score, from which no token can be drawn. Use tau_leaping, analytic or trapezoidal, which read rates."
        )


def _first_canvas(
    process: ForwardProcess | None,
    rng: CounterRng,
    index: Tensor,
    length: int,
    given: Tensor | None,
    clamped: Tensor | None,
) -> Canvas:
    """Prior draws at t = 1 everywhere (word 0 without a process), given words where clamped."""
    shape = (len(index), length)
    times = torch.ones(shape, dtype=torch.float64, device=index.device)
    prior = (
        process.prior.draw(rng.uniform("start"))
        if process
        else torch.zeros_like(times, dtype=torch.long)
    )
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
    kept, num_tokens = given[clamped], process.vocabulary.num_tokens if process else 2**62
    if bool(((kept < 0) | (kept >= num_tokens)).any()):
        raise ArgumentError(
            f"generate: clamped positions of given must hold words, ids 0..{num_tokens - 1}; got ids from "
            f"{int(kept.min())} to {int(kept.max())}. Clamp only where there is a word."
        )
    return Canvas(
        torch.where(clamped, given, prior), torch.where(clamped, 0.0, times), clamped, ~clamped
    )


class CountedNetwork:
    """Counts the asks that reached a network which does not count for itself: over the batch, and per sequence."""

    def __init__(self, network: Network) -> None:
        self.network, self.calls, self.runs = network, 0, torch.zeros(0, dtype=torch.long)

    def __call__(self, noisy: Noisy) -> Query:
        query, (batch, length) = self.network(noisy), noisy.zt.shape
        self.runs = self.runs if len(self.runs) == batch else torch.zeros(batch, dtype=torch.long)
        seen = torch.zeros(batch, dtype=torch.bool)

        def counted(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            asked = torch.zeros_like(seen).index_fill(0, (rows // length).cpu(), True) & ~seen
            self.calls += int(not bool(seen.any()))
            self.runs += asked
            seen.logical_or_(asked)
            return query(rows, node, fn, *per_row)

        return counted


def counting(network: Network) -> Any:
    """An ask with `calls` and `runs` [B]: itself where it has them."""
    return network if hasattr(network, "runs") else CountedNetwork(network)


def runs_of(network: Any, batch: int) -> Tensor:
    """[B] how often each sequence has gone through the network so far."""
    runs: Tensor | None = network.runs
    return (
        runs.clone()
        if runs is not None and len(runs) == batch
        else torch.zeros(batch, dtype=torch.long)
    )
