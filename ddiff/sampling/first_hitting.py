"""First-hitting sampler: go from event to event in continuous time (arXiv 2409.02908)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts
from ddiff.core.numerics import EARLIEST, LATEST
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.ancestral import reverse_step
from ddiff.sampling.grid_sampler import draw_tokens, draw_uniforms, pick_tokens
from ddiff.sampling.loop import (
    Canvas,
    Quality,
    RngAt,
    Sampler,
    check_predicts_distribution,
    require_process,
    step_rows,
)

# Largest mean number of positions of a sequence that are drawn at once near t = 0. The error in
# total variation is then at most 0.05^2/2.
MAX_DRAWN_AT_ONCE = 0.05
# Entries of transition rows that are computed to find the interval; limits memory and time.
MAX_ENTRIES = 2**16
# Halvings of an interval of logit times; 48 reach the resolution of float64.
BISECTIONS = 48


@final
class FirstHittingSampler(Sampler):
    """Exact sampler that moves each sequence from one candidate event to the next.

    An event is a change of state at one position in continuous time. A candidate event is a time at
    which a position may change. `process.event_time` draws candidate times without the network, and
    `process.event` draws the new state with the network. If the rate of events depends on the
    network, `process.event` rejects some candidates. After each event, new candidates are drawn for
    all positions, which does not change the distribution, because candidate times have no memory.
    With masks the number of network evaluations is the number of positions. The process must
    support events (`process.has_events`).

    With uniform noise (tokens turn into other tokens), candidates come at rates of about 1/t and
    1/(1 - t), and most are rejected. So all tokens move together at both ends of time: from t = 1
    to a time t_1 in one ancestral step, and from a time t_0 to 0 in the final decoding step.
    `until` is the average number of positions that change at each end. It determines t_1 and t_0:
    in a sequence of L positions, a fraction until/L of the tokens is still clean at t_1, and a
    fraction until/L is noise at t_0. Positions that change together are drawn independently. The
    error in total variation is at most until^2/2 at each end. By default (until = 1e-3) the two
    errors add up to at most 1e-6. Masks and trees have no such error.

    Times before 1e-12 are not evaluated. If more than a fraction until/L of the tokens is noise
    already at t = 1e-12, t_0 is 1e-12. In this case, sampling raises ArgumentError if on average
    more than 0.05 positions (and more than `until`) would change in the decoding step, with an
    error of up to 0.00125.
    """

    quality: Quality = "exact"
    order: int = 0

    def __init__(self, until: float = 1e-3) -> None:
        if not 0.0 < until < 0.5:
            raise ArgumentError(
                f"FirstHittingSampler: until must be in (0, 1/2); got {until}. It is the average "
                "number of positions of a sequence that are drawn at once at each end of time; "
                "the error is until^2 / 2."
            )
        self.until = until

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_process(self, process)
        check_predicts_distribution(self, predicts)
        if process is not None and not process.has_events:
            raise ArgumentError(
                f"FirstHittingSampler: process must have events; {type(process).__name__} has "
                "none, because no bound on its reverse rates is independent of the network. "
                "Use a sampler with steps, such as ancestral or tau_leaping."
            )

    def run(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        rng_at: RngAt,
    ) -> Iterator[Canvas]:
        begin, finish = find_event_interval(process, self.until, canvas.zt.shape[1])
        canvas = self._move_tokens(process, network, canvas, begin, rng_at(0))
        for k in count():
            canvas, has_event = self._go_to_events(process, canvas, finish, rng_at(k))
            # A synchronization: the loop ends when no sequence of the batch has another event.
            if not bool(has_event.any()):
                break
            canvas = self._draw_events(process, network, canvas, has_event, rng_at(k))
            yield canvas
        # Uniforms of step 0, not of step k: k depends on the slowest sequence of the batch, and a
        # sample must not depend on its batch.
        yield draw_tokens(process, network, canvas, rng_at(0))

    def _move_tokens(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        begin: float,
        rng: CounterRng,
    ) -> Canvas:
        """Move all tokens from t = 1 to `begin` in one ancestral step."""
        tokens = canvas.free & (canvas.zt < process.vocabulary.num_tokens)
        s = canvas.t.clamp(max=begin)
        moved = reverse_step(process, network, replace(canvas, free=tokens), s, rng, "first")
        return replace(moved, free=canvas.free)

    def _go_to_events(
        self,
        process: ForwardProcess,
        canvas: Canvas,
        finish: float,
        rng: CounterRng,
    ) -> tuple[Canvas, Tensor]:
        """Move every sequence to its next candidate event.

        Tokens have no events before time `finish`. Returns the canvas, and a bool [B,L] that marks
        the position of each event.
        """
        is_token = canvas.zt < process.vocabulary.num_tokens
        u = draw_uniforms(rng, "when", 1)[:, 0]
        time = process.event_time(canvas.zt.reshape(-1), canvas.t.reshape(-1), u)
        time = time.reshape(canvas.t.shape)
        time = torch.where(canvas.free & (~is_token | (time > finish)), time, 0.0)
        latest, position = time.max(-1, keepdim=True)
        has_event = torch.zeros_like(canvas.free).scatter(-1, position, latest > 0)
        # Tokens stop at `finish`. Other states, such as masks, have events down to EARLIEST.
        end = torch.full_like(canvas.t, EARLIEST).masked_fill(is_token, finish)
        s = torch.minimum(canvas.t, torch.maximum(latest, end))
        return canvas.advance(canvas.zt, s), has_event

    def _draw_events(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        has_event: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        """Draw the new states of the positions that have an event."""
        u = draw_uniforms(rng, "event", process.uniforms_per_event)

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return process.event(query, zt, t, u[rows])

        return canvas.advance(step_rows(network, canvas, draw, has_event), canvas.t)


def find_event_interval(process: ForwardProcess, until: float, length: int) -> tuple[float, float]:
    """Return the times (t_1, t_0), t_1 > t_0, between which tokens change one event at a time.

    Of the `length` positions, on average at most `until` change between t = 1 and t_1, and at most
    `until` between t_0 and t = 0, if both times are interior. If tokens never turn into other
    tokens, the result is (LATEST, EARLIEST). Raises ArgumentError if more than max(`until`, 0.05)
    positions would change below EARLIEST = 1e-12.
    """
    to_token, _ = _noise_probabilities(process, 0.5)
    if to_token == 0.0:  # no token turns into another token
        return LATEST, EARLIEST
    fraction = until / length
    low = _logit(EARLIEST)
    high = _logit(LATEST)

    def is_almost_clean(y: float) -> bool:
        return _noise_probabilities(process, _sigmoid(y))[1] <= fraction

    def is_partly_clean(y: float) -> bool:
        return _clean_fraction(process, _sigmoid(y)) > fraction

    # Bisection in the logit of t, since both times may be within 1e-12 of an end.
    finish = _find_last(is_almost_clean, low, 0.0)
    begin = _find_last(is_partly_clean, 0.0, high)
    together = length * _noise_probabilities(process, EARLIEST)[1]
    if together > max(until, MAX_DRAWN_AT_ONCE):
        raise ArgumentError(
            f"FirstHittingSampler: on average {together:.2g} of {length} positions are noise at "
            f"t = {EARLIEST}, the earliest time that is evaluated. These positions would be drawn "
            f"at once, with an error of up to {together**2 / 2:.2g}. Use a process with less "
            "noise near t = 0 (with parameters gamma and p_uniform: a larger gamma or a smaller "
            "p_uniform), "
            "a shorter sequence, or a sampler with steps, such as ancestral."
        )
    return _sigmoid(begin), _sigmoid(finish)


def _find_last(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return the largest y in [low, high] with holds(y), or `low` if holds(y) is never true.

    `holds` must be true up to some y and false for larger y. The search is a bisection.
    """
    if holds(high):
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _logit(t: float) -> float:
    return float(torch.logit(torch.tensor(t, dtype=torch.float64)))


