"""Word by word from left to right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    MinP,
    Network,
    NonNegativeFloat,
    PositiveInt,
    Probability,
    Query,
    Sampler,
    ShapedSampler,
    Share,
    Temperature,
    TopK,
    TopP,
    Vocabulary,
    step_rows,
)


@final
class LeftToRightSampler:
    """Each position in turn is drawn from P(x_i | x_<i): exact, one network call a position; given words are kept.

    With a cache every call runs one column. What is given after a position does not guide it.
    """

    quality: Literal["exact", "of an order", "heuristic"] = "exact"
    order = 0
    steps: int | None = None
    cached, looks_ahead = True, False

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def needs(self, process: ForwardProcess | None, predicts: str) -> None:
        if process is not None:
            raise ArgumentError(
                f"LeftToRightSampler: a model of the next word is needed, trained without a process; this one was trained "
                f'to undo {type(process).__name__}. Use sampler = "ancestral" or "blockwise".'
            )

    def run(self, process: Any, network: Network, canvas: Canvas, rng_at: Any) -> Iterator[Canvas]:
        place = torch.arange(canvas.zt.shape[1], device=canvas.zt.device)
        rng: CounterRng = rng_at(1)
        u, free = rng.uniform("word").reshape(-1), canvas.free
        canvas = replace(canvas, block=place.unsqueeze(0))

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            root = torch.full_like(rows, self.vocabulary.root)

            def draw_token(dist: CleanDistribution, root: Tensor, u: Tensor) -> Tensor:
                return dist.draw(root, torch.zeros_like(root), u)

            numbers = torch.arange(len(rows), device=rows.device)
            return query(numbers, root, draw_token, root, u[rows])

        for position in place.tolist():
            here = free & (place == position)
            if not bool(here.any()):
                continue
            canvas = replace(canvas, free=here)
            canvas = canvas.moved(step_rows(network, canvas, draw), torch.zeros_like(canvas.t))
            canvas = replace(canvas, clean=canvas.clean | here)
            yield canvas


@final
class LeftToRight:
    """From left to right; as many network calls as there are free positions, whatever `steps` says."""

    class Config(ComponentConfig):
        """What each conditional passes through before it is drawn from; the defaults change nothing."""

        temperature: NonNegativeFloat = 1.0
        """p^(1/temperature); 0 is greedy."""
        top_k: PositiveInt | None = None
        """The k likeliest alone."""
        top_p: Share = 1.0
        """The likeliest that hold this mass together."""
        min_p: Probability = 0.0
        """Those of at least this share of the likeliest one's probability."""

    @staticmethod
    def build(config: Config, *, steps: int, vocabulary: Vocabulary) -> Sampler:
        sampler = LeftToRightSampler(vocabulary)
        shapers: list[Callable[[Tensor], Tensor]] = []
        if config.temperature != 1.0:
            shapers.append(Temperature(config.temperature))
        if config.top_k is not None:
            shapers.append(TopK(config.top_k))
        if config.top_p < 1.0:
            shapers.append(TopP(config.top_p))
        if config.min_p > 0.0:
            shapers.append(MinP(config.min_p))
        return ShapedSampler(sampler, shapers) if shapers else sampler
