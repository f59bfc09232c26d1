"""The event-driven sampler: time runs to the next event, and the network is asked only then (arXiv 2409.02908)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.numerics import EARLIEST, LATEST
from ddiff.core.process import ForwardProcess
from ddiff.errors import ArgumentError
from ddiff.sampling.ancestral import reverse_step
from ddiff.sampling.grid_sampler import draw_tokens, draw_uniforms, pick_tokens
from ddiff.sampling.loop import (
    Canvas,
    Predicts,
    Quality,
    RngAt,
    Sampler,
    require_distribution,
    require_process,
    step_rows,
)

MOST_AT_ONCE = 0.05  # positions of a sequence: an error of at most 0.00125 in total variation
READ = 2**16  # entries of a kernel's rows that are held to find the ends


@final
class FirstHittingSampler(Sampler):
    """Each sequence jumps to the latest candidate event of its positions, where that position alone draws. Exact.

    Candidates come from `process.event_time` without the network (thinned by `process.event` where the rate depends on
    it); a new one is drawn for every position after each event, which is the same chain since candidates have no memory.
    Masks: as many network calls as there are positions. Needs a process with events.

    Where tokens are noise, their candidates come at about 1/t and 1/(1 - t), most of them for nothing. So at both ends all
    tokens move at once: first in one ancestral step to a time t_1, and from a time t_0 on in the last draw. Of L positions
    `until` change there, on average: t_0 is where a share until/L of tokens is noise, t_1 where a share until/L of a token
    is left. Positions that change together do so independently, which is an error of at most until^2 / 2 at each end in
    total variation: 1e-6 together by default. Masks and trees, whose tokens are not noise, have none.

    Noise that sets in very early, as a low power of t, may exceed until/L at the earliest time that is read, 1e-12. Then
    t_0 is that time. The sampler is refused where more than 0.05 positions would change from there on: an error of 0.00125.
    """

    quality: Quality = "exact"
    order: int = 0

    def __init__(self, until: float = 1e-3) -> None:
        self.until = _checked(until)

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_process(self, process)
        require_distribution(self, predicts)
        if process is not None and not process.has_events:
            raise ArgumentError(
                f"FirstHittingSampler: process must have events; {type(process).__name__} bounds its reverse rate by "
                "nothing that is free of the network. Use a sampler with steps, such as ancestral or tau_leaping."
            )

    def run(
        self, process: ForwardProcess, network: Network, canvas: Canvas, rng_at: RngAt
    ) -> Iterator[Canvas]:
        begin, finish = between(process, self.until, canvas.zt.shape[1])
        words = replace(canvas, free=canvas.free & (canvas.zt < process.vocabulary.num_tokens))
        begun = reverse_step(process, network, words, canvas.t.clamp(max=begin), rng_at(0), "first")
        canvas = replace(begun, free=canvas.free)
        for k in count():
            is_word = canvas.zt < process.vocabulary.num_tokens
            u = draw_uniforms(rng_at(k), "when", 1)[:, 0]
            when = process.event_time(canvas.zt.reshape(-1), canvas.t.reshape(-1), u).reshape(
                canvas.t.shape
            )
            when = torch.where(canvas.free & (~is_word | (when > finish)), when, 0.0)
            latest, place = when.max(-1, keepdim=True)
            happens = torch.zeros_like(canvas.free).scatter(-1, place, latest > 0)
            # candidates of other states are read down to EARLIEST
            end = torch.full_like(canvas.t, EARLIEST).masked_fill(is_word, finish)
            canvas = canvas.advance(canvas.zt, torch.minimum(canvas.t, torch.maximum(latest, end)))
            if not bool(happens.any()):
                break
            u = draw_uniforms(rng_at(k), "event", process.uniforms_per_event)
            draw = lambda query, zt, t, rows: process.event(query, zt, t, u[rows])  # noqa: B023, E731
            canvas = canvas.advance(step_rows(network, canvas, draw, happens), canvas.t)
            yield canvas
        yield draw_tokens(
            process, network, canvas, rng_at(0)
        )  # not of step k, at which the slowest of the batch ended


def _checked(until: float) -> float:
    if not 0.0 < until < 0.5:
        raise ArgumentError(
            f"FirstHittingSampler: until must be in (0, 1/2); got {until}. It is the number of positions of a sequence "
            "that change at once at either end of time; the error is until^2 / 2."
        )
    return until


def between(process: ForwardProcess, until: float, length: int) -> tuple[float, float]:
    """The times (t_1, t_0) between which events of tokens are followed one by one; ArgumentError where t_0 is too early.

    Beyond them `until` of `length` positions change, on average.
    """
    if _noise(process, 0.5)[0] == 0.0:  # no token is noise
        return LATEST, EARLIEST
    share = until / length
    low, high = (
        float(torch.logit(torch.tensor(t, dtype=torch.float64))) for t in (EARLIEST, LATEST)
    )
    finish = _last(lambda y: _noise(process, _time(y))[1] <= share, low, 0.0)
    begin = _last(lambda y: _left(process, _time(y)) > share, 0.0, high)
    together = length * _noise(process, EARLIEST)[1]
    if together > max(until, MOST_AT_ONCE):
        raise ArgumentError(
            f"FirstHittingSampler: of {length} positions {together:.2g} are noise already at the earliest time that is "
            f"read, t = {EARLIEST}, and all of them would be drawn at once, an error of up to {together**2 / 2:.2g}. Use a "
            "process whose noise sets in later or is less (of a hump of uniform noise a larger gamma, a smaller "
            "p_uniform), a shorter sequence, or a sampler with steps, such as ancestral."
        )
    return _time(begin), _time(finish)


def _last(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest y in [low, high] where a claim that ceases to hold once still holds; low where it never does."""
    if holds(high):
        return high
    for _ in range(48):
        middle = (low + high) / 2.0
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _time(y: float) -> float:
    return float(torch.sigmoid(torch.tensor(y, dtype=torch.float64)).clamp(EARLIEST, LATEST))


def _noise(process: ForwardProcess, t: float) -> tuple[float, float]:
    """The largest probability that a token is another token at t, and that it is another state, counted from t = 0."""
    tokens, now = _some_rows(process, t)
    moved = process.transition(torch.zeros_like(now), now).row(tokens)
    moved = moved.scatter(-1, tokens.unsqueeze(-1), 0.0)
    among = moved[:, : process.vocabulary.num_tokens].sum(-1)
    return float(among.max()), float(moved.sum(-1).max())


def _left(process: ForwardProcess, t: float) -> float:
    """What is left of a token at t: the part of q_t(.|x) that depends on x, alpha_t where noise does not."""
    tokens, now = _some_rows(process, t)
    return 1.0 - float(process.from_clean(now).row(tokens).amin(0).sum())


def _some_rows(process: ForwardProcess, t: float) -> tuple[Tensor, Tensor]:
    """Tokens whose rows are read, two at least, and the time for each."""
    vocabulary = process.vocabulary
    tokens = pick_tokens(
        vocabulary.num_tokens, max(2, READ // vocabulary.num_states), torch.device("cpu")
    )
    return tokens, torch.full(tokens.shape, t, dtype=torch.float64)