def _sigmoid(y: float) -> float:
    return float(torch.sigmoid(torch.tensor(y, dtype=torch.float64)).clamp(EARLIEST, LATEST))


def _noise_probabilities(process: ForwardProcess, t: float) -> tuple[float, float]:
    """Return the probabilities that a clean token has become another token, or any other state.

    Both are probabilities at time t, and maxima over the tokens of `_example_rows`.
    """
    tokens, times = _example_rows(process, t)
    moved = process.transition(torch.zeros_like(times), times).row(tokens)
    moved = moved.scatter(-1, tokens.unsqueeze(-1), 0.0)
    to_token = moved[:, : process.vocabulary.num_tokens].sum(-1)
    return float(to_token.max()), float(moved.sum(-1).max())


def _clean_fraction(process: ForwardProcess, t: float) -> float:
    """Return the fraction of tokens that are still clean at t: 1 - sum_z min_x q_t(z|x).

    This is the part of q_t(.|x) that depends on x, and equals alpha_t if the distribution of the
    noise does not depend on x.
    """
    tokens, times = _example_rows(process, t)
    return 1.0 - float(process.from_clean(times).row(tokens).amin(0).sum())


def _example_rows(process: ForwardProcess, t: float) -> tuple[Tensor, Tensor]:
    """Return tokens [r], evenly spread over the vocabulary, and the time t [r] for each token."""
    vocabulary = process.vocabulary
    rows = max(2, MAX_ENTRIES // vocabulary.num_states)
    tokens = pick_tokens(vocabulary.num_tokens, rows, torch.device("cpu"))
    return tokens, torch.full(tokens.shape, t, dtype=torch.float64)
