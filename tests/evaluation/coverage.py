"""Coverage of confidence intervals: repeated evaluations of a bound with a known value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tables import Known, constant, full_rows
from torch import Tensor

from ddiff.core.elbo import Likelihood
from ddiff.core.process import ForwardProcess
from ddiff.core.times import FlatTimes
from ddiff.evaluation.likelihood import evaluate
from ddiff.evaluation.ratio import RatioEstimate

LENGTH = 32
DOCUMENTS = 24
ROWS = 2  # of a document


class Recorded(Known):
    """Objective that records the nats of every row in the order of evaluation."""

    def __init__(self, process: ForwardProcess, prediction: Tensor) -> None:
        super().__init__(process, constant(prediction))
        self.nats: list[Tensor] = []

    def nll(self, *arguments: object) -> Likelihood:  # type: ignore[override]
        likelihood = super().nll(*arguments)  # type: ignore[arg-type]
        self.nats.append(sum(likelihood.terms.values()).sum(-1))  # type: ignore[union-attr]
        return likelihood


class Repeats(NamedTuple):
    """Results of repeated evaluations.

    Attributes:
        bounds: estimated bound [runs].
        covers: whether the confidence interval contains the true value [runs].
        below: whether the whole interval is below the true value [runs].
        truth: true value of the bound.
    """

    bounds: np.ndarray
    covers: np.ndarray
    below: np.ndarray
    truth: float


def repeated(
    process: ForwardProcess,
    window: tuple[float, float],
    runs: int,
    prediction: Tensor,
    seed: int = 0,
) -> Repeats:
    """Evaluate the bound on `runs` new texts of independent tokens.

    A text has 24 documents of two rows of 32 tokens. `prediction` [V] is both the distribution of
    the tokens and the prediction of the network, so the expected bound is the entropy. All texts
    are evaluated by a single call of `evaluate`, which evaluates documents independently.
    """
    count = runs * DOCUMENTS * ROWS
    generator = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(
        prediction, count * LENGTH, replacement=True, generator=generator
    ).reshape(count, LENGTH)
    objective = Recorded(process, prediction)
    document = np.arange(count) // ROWS
    evaluate(
        objective,
        full_rows(ids),
        document,
        length=LENGTH,
        times=FlatTimes(*window),
        seed=seed,
        batch=256,
    )
    nats = torch.cat(objective.nats).numpy().reshape(runs, DOCUMENTS, ROWS).sum(-1)
    tokens = np.full(DOCUMENTS, float(ROWS * LENGTH))
    truth = -float((prediction * prediction.log()).sum())
    bounds = np.empty(runs)
    limits = np.empty((runs, 2))
    for run in range(runs):
        estimate = RatioEstimate.of(nats[run, :, None], tokens)
        assert estimate.total is not None
        bounds[run] = estimate.mean
        limits[run] = estimate.total.around(estimate.mean)
    low, high = limits.T
    return Repeats(bounds, (low <= truth) & (truth <= high), high < truth, truth)


def share_that_covers(
    make_interval: Callable[[np.random.Generator], Sequence[float] | None],
    truth: float,
    repeats: int = 2000,
) -> float:
    """Return the share of intervals that contain `truth`, over repeats with seeds 0, 1, 2, ..."""
    covered = 0
    for seed in range(repeats):
        interval = make_interval(np.random.default_rng(seed))
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    return covered / repeats


def zipf(num_tokens: int) -> Tensor:
    weights = 1.0 / torch.arange(1, num_tokens + 1, dtype=torch.float64)
    return weights / weights.sum()
