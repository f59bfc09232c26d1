"""Fronts of generated samples: perplexity under a judge, entropy and network evaluations.

Samples are better if the judge finds them more probable (lower perplexity), if they are more
diverse (higher entropy), and if they are cheaper (lower NFE, the number of network evaluations per
sample). A point p dominates a point q if

    perplexity(p) <= perplexity(q),    entropy(p) >= entropy(q),    NFE(p) <= NFE(q),

and at least one of the three relations is strict. The front is the set of points that no other
point dominates. Equal points do not dominate each other, so the front contains all or none of them.

This module imports neither torch nor numpy, so that a report of runs can use it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddiff.errors import ArgumentError


@dataclass(frozen=True)
class Tradeoff:
    """Quality, diversity and cost of samples.

    Attributes:
        perplexity: perplexity under a judge, > 0.
        entropy: unigram entropy of a sample in nats, averaged over samples.
        nfe: network evaluations per sample.

    Raises ArgumentError if a number is not finite or the perplexity is not positive.
    """

    perplexity: float
    entropy: float
    nfe: float

    def __post_init__(self) -> None:
        numbers = (self.perplexity, self.entropy, self.nfe)
        if not all(map(math.isfinite, numbers)) or self.perplexity <= 0.0:
            raise ArgumentError(
                "Tradeoff: perplexity must be a positive number, and entropy and nfe must be "
                f"finite numbers; got {self}. Leave out points without these figures."
            )


def dominates(first: Tradeoff, second: Tradeoff) -> bool:
    """Return whether `first` is at least as good in all three figures, and better in one."""
    is_as_good = (
        first.perplexity <= second.perplexity
        and first.entropy >= second.entropy
        and first.nfe <= second.nfe
    )
    return is_as_good and first != second


def find_front(points: Sequence[Tradeoff]) -> list[bool]:
    """Return for each point whether no other point dominates it."""

    def order(number: int) -> tuple[float, float, float]:
        point = points[number]
        return point.perplexity, -point.entropy, point.nfe

    on_front = [False] * len(points)
    front: list[Tradeoff] = []
    # In this order a point can only be dominated by points before it. One of the points that
    # dominate it is on the front, because domination is transitive.
    for number in sorted(range(len(points)), key=order):
        point = points[number]
        if not any(dominates(better, point) for better in front):
            front.append(point)
            on_front[number] = True
    return on_front


def trace_front(points: Sequence[Tradeoff]) -> list[Tradeoff]:
    """Return the front of perplexity and entropy at any cost, by rising entropy.

    Along the result, the perplexity rises with the entropy.
    """
    free = [replace(point, nfe=0.0) for point in points]
    chosen = [point for point, is_best in zip(points, find_front(free)) if is_best]
    return sorted(chosen, key=lambda point: (point.entropy, point.nfe))


@dataclass(frozen=True)
class Curve:
    """Points of one sampler with one number of steps, at several temperatures.

    Between two neighbours in entropy, the logarithm of the perplexity and the NFE are interpolated
    linearly.

    Attributes:
        points: at least one point.
    """

    points: Sequence[Tradeoff]

    def __post_init__(self) -> None:
        if not self.points:
            raise ArgumentError("Curve: points must contain at least one point; got none.")

    @property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest entropy of the curve."""
        entropies = [point.entropy for point in self.points]
        return min(entropies), max(entropies)

    def at(self, entropy: float) -> Tradeoff | None:
        """Return the interpolated point at an entropy; None outside of the limits."""
        ordered = sorted(self.points, key=lambda point: (point.entropy, point.perplexity))
        for point in ordered:
            if point.entropy == entropy:
                return point
        for low, high in itertools.pairwise(ordered):
            if low.entropy < entropy < high.entropy:
                return _interpolate(low, high, entropy)
        return None


def _interpolate(low: Tradeoff, high: Tradeoff, entropy: float) -> Tradeoff:
    share = (entropy - low.entropy) / (high.entropy - low.entropy)
    log_low = math.log(low.perplexity)
    log_high = math.log(high.perplexity)
    return Tradeoff(
        perplexity=math.exp((1.0 - share) * log_low + share * log_high),
        entropy=entropy,
        nfe=(1.0 - share) * low.nfe + share * high.nfe,
    )


def choose_entropy(curves: Sequence[Curve], reference: float) -> float:
    """Return the entropy at which the perplexities of curves are compared.

    It is the entropy that lies within the limits of the largest number of curves. Of several such
    entropies it is the one closest to `reference`, the entropy of held-out text.

    Raises ArgumentError if there are no curves.
    """
    if not curves:
        raise ArgumentError("choose_entropy: curves must contain at least one curve; got none.")
    # the set of the best entropies consists of closed intervals, which end at limits of curves
    candidates = {reference}
    for curve in curves:
        candidates.update(curve.limits)

    def count_curves(entropy: float) -> int:
        return sum(curve.limits[0] <= entropy <= curve.limits[1] for curve in curves)

    def rank(entropy: float) -> tuple[int, float, float]:
        return -count_curves(entropy), abs(entropy - reference), entropy

    return min(candidates, key=rank)
