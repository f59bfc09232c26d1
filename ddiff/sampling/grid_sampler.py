"""Base class of samplers on a grid of times, and functions that samplers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.field import FieldProcess
from ddiff.core.network import Predicts
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.sampling.grid import Grid, Steps
from ddiff.sampling.loop import (
    Canvas,
    Quality,
    RngAt,
    Sampler,
    check_predicts_distribution,
    require_process,
    step_rows,
)

# Largest number of tokens over which alpha is averaged. Tokens of a large vocabulary all have the
# same alpha, so more tokens would only cost time.
MAX_AVERAGED_TOKENS = 512


class GridSampler(Sampler):
    """Base class of samplers that move from t = 1 to t = 0 along a grid of times.

    `grid` is a number of equal steps, or a time grid (see `Steps`), whose times may depend on the
    process. A subclass defines `move`, a step from times t to times s > 0. The
    last step, `finish`, draws each clean token x from its posterior, which is proportional to
    p(x) q_t(z|x), where p is the predicted distribution and z the state at time t. For every
    process of tokens this is the exact reverse transition from t to 0.
    """

    quality: Quality = "of an order"
    order: int = 1
    start: float = 1.0
    """Time at which sampling starts. All times of the grid are multiplied by it."""

    def __init__(self, grid: Steps | int = 64) -> None:
        self.grid: Steps = Grid("uniform", grid) if isinstance(grid, int) else grid

    @property
    def steps(self) -> int:
        return self.grid.steps

    def times(self, process: FieldProcess) -> list[float]:
        """Return the steps + 1 times of the grid for this process, from 1 to 0."""
        return self.grid.times_of(process)

    def check_supported(self, process: Any, predicts: Predicts) -> None:
        require_process(self, process)
        check_predicts_distribution(self, predicts)

    def start_at(self, time: float) -> Self:
        """Return a copy that samples from the time `time` to 0, in as many steps."""
        started = copy(self)
        started.start = time
        return started

    def run(
        self,
        process: Any,
        network: Network,
        canvas: Canvas,
        rng_at: RngAt,
    ) -> Iterator[Canvas]:
        # `move` goes to all times but the first, `start`, at which the canvas starts, and the last,
        # t = 0, to which `finish` goes.
        for k, s in enumerate(self.times(process)[1:-1]):
            times = torch.full_like(canvas.t, self.start * s)
            canvas = self.move(process, network, canvas, times, rng_at(k))
            yield canvas
        yield self.finish(process, network, canvas, rng_at(self.steps - 1))

    @abstractmethod
    def move(
        self,
        process: Any,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        """Move the positions in `canvas.free` from their times t to the times s [B,L].

        0 < s <= t. Returns the new canvas (state of the batch).
        """

    def finish(
        self,
        process: Any,
        network: Network,
        canvas: Canvas,
        rng: CounterRng,
    ) -> Canvas:
        """Draw clean states at all positions that the sampler may change (`canvas.free`).

        The positions may be at different times. Returns the new canvas (state of the batch), at
        t = 0.
        """
        return draw_tokens(process, network, canvas, rng)


def draw_tokens(
    process: ForwardProcess,
    network: Network,
    canvas: Canvas,
    rng: CounterRng,
) -> Canvas:
    """Draw the clean token at every position in `canvas.free`.

    The network is evaluated only at positions whose state does not determine the clean token.
    Returns the new canvas, at t = 0.
    """
    u = draw_uniforms(rng, "last", process.uniforms_per_decode)

    def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return process.decode(query, zt, t, u[rows])

    tokens = step_rows(network, canvas, draw, find_undetermined(process, canvas))
    return canvas.advance(tokens, torch.zeros_like(canvas.t))


def find_undetermined(process: ForwardProcess, canvas: Canvas) -> Tensor:
    """Return a bool [B,L], True at positions whose state does not determine the clean token.

    If the process has no noise at t = 0, these are the positions in active states. An active state
    is one that noise can produce, for example a mask. Any other state is the clean token. If the
    process has noise at t = 0, all positions are undetermined.
    """
    active = process.active(canvas.zt.flatten(0, 1)).reshape(canvas.t.shape)
    return active | (not process.closes_at_clean)


def draw_uniforms(rng: CounterRng, channel: str, count: int) -> Tensor:
    """Draw `count` uniforms for each of the B*L positions; returns [B*L,count].

    `channel` is the name of a random stream of `rng`. Streams with different names are independent.
    """
    return rng.uniform(channel, count).reshape(-1, count)


def compute_alpha(process: ForwardProcess, t: Tensor, zt: Tensor | None = None) -> Tensor:
    """Return alpha_t, the probability that a token is still clean at time t, in the shape of t.

    If the state `zt` of a position is a token x, alpha_t is q_t(x|x). If the state is a mask or a
    node of a tree, or if `zt` is None, alpha_t is the mean of q_t(x|x) over all tokens x. At most
    512 tokens are evaluated, since q_t(x|x) differs between tokens only for a `DenseProcess`, which
    has at most 512 states.
    """
    times, place = torch.unique(t, return_inverse=True)
    tokens = pick_tokens(process.vocabulary.num_tokens, MAX_AVERAGED_TOKENS, t.device)
    alpha = process.stay_probability(
        tokens.repeat(len(times)),
        times.repeat_interleave(len(tokens)),
    )
    mean = alpha.reshape(len(times), -1).mean(-1)[place]
    if zt is None:
        return mean
    is_token = zt < process.vocabulary.num_tokens
    # Other states are replaced by token 0, whose value is not used.
    own = process.stay_probability(torch.where(is_token, zt, 0).reshape(-1), t.reshape(-1))
    return torch.where(is_token, own.reshape(t.shape), mean)


def pick_tokens(num_tokens: int, count: int, device: torch.device) -> Tensor:
    """Return the ids of at most `count` tokens, evenly spread over the vocabulary."""
    if num_tokens <= count:
        return torch.arange(num_tokens, device=device)
    return torch.linspace(0, num_tokens - 1, count, device=device).long()
