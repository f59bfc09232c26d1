"""First-hitting sampler: changes one position at a time, at random times (arXiv 2409.02908)."""

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
# Largest number of entries of transition matrices that are computed to find the interval. It
# limits memory and time.
MAX_ENTRIES = 2**16
# Halvings of an interval of logit times; 48 reach the resolution of float64.
BISECTIONS = 48


@final
class FirstHittingSampler(Sampler):
    """Exact sampler that changes one position at a time, at random times.

    An event is a change of state at one position in continuous time. A candidate is a time at which
    a position may change. A step of the sampler has three parts:

    1. Draw a candidate for every position (`process.event_time`), without the network.
    2. Move each sequence to the latest time among its candidates.
    3. Draw the new state of this position with the network (`process.event`). It may be the old
       state if the rate of events depends on the network.

    Candidates of other positions are discarded, which is exact since their times have no memory.
    With masks there is one network evaluation per position. The process must support events
    (`process.has_events`).

    If tokens may turn into other tokens (uniform noise), candidates become very frequent near t = 0
    and t = 1, and most of them change nothing. Tokens therefore change all at once at both ends:
    from t = 1 to a time t_1 in one ancestral step, and from a time t_0 to t = 0 in the final
    decoding step. Tokens that change at once are drawn independently, with an error in total
    variation of at most until^2/2 at each end. Masks and trees have no such error.

    Args:
        until: average number of positions of a sequence that change at each end. This number
            determines t_1 and t_0: of L positions, a fraction until/L is still clean at t_1, and a
            fraction until/L is noise at t_0. The default gives a total error of at most 1e-6.

    The earliest t_0 is 1e-12. If t_0 would have to be earlier, more positions change at once near
    t = 0. Sampling raises ArgumentError if their average number is above 0.05 and above `until`; an
    average of 0.05 gives an error of at most 0.00125.
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
            # The host waits here for the device, because the loop ends when no sequence of the
            # batch has another event.
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
        """Move positions with tokens from t = 1 to the time `begin` in one ancestral step.

        Other states, such as masks, are not changed.
        """
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
        """Move every sequence to the time of its next candidate event, without changing a state.

        At a candidate event, the state of one position may change. Tokens have no candidate events
        at times below `finish`. Returns two values:

        - the canvas (state of the batch) at the new times,
        - a bool [B,L] that marks the position of the candidate event in each sequence that has one.
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
        """Draw new states at the positions that `has_event` [B,L] marks."""
        u = draw_uniforms(rng, "event", process.uniforms_per_event)

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return process.event(query, zt, t, u[rows])

        return canvas.advance(step_rows(network, canvas, draw, has_event), canvas.t)


def find_event_interval(process: ForwardProcess, until: float, length: int) -> tuple[float, float]:
    """Return the times (t_1, t_0), t_1 > t_0, between which tokens change one event at a time.

    Of the `length` positions of a sequence, on average at most `until` change between t = 1 and
    t_1, and at most `until` between t_0 and t = 0. If this would need a t_0 below EARLIEST = 1e-12,
    t_0 is EARLIEST. If tokens never turn into other tokens, the result is (1 - 1e-12, 1e-12).

    Raises ArgumentError if on average more than max(`until`, 0.05) positions would change below
    EARLIEST.
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
    """Find by bisection the largest y in [low, high] for which holds(y) is true.

    holds(y) must be true up to some y and false for larger y. Returns `low` if it is false for
    every y in the interval.
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
    """Return two probabilities of noise at time t, for a token that is clean at time 0.

    - the probability that the token has become another token,
    - the probability that the token has become any other state.

    The tokens that `_example_rows` selects are compared. Each returned probability is the largest
    among these tokens.
    """
    tokens, times = _example_rows(process, t)
    moved = process.transition(torch.zeros_like(times), times).row(tokens)
    moved = moved.scatter(-1, tokens.unsqueeze(-1), 0.0)
    to_token = moved[:, : process.vocabulary.num_tokens].sum(-1)
    return float(to_token.max()), float(moved.sum(-1).max())


def _clean_fraction(process: ForwardProcess, t: float) -> float:
    """Return 1 - sum_z min_x q_t(z|x), the fraction of tokens that are still clean at time t.

    This is the part of the marginal q_t(.|x) that depends on the clean token x. It is alpha if
    q_t(.|x) = alpha delta_x + (1 - alpha) noise, with the same noise distribution for every x. The
    minimum is over the tokens x that `_example_rows` selects.
    """
    tokens, times = _example_rows(process, t)
    return 1.0 - float(process.from_clean(times).row(tokens).amin(0).sum())


def _example_rows(process: ForwardProcess, t: float) -> tuple[Tensor, Tensor]:
    """Return some tokens [r], evenly spread over the vocabulary, and a tensor [r] filled with t."""
    vocabulary = process.vocabulary
    rows = max(2, MAX_ENTRIES // vocabulary.num_states)
    tokens = pick_tokens(vocabulary.num_tokens, rows, torch.device("cpu"))
    return tokens, torch.full(tokens.shape, t, dtype=torch.float64)
