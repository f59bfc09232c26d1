"""Choice of the path of level occupancies on which a trained tree has the smallest bound.

The diffusion term of the bound is the line integral of a field c_1..c_L along the path of the level
clock (`ddiff.core.level_terms`). Three kinds of error keep a search from a good path, and each is
treated in another way:

- A measured field is noisy, and the smallest of many sums of noisy numbers is too small. The field
  is therefore fitted by polynomials of a low degree, which have far fewer coefficients than the
  lattice has steps.
- The degree is chosen on documents that did not determine the path: the documents are divided into
  two halves, the path is found on the one half and integrated on the other, and vice versa
  (`choose_path`).
- The result is compared with other clocks on further documents, by the bound itself
  (`compare_nats`).

Both the field and the bounds are estimated relative to a fixed prediction, that of the token
frequencies, whose bound is known (`ddiff.core.fixed_prediction`). This changes no mean and removes
most of the noise: which tokens are drawn at a level, and how many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddiff.core.elbo import Likelihood, Network, nelbo
from ddiff.core.fixed_prediction import make_fixed_network
from ddiff.core.level_paths import PolynomialField, find_path, fit_field, integrate_field
from ddiff.core.level_terms import draw_level_terms, find_time
from ddiff.core.rng import CounterRng
from ddiff.core.times import TimeRule
from ddiff.core.tree import TreeProcess
from ddiff.errors import NonFiniteError
from ddiff.evaluation.likelihood import Scored
from ddiff.evaluation.likelihood_sums import DocumentSums, Rows
from ddiff.evaluation.ratio import RatioEstimate
from ddiff.progress import Progress

DEGREES = (1, 2, 3)
"""Degrees of the polynomials among which `choose_path` chooses."""


@dataclass(frozen=True)
class MeasuredField:
    """Sums of divergences at P points of the occupancies, by document and level.

    Attributes:
        points: [P,L] occupancies F_1..F_L.
        nats: [P,D,L] sums of the divergences at the positions of each level in D documents.
        reference: [P,D,L] the same for the fixed prediction, at the same states.
        positions: [P,D,L] numbers of these positions.
    """

    points: Tensor
    nats: Tensor
    reference: Tensor
    positions: Tensor

    def select(self, documents: slice) -> MeasuredField:
        """Return the field of some of the documents."""
        return MeasuredField(
            self.points,
            self.nats[:, documents],
            self.reference[:, documents],
            self.positions[:, documents],
        )

    def differences(self) -> Tensor:
        """Return the estimates of c_1..c_L minus those of the fixed prediction, [P,L].

        An estimate is the ratio of two sums. The ratio has no noise from the random number of
        positions at a level, and a bias proportional to the inverse of this number.
        """
        excess = (self.nats - self.reference).sum(1)
        # Without positions the estimate is 0, with the weight 0 in `fit`.
        return excess / self.positions.sum(1).clamp(min=1.0)

    def means(self) -> Tensor:
        """Return the estimates of c_1..c_L at the points, [P,L].

        The field of the fixed prediction is equal at all points, and is estimated from all.
        """
        fixed = self.reference.sum((0, 1)) / self.positions.sum((0, 1))
        return self.differences() + fixed

    def standard_errors(self) -> Tensor:
        """Return the standard errors of `differences` over documents, [P,L]."""
        residual = self.nats - self.reference - self.differences().unsqueeze(1) * self.positions
        count = residual.shape[1]
        variance = (residual**2).sum(1) * count / max(1, count - 1)
        return variance.sqrt() / self.positions.sum(1).clamp(min=1.0)

    def fit(self, degree: int) -> PolynomialField:
        """Fit polynomials of a degree, weighted by the numbers of positions."""
        return fit_field(self.points, self.means(), self.positions.sum(1), degree)


def measure_field(
    process: TreeProcess,
    network_of: Callable[[Any], Network],
    batch_of: Callable[[Rows], Any],
    document: NDArray[np.int64],
    points: Tensor,
    *,
    log_p: Tensor,
    length: int,
    draws: int,
    batch: int,
    seed: int,
    bar: Progress,
) -> MeasuredField:
    """Measure the field at given occupancies, with equal uniforms at all points.

    Args:
        process: tree of the run; its clock gives the times of a network that depends on time.
        network_of: function that maps a batch to the network with the context of the batch.
        batch_of: function that maps row indices [B] to the batch of these rows.
        document: array [R] with the index of the document of each row.
        points: [P,L] occupancies F_1..F_L.
        log_p: [V] log-probabilities of the fixed prediction.
        length: number of positions per row.
        draws: number of independent draws of states per row and point.
        batch: number of rows per batch.
        seed: seed of the draws.
        bar: progress, advanced by one for each row, point and draw.
    """
    names, index = np.unique(document, return_inverse=True)
    size = (len(points), len(names), points.shape[1])
    nats = torch.zeros(size, dtype=torch.float64)
    reference = torch.zeros(size, dtype=torch.float64)
    positions = torch.zeros(size, dtype=torch.float64)
    fixed = make_fixed_network(log_p, process.vocabulary)
    times = [find_time(process.clock, float(point.mean())) for point in points]
    for start in range(0, len(index), batch):
        rows = np.arange(start, min(start + batch, len(index)))
        found = batch_of(rows)
        network = network_of(found)
        place = torch.from_numpy(index[rows])
        for draw in range(draws):
            rng = CounterRng(seed, draw, found.index, length, "occupancy")
            for number, point in enumerate(points):
                drawn = (found.ids, found.scored, point, times[number], rng)
                terms = draw_level_terms(process, network, *drawn)
                fixed_terms = draw_level_terms(process, fixed, *drawn)
                nats[number].index_add_(0, place, terms.nats.cpu())
                reference[number].index_add_(0, place, fixed_terms.nats.cpu())
                positions[number].index_add_(0, place, terms.positions.cpu())
                bar.advance(len(rows))
    return MeasuredField(points, nats, reference, positions)


class ReferencedObjective:
    """Objective whose drawn bounds have less noise, with the same expectation.

    The drawn bound of a fixed prediction p is subtracted from that of the network, and its
    expectation -ln p(x) is added.

    Args:
        objective: objective of the network.
        process: process of the objective.
        log_p: [V] log-probabilities of the fixed prediction.
    """

    bound = "NELBO"

    def __init__(self, objective: Scored, process: TreeProcess, log_p: Tensor) -> None:
        self.times = objective.times
        self._objective = objective
        self._process = process
        self._log_p = log_p
        self._fixed = make_fixed_network(log_p, process.vocabulary)

    def nll(
        self, batch: Any, rng: CounterRng, slot: Tensor, slots: Tensor, times: TimeRule
    ) -> Likelihood:
        found = self._objective.nll(batch, rng, slot, slots, times)
        drawn = nelbo(self._process, self._fixed, batch.ids, batch.scored, times, rng, slot, slots)
        terms = dict(found.terms)
        for name, value in drawn.by_name().items():
            terms[f"fixed {name}"] = -value
        terms["fixed"] = torch.where(batch.scored, -self._log_p[batch.ids], 0.0)
        return Likelihood(terms, {})


@dataclass(frozen=True)
class ChosenPath:
    """Path that `choose_path` found.

    Attributes:
        path: [n,L] points of the path; None if no found path is better than the reference on
            documents that did not determine it.
        degree: degree of the polynomials.
        gains: degree -> nats per token by which a found path is below the reference path, on
            documents that did not determine it.
        fitted_gain: the same for `path` on the documents that determined it; too large, because
            the search exploits noise. 0 without a path.
    """

    path: Tensor | None
    degree: int
    gains: Mapping[int, float]
    fitted_gain: float


def choose_path(measured: MeasuredField, reference: Tensor, cells: int) -> ChosenPath:
    """Find the path with the smallest integral of a measured field.

    For each degree, the path is found on every other document and compared with the `reference`
    path [n,L] on the remaining documents, and vice versa. The degree with the largest mean gain is
    chosen, and the path is found again on all documents. `cells`: parts of [0,1] on the lattice.

    Raises NonFiniteError if a measured sum is NaN or infinite.
    """
    # Comparisons with NaN are false, so the search would return an arbitrary path.
    if not bool(measured.nats.isfinite().all()):
        point = int((~measured.nats.isfinite()).any(-1).any(-1).nonzero()[0])
        raise NonFiniteError(
            "choose_path: the nats of `measured` must be finite; got NaN or infinity at the "
            f"occupancies {measured.points[point].tolist()}: the network assigns probability zero "
            "to a token. The weights have probably diverged. Go back to an earlier checkpoint."
        )
    halves = (measured.select(slice(0, None, 2)), measured.select(slice(1, None, 2)))
    num_levels = measured.points.shape[1]
    # A polynomial of low degree may be biased, so gains are measured with the highest degree.
    judges = [half.fit(max(DEGREES)) for half in halves]
    gains = {}
    for degree in DEGREES:
        total = 0.0
        for half, judge in zip(halves, reversed(judges), strict=True):
            path = find_path(half.fit(degree), num_levels, cells)
            total += integrate_field(judge, reference) - integrate_field(judge, path)
        gains[degree] = total / len(halves)
    degree = max(gains, key=gains.__getitem__)
    if gains[degree] <= 0.0:
        return ChosenPath(None, degree, gains, 0.0)
    field = measured.fit(degree)
    path = find_path(field, num_levels, cells)
    fitted = integrate_field(field, reference) - integrate_field(field, path)
    return ChosenPath(path, degree, gains, fitted)


def compare_nats(first: DocumentSums, second: DocumentSums) -> RatioEstimate:
    """Return the bound of the first clock minus that of the second, paired by document.

    The clocks may have different numbers of draws, whose mean is compared.
    """
    differences = first.nats.mean(-1) - second.nats.mean(-1)
    return RatioEstimate.of(differences[:, np.newaxis], first.tokens)


def split_documents(document: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
    """Return the indices of the rows of every other document, and those of the other rows.

    `document` [R] is the number of the document of each row.
    """
    _, index = np.unique(document, return_inverse=True)
    return [np.flatnonzero(index % 2 == half) for half in range(2)]
