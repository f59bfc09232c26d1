"""Left-to-right sampler of autoregressive models, one token per network call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    Canvas,
    CleanDistribution,
    ComponentConfig,
    CounterRng,
    ForwardProcess,
    Network,
    NonNegativeFloat,
    PositiveInt,
    Probability,
    Query,
    Sampler,
    Share,
    Vocabulary,
    shape_sampler,
    step_rows,
)


@final
class LeftToRightSampler(Sampler):
    """Exact sampler that draws the tokens in order, each from P(x_i | x_<i).

    There is one network call per position, except for positions with a prompt token in every
    sequence of the batch. With a cache of keys and values, a call runs the backbone only on the
    current position. Prompt tokens are kept, but a drawn token does not depend on prompt tokens to
    its right.
    """

    quality: Literal["exact", "of an order", "heuristic"] = "exact"
    cached = True
    looks_ahead = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def check_supported(self, process: ForwardProcess | None, predicts: str) -> None:
        if process is not None:
            raise ArgumentError(
                "LeftToRightSampler: the model must predict the next token and be trained without "
                f"a process; got a model that was trained to reverse {type(process).__name__}. "
                'Use sampler = "ancestral" or "blockwise".'
            )

    def run(self, process: Any, network: Network, canvas: Canvas, rng_at: Any) -> Iterator[Canvas]:
        place = torch.arange(canvas.zt.shape[1], device=canvas.zt.device)
        # One uniform per position, drawn at once: a token does not depend on its batch.
        rng: CounterRng = rng_at(1)
        u = rng.uniform("word").reshape(-1)
        free = canvas.free
        # Every position is a block, so that it attends only to earlier positions.
        canvas = replace(canvas, block=place.unsqueeze(0))

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            root = torch.full_like(rows, self.vocabulary.root)
            numbers = torch.arange(len(rows), device=rows.device)
            return query(numbers, root, _draw_token, root, u[rows])

        for position in place.tolist():
            here = free & (place == position)
            # Given tokens cost no call, for example a prompt that all samples share.
            if not bool(here.any()):
                continue
            canvas = replace(canvas, free=here)
            canvas = canvas.advance(step_rows(network, canvas, draw), torch.zeros_like(canvas.t))
            canvas = replace(canvas, clean=canvas.clean | here)
            yield canvas


def _draw_token(dist: CleanDistribution, root: Tensor, u: Tensor) -> Tensor:
    return dist.draw(root, torch.zeros_like(root), u)


@final
class LeftToRight:
    """Exact left-to-right sampling, one network call per token; `steps` has no effect."""

    states: frozenset[str] = frozenset()  # for models without a process

    class Config(ComponentConfig):
        """Temperature and filters of the distribution of the next token; off by default."""

        temperature: NonNegativeFloat = 1.0
        """Draw from p^(1/temperature), normalized; 0 is greedy."""
        top_k: PositiveInt | None = None
        """Draw only from the k most likely tokens."""
        top_p: Share = 1.0
        """Draw only from the most likely tokens with this total probability."""
        min_p: Probability = 0.0
        """Draw only from tokens whose probability is at least this fraction of the largest."""

    @staticmethod
    def build(config: Config, *, vocabulary: Vocabulary) -> Sampler:
        sampler = LeftToRightSampler(vocabulary)
        return shape_sampler(sampler, config.temperature, config.top_k, config.top_p, config.min_p)
