"""What all samplers on a grid share: the walk from t = 1 to t = 0 and the last draw."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.sampling.grid import Grid, Steps
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

SAMPLED = 512  # tokens that an average over tokens reads


class GridSampler(Sampler):
    """A rule that moves the canvas from t to s, walked along a grid; the last step draws the words.

    That last draw, x ~ p(x) q_t(z|x) / q_t-bar(z), is the exact step from t to 0 of any process, so nothing is left at the
    states of an approximate step. `grid`: a number of equal steps, or times of one's own.
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
        require_distribution(self, predicts)

    def run(
        self, process: ForwardProcess, network: Network, canvas: Canvas, rng_at: RngAt
    ) -> Iterator[Canvas]:
        for k, s in enumerate(self.grid.times()[1:-1]):
            canvas = self.move(process, network, canvas, torch.full_like(canvas.t, s), rng_at(k))
            yield canvas
        yield self.finish(process, network, canvas, rng_at(self.steps - 1))

    @abstractmethod
    def move(
        self, process: ForwardProcess, network: Network, canvas: Canvas, s: Tensor, rng: CounterRng
    ) -> Canvas:
        """The canvas at times s [B,L], 0 < s <= t."""

    def finish(
        self, process: ForwardProcess, network: Network, canvas: Canvas, rng: CounterRng
    ) -> Canvas:
        """Words at every free position, drawn at its own time."""
        return draw_tokens(process, network, canvas, rng)


def draw_tokens(
    process: ForwardProcess, network: Network, canvas: Canvas, rng: CounterRng
) -> Canvas:
    """The last draw at every free position whose state does not tell its word."""
    u = draw_uniforms(rng, "last", process.uniforms_per_decode)
    draw = lambda query, zt, t, rows: process.decode(query, zt, t, u[rows])  # noqa: E731
    return canvas.advance(
        step_rows(network, canvas, draw, find_undetermined(process, canvas)),
        torch.zeros_like(canvas.t),
    )


def find_undetermined(process: ForwardProcess, canvas: Canvas) -> Tensor:
    """[B,L] bool: positions whose word is not sure. Where a process closes, a state that nothing enters is a word."""
    return process.active(canvas.zt) | (not process.closes_at_clean)


def draw_uniforms(rng: CounterRng, channel: str, count: int) -> Tensor:
    """[B*L, count]."""
    return rng.uniform(channel, count).reshape(-1, count)


def root_of(process: ForwardProcess, zt: Tensor) -> Tensor:
    """[r] the root for every row: where the whole law is read."""
    return torch.full_like(zt, process.vocabulary.root)


def every_row(zt: Tensor) -> Tensor:
    return torch.arange(len(zt), device=zt.device)


def compute_alpha(process: ForwardProcess, t: Tensor, zt: Tensor | None = None) -> Tensor:
    """Like t: alpha_t = q_t(x | x), the probability that a token is still clean, for the tokens among the states zt.

    Where no token stands (masks, nodes of a tree), or without zt, it is the mean over tokens, over 512 of them where there
    are more: only dense chains have tokens of unequal rates, and they have no more states.
    """
    times, place = torch.unique(t, return_inverse=True)
    tokens = pick_tokens(process.vocabulary.num_tokens, SAMPLED, t.device)
    each = process.stay_probability(tokens.repeat(len(times)), times.repeat_interleave(len(tokens)))
    mean = each.reshape(len(times), -1).mean(-1)[place]
    if zt is None:
        return mean
    is_token = zt < process.vocabulary.num_tokens
    own = process.stay_probability(torch.where(is_token, zt, 0).reshape(-1), t.reshape(-1))
    return torch.where(is_token, own.reshape(t.shape), mean)


def pick_tokens(num_tokens: int, count: int, device: torch.device) -> Tensor:
    """At most `count` tokens, evenly spread over the vocabulary, all of them where there are no more."""
    if num_tokens <= count:
        return torch.arange(num_tokens, device=device)
    return torch.linspace(0, num_tokens - 1, count, device=device).long()
