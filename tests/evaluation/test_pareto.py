"""Laws of fronts and of the comparison at one entropy, against definitions by brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddiff.errors import ArgumentError
from ddiff.evaluation.pareto import (
    Curve,
    Tradeoff,
    choose_entropy,
    dominates,
    find_front,
    trace_front,
)
from ddiff.runs.pareto_table import mark_front

# few different values, so that many points are equal in one figure or in all
FEW = st.integers(min_value=1, max_value=4).map(float)
POINTS = st.lists(st.builds(Tradeoff, FEW, FEW, FEW), max_size=12)
# on a busy machine, drawing examples may be slow
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

REAL = st.floats(min_value=0.1, max_value=100.0)
SPREAD = st.lists(st.builds(Tradeoff, REAL, REAL, REAL), max_size=12)


def make_record(length: int, perplexity: float) -> Any:
    """Record of one point with entropy 4 and 8 network evaluations."""
    point = SimpleNamespace(
        perplexity=SimpleNamespace(value=perplexity), entropy=SimpleNamespace(value=4.0), nfe=8.0
    )
    protocol = {"length": length, "unit": "token", "tokenizer": "bpe"}
    return SimpleNamespace(protocol=protocol, points=[point])


def test_front_compares_only_points_whose_entropies_are_comparable() -> None:
    short, better, long = make_record(64, 90.0), make_record(64, 80.0), make_record(128, 70.0)
    assert mark_front([short, better, long]) == [[False], [True], [True]]


def is_worse(point: Tradeoff, other: Tradeoff) -> bool:
    """Definition of domination, written with the differences of the figures."""
    gains = [
        point.perplexity - other.perplexity,
        other.entropy - point.entropy,
        point.nfe - other.nfe,
    ]
    return min(gains) >= 0.0 and max(gains) > 0.0


def front_by_definition(points: Sequence[Tradeoff]) -> list[bool]:
    return [not any(is_worse(point, other) for other in points) for point in points]


@PATIENT
@given(st.one_of(POINTS, SPREAD))
def test_front_equals_the_front_by_definition(points: list[Tradeoff]) -> None:
    assert find_front(points) == front_by_definition(points)


@PATIENT
@given(POINTS.filter(len), st.randoms())
def test_front_does_not_depend_on_the_order_of_points(points: list[Tradeoff], random) -> None:
    order = list(range(len(points)))
    random.shuffle(order)
    marks = find_front([points[number] for number in order])
    assert [marks[order.index(number)] for number in range(len(points))] == find_front(points)


@PATIENT
@given(POINTS.filter(len))
def test_front_dominates_every_other_point_and_is_not_empty(points: list[Tradeoff]) -> None:
    front = [point for point, is_best in zip(points, find_front(points)) if is_best]
    assert front
    for point in points:
        assert point in front or any(dominates(best, point) for best in front)


def test_equal_points_do_not_dominate_each_other() -> None:
    point = Tradeoff(10.0, 4.0, 8.0)
    worse = Tradeoff(10.0, 4.0, 9.0)
    assert not dominates(point, point)
    assert find_front([point, worse, point]) == [True, False, True]


def test_front_of_hand_made_points() -> None:
    points = [
        Tradeoff(50.0, 4.0, 64.0),  # best perplexity
        Tradeoff(80.0, 4.2, 64.0),  # best entropy
        Tradeoff(90.0, 4.1, 8.0),  # cheapest
        Tradeoff(90.0, 4.1, 16.0),  # as good as the cheapest, but dearer
        Tradeoff(60.0, 3.9, 64.0),  # worse than the first in both
    ]
    assert find_front(points) == [True, True, True, False, False]
    # without the cost, the second point dominates the cheapest
    assert trace_front(points) == [points[0], points[1]]


@PATIENT
@given(st.one_of(POINTS, SPREAD))
def test_traced_front_is_the_front_without_cost_and_rises(points: list[Tradeoff]) -> None:
    traced = trace_front(points)
    free = [Tradeoff(point.perplexity, point.entropy, 0.0) for point in points]
    marks = front_by_definition(free)
    expected = [point for point, is_best in zip(points, marks) if is_best]
    assert sorted(map(repr, traced)) == sorted(map(repr, expected))
    for first, second in itertools.pairwise(traced):
        assert first.entropy <= second.entropy
        assert first.perplexity <= second.perplexity


# ---------------------------------------------------------------------- one entropy


def test_curve_interpolates_log_perplexity_and_nfe() -> None:
    curve = Curve([Tradeoff(160.0, 4.4, 30.0), Tradeoff(10.0, 4.0, 10.0)])
    found = curve.at(4.1)
    assert found is not None
    # a quarter of the way from 10 to 160 in the logarithm: 10 * 16^(1/4) = 20
    assert found.perplexity == pytest.approx(20.0)
    assert found.nfe == pytest.approx(15.0)
    assert curve.at(3.99) is None
    assert curve.at(4.41) is None


@PATIENT
@given(SPREAD.filter(len), st.floats(min_value=0.0, max_value=1.0))
def test_curve_stays_between_its_lowest_and_highest_perplexity(
    points: list[Tradeoff], share: float
) -> None:
    curve = Curve(points)
    low, high = curve.limits
    found = curve.at(min(high, low + share * (high - low)))
    assert found is not None
    perplexities = [point.perplexity for point in points]
    # rounding of the logarithm and the exponential
    assert min(perplexities) * (1 - 1e-9) <= found.perplexity <= max(perplexities) * (1 + 1e-9)


@PATIENT
@given(SPREAD.filter(len))
def test_curve_passes_through_its_points(points: list[Tradeoff]) -> None:
    for point in points:
        found = Curve(points).at(point.entropy)
        assert found is not None
        same = [other.perplexity for other in points if other.entropy == point.entropy]
        assert found.perplexity == min(same)


CURVES = st.lists(st.builds(Curve, POINTS.filter(len)), min_size=1, max_size=6)


@PATIENT
@given(CURVES, st.floats(min_value=0.0, max_value=5.0))
def test_chosen_entropy_is_reached_by_most_curves_and_is_closest(
    curves: list[Curve], reference: float
) -> None:
    def reached(entropy: float) -> int:
        return sum(curve.at(entropy) is not None for curve in curves)

    chosen = choose_entropy(curves, reference)
    # limits are integers, so that no entropy between two entries of this list is better
    tried = [number / 4 for number in range(0, 21)] + [reference]
    most = max(map(reached, tried))
    assert reached(chosen) == most
    best = min(abs(entropy - reference) for entropy in tried if reached(entropy) == most)
    assert abs(chosen - reference) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(
    "figures", [(0.0, 4.0, 1.0), (math.nan, 4.0, 1.0), (9.0, math.inf, 1.0), (9.0, 4.0, math.nan)]
)
def test_tradeoff_refuses_numbers_that_cannot_be_compared(figures: tuple[float, ...]) -> None:
    with pytest.raises(ArgumentError, match="positive"):
        Tradeoff(*figures)


def test_empty_curves_are_refused() -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        Curve([])
    with pytest.raises(ArgumentError, match="at least one"):
        choose_entropy([], 4.0)
