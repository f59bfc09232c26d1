"""Base class of samplers on a grid of times, and functions that samplers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.elbo import Network
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

    Every step but the last moves the canvas from time t to time s. The last step draws tokens from
    p(x) q_t(z|x) / q-bar_t(z), where p is the prediction and q-bar_t the marginal under p. This is
    the exact step from t to 0 for every process. `grid` is a number of equal steps, or an object
    with the times.
    """

    quality: Quality = "of an order"
    order: int = 1

    def __init__(self, grid: Steps | int = 64) -> None:
        self.grid: Steps = Grid("uniform", grid) if isinstance(grid, int) else grid

    @property
    def steps(self) -> int:
        return self.grid.steps

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_process(self, process)
        check_predicts_distribution(self, predicts)

    def run(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        rng_at: RngAt,
    ) -> Iterator[Canvas]:
        # `move` goes to all times but the first, t = 1, at which the canvas starts, and the last,
        # t = 0, to which `finish` goes.
        for k, s in enumerate(self.grid.times()[1:-1]):
            canvas = self.move(process, network, canvas, torch.full_like(canvas.t, s), rng_at(k))
            yield canvas
        yield self.finish(process, network, canvas, rng_at(self.steps - 1))

    @abstractmethod
    def move(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        """Move the free positions to the times s [B,L], 0 < s <= t, and return the canvas."""

    def finish(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        rng: CounterRng,
    ) -> Canvas:
        """Draw tokens at every free position, and return the canvas.

        Positions may be at different times t [B,L].
        """
        return draw_tokens(process, network, canvas, rng)


def draw_tokens(
    process: ForwardProcess,
    network: Network,
    canvas: Canvas,
    rng: CounterRng,
) -> Canvas:
    """Draw the clean token at every free position whose state does not determine it."""
    u = draw_uniforms(rng, "last", process.uniforms_per_decode)

    def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return process.decode(query, zt, t, u[rows])

    tokens = step_rows(network, canvas, draw, find_undetermined(process, canvas))
    return canvas.advance(tokens, torch.zeros_like(canvas.t))


def find_undetermined(process: ForwardProcess, canvas: Canvas) -> Tensor:
    """Return [B,L] bool, True at positions whose state does not determine the clean token.

    If the process has no noise at t = 0, these are the active states, such as masks. A state that
    is not active cannot be the result of noise, and is therefore the clean token. If the process
    has noise at t = 0, all positions are undetermined.
    """
    return process.active(canvas.zt) | (not process.closes_at_clean)


def draw_uniforms(rng: CounterRng, channel: str, count: int) -> Tensor:
    """Draw `count` uniforms for each of the B*L positions, [B*L,count].

    `channel` names the use of the numbers; different channels are independent.
    """
    return rng.uniform(channel, count).reshape(-1, count)


def compute_alpha(process: ForwardProcess, t: Tensor, zt: Tensor | None = None) -> Tensor:
    """Return alpha_t = q_t(x | x), the probability that a token is still clean, in the shape of t.

    If the state zt of a position is a token x, alpha_t is q_t(x | x) of that token. At other states
    (masks, nodes of a tree), or without zt, alpha_t is the mean over at most 512 tokens. Only dense
    chains have tokens with different rates, and their vocabularies are smaller than that.
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
    """Return at most `count` tokens, evenly spread over the vocabulary."""
    if num_tokens <= count:
        return torch.arange(num_tokens, device=device)
    return torch.linspace(0, num_tokens - 1, count, device=device).long()
