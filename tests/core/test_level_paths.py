"""Field of the bound of a tree, its integrals along paths, and the search for the best path.

Two tokens depend on each other. The exact field of two tokens is linear in the occupancies, so the
midpoints of straight segments give exact integrals. Tolerances of 1e-10 allow for rounding.
"""

from __future__ import annotations

import pytest
import torch
from exact_level_field import bend, draw_path, list_lattice_paths, make_exact_field
from torch import Tensor

from ddiff.core.clock import CdfClock, LevelClock, LogTimeClock
from ddiff.core.elbo import network_from_table
from ddiff.core.level_paths import (
    choose_points,
    find_path,
    fit_field,
    integrate_field,
    make_diagonal,
    make_path_clock,
    tabulate_path,
)
from ddiff.core.level_terms import draw_level_terms, find_time
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import BernsteinSchedule, PowerSchedule
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import HierarchicalVocabulary
from ddiff.errors import ArgumentError
from ddiff.testing import assert_laws, check_clock, check_schedule
from ddiff.testing.bound import (
    WHOLE,
    Table,
    all_sequences,
    exact_nelbo,
    random_joint,
    rest_conditional_table,
)

PAIR = HierarchicalVocabulary([[0, 1, 0, 2]])
THREE = HierarchicalVocabulary([[2, 0, 1, 0], [1, 0, 1]])
LOG_JOINT = random_joint(4)
ENTROPY = float(-(LOG_JOINT.exp() * LOG_JOINT).sum())
BENT = torch.tensor([1.0, -0.5, 0.5, -1.0], dtype=torch.float64)
TREES = {
    "two levels": TreeProcess(PAIR, LogTimeClock((0.7, 1.0))),
    "two levels, wrong parents": TreeProcess(PAIR, LogTimeClock((0.7, 1.0)), xi=0.8),
    "three levels, wrong parents": TreeProcess(THREE, LogTimeClock((1.0, 0.8, 1.2)), xi=(0.9, 0.8)),
}
processes = pytest.mark.parametrize("process", TREES.values(), ids=TREES)


def exact_table(process: TreeProcess) -> Table:
    return rest_conditional_table(process, LOG_JOINT)


def paths(num_levels: int) -> list[Tensor]:
    """Return the diagonal, the path of one level after the other, and ten random paths."""
    generator = torch.Generator().manual_seed(1)
    lower = torch.tril(torch.ones(num_levels + 1, num_levels, dtype=torch.float64), -1)
    drawn = [draw_path(num_levels, 7, generator) for _ in range(10)]
    return [make_diagonal(num_levels), lower, *drawn]


# ---------------------------------------------------------------------- the field


@processes
def test_bound_of_exact_predictions_is_the_entropy_on_every_path(process: TreeProcess) -> None:
    field = make_exact_field(process, exact_table(process), LOG_JOINT)
    for path in paths(process.clock.num_levels):
        assert 2.0 * integrate_field(field, path) == pytest.approx(ENTROPY, abs=1e-10)


@processes
def test_bound_of_other_predictions_depends_on_the_path(process: TreeProcess) -> None:
    field = make_exact_field(process, bend(exact_table(process), BENT), LOG_JOINT)
    bounds = [2.0 * integrate_field(field, path) for path in paths(process.clock.num_levels)]
    assert min(bounds) > ENTROPY
    assert max(bounds) - min(bounds) > 1e-3


@processes
def test_integral_along_the_path_of_a_clock_is_the_exact_bound(process: TreeProcess) -> None:
    """The segments of 2,000 points and the quadrature of the bound have errors below 1e-5."""
    table = bend(exact_table(process), BENT)
    field = make_exact_field(process, table, LOG_JOINT)
    path = process.clock.cdf(torch.linspace(0.0, 1.0, 2001, dtype=torch.float64))
    bounds = exact_nelbo(process, table, 2, WHOLE).total
    expected = float(LOG_JOINT.exp().reshape(-1) @ bounds)
    assert 2.0 * integrate_field(field, path) == pytest.approx(expected, abs=1e-5)


@processes
def test_drawn_level_terms_estimate_the_exact_field(process: TreeProcess) -> None:
    """20,000 drawn rows; the tolerance is five standard errors of the ratio."""
    num_levels = process.clock.num_levels
    table = bend(exact_table(process), BENT)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.multinomial(LOG_JOINT.exp().reshape(-1), 20_000, True, generator=generator)
    x0 = all_sequences(4, 2)[drawn]
    rng = CounterRng(0, 0, torch.arange(len(x0)), 2)
    point = torch.linspace(0.8, 0.3, num_levels, dtype=torch.float64)
    terms = draw_level_terms(
        process,
        network_from_table(table, process.vocabulary),
        x0,
        torch.ones_like(x0, dtype=torch.bool),
        point,
        0.5,
        rng,
    )
    exact = make_exact_field(process, table, LOG_JOINT)(point.unsqueeze(0))[0]
    found = terms.nats.sum(0) / terms.positions.sum(0)
    residual = terms.nats - found * terms.positions
    error = (residual**2).sum(0).sqrt() / terms.positions.sum(0)
    assert bool(((found - exact).abs() < 5.0 * error).all()), (found, exact, error)


def test_level_terms_leave_positions_that_are_not_scored_clean() -> None:
    process = TREES["two levels"]
    x0 = torch.zeros(3, 2, dtype=torch.long)
    scored = torch.tensor([[True, False], [False, False], [True, True]])
    terms = draw_level_terms(
        process,
        network_from_table(exact_table(process), PAIR),
        x0,
        scored,
        torch.tensor([1.0, 1.0], dtype=torch.float64),
        0.5,
        CounterRng(0, 0, torch.arange(3), 2),
    )
    assert terms.positions.tolist() == [[0.0, 1.0], [0.0, 0.0], [0.0, 2.0]]


# ---------------------------------------------------------------------- the best path


def curved_field(points: Tensor) -> Tensor:
    """Return a field whose integral depends on the path, with c_l = sin(5 l F_1) - F_L^l."""
    level = torch.arange(1, points.shape[1] + 1, dtype=torch.float64)
    return torch.sin(5.0 * level * points[:, :1]) - points[:, -1:] ** level


@pytest.mark.parametrize(("num_levels", "cells"), [(2, 5), (3, 3), (1, 4)])
def test_found_path_is_the_best_of_all_lattice_paths(num_levels: int, cells: int) -> None:
    every = list_lattice_paths(num_levels, cells)
    costs = [integrate_field(curved_field, path) for path in every]
    found = find_path(curved_field, num_levels, cells)
    best = every[costs.index(min(costs))]
    torch.testing.assert_close(found, best, rtol=0.0, atol=1e-12)


@processes
def test_found_path_of_exact_predictions_gains_nothing(process: TreeProcess) -> None:
    field = make_exact_field(process, exact_table(process), LOG_JOINT)
    path = find_path(field, process.clock.num_levels, 5)
    assert 2.0 * integrate_field(field, path) == pytest.approx(ENTROPY, abs=1e-10)


def test_fitted_field_is_the_exact_field_of_two_tokens() -> None:
    """The field of two tokens is linear in the occupancies, so degree 1 is enough."""
    process = TREES["three levels, wrong parents"]
    exact = make_exact_field(process, bend(exact_table(process), BENT), LOG_JOINT)
    points = choose_points(3, 2)
    fitted = fit_field(points, exact(points), torch.ones_like(points), 1)
    elsewhere = torch.tensor([[0.9, 0.2, 0.1], [1.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(fitted(elsewhere), exact(elsewhere), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("num_levels", [2, 3])
def test_measured_points_have_positions_at_every_level(num_levels: int) -> None:
    points = choose_points(num_levels, 4)
    start = torch.ones(len(points), 1, dtype=torch.float64)
    reached = torch.cat([start, points, 0.0 * start], -1)
    assert float((reached[:, :-1] - reached[:, 1:]).min()) > 0.05


# ---------------------------------------------------------------------- clocks of paths


def test_bernstein_schedules_of_polynomials_have_the_kernel_of_the_gamma_clock() -> None:
    """For gamma = 2, F_1 = 2 t - t^2 and F_2 = t^2 are Bernstein polynomials of degree 2."""
    clock = CdfClock([BernsteinSchedule([0.0, 1.0, 1.0]), BernsteinSchedule([0.0, 0.0, 1.0])])
    gamma = LogTimeClock((2.0, 1.0))
    t = torch.tensor([0.0, 0.001, 0.3, 0.9, 1.0], dtype=torch.float64)
    torch.testing.assert_close(clock.pi(t), gamma.pi(t), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(clock.inflow(t), gamma.inflow(t), rtol=1e-9, atol=1e-12)
    s = t / 2.0
    torch.testing.assert_close(clock.transition(s, t), gamma.transition(s, t), rtol=0.0, atol=1e-9)


def test_level_between_two_nearly_equal_schedules_is_accurate_near_the_ends() -> None:
    """pi_1 is 2e-7 t (1 - t). The values of the tables have relative errors of 1e-9 of the gap."""
    clock = CdfClock([BernsteinSchedule([0.0, 0.5, 1.0]), BernsteinSchedule([0.0, 0.4999999, 1.0])])
    u = torch.tensor([1e-12, 1e-9, 1e-6, 1e-3, 0.3], dtype=torch.float64)
    for t, left in ((u, 1.0 - u), (1.0 - u, 1.0 - (1.0 - u))):
        expected = 2e-7 * t * left
        torch.testing.assert_close(clock.pi(t)[:, 1], expected, rtol=1e-6, atol=0.0)
    late = 1.0 - u[:2]
    assert bool(clock.hazard(late).isfinite().all())
    assert bool(clock.transition(torch.full_like(late, 0.5), late).isfinite().all())


def test_bernstein_schedule_is_a_power_for_the_values_of_a_power() -> None:
    assert_laws(check_schedule(BernsteinSchedule([0.0, 0.5, 1.0])))
    t = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
    cubic = BernsteinSchedule([0.0, 0.0, 0.0, 1.0]).one_minus_alpha(t)
    torch.testing.assert_close(cubic, PowerSchedule(3.0).one_minus_alpha(t), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    "values", [[0.0], [0.0, 0.6, 0.5, 1.0], [0.1, 1.0], [0.0, 0.9], [0.0] * 18]
)
def test_bernstein_schedule_rejects_values_that_do_not_rise_from_0_to_1(
    values: list[float],
) -> None:
    with pytest.raises(ArgumentError, match="rise from 0 to 1"):
        BernsteinSchedule(values)


@pytest.mark.parametrize(
    "inside",
    [
        LogTimeClock((1.0, 1.0)),
        LogTimeClock((0.5, 1.0)),
        LogTimeClock((1.0, 1.0, 1.0)),
        LogTimeClock((20.0, 20.0)),
    ],
    ids=["gamma 1", "gamma 0.5", "three levels", "highest rates"],
)
def test_clocks_of_extreme_paths_pass_all_conformance_checks(inside: LevelClock) -> None:
    num_levels = inside.num_levels
    one_by_one = torch.tril(torch.ones(num_levels + 1, num_levels, dtype=torch.float64), -1)
    for path in (make_diagonal(num_levels), one_by_one):
        assert_laws(check_clock(make_path_clock(path, inside, 0.1)))


def test_clock_of_its_own_path_is_near_the_clock() -> None:
    """Bernstein polynomials of degree 16 smooth: their error is about F'' t (1 - t) / 32."""
    gamma = LogTimeClock((1.0, 1.0))
    fine = gamma.cdf(torch.linspace(0.0, 1.0, 1001, dtype=torch.float64))
    clock = make_path_clock(fine, gamma, 0.1)
    t = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)
    torch.testing.assert_close(clock.cdf(t), gamma.cdf(t), rtol=0.0, atol=0.04)


def test_tabulated_points_of_a_path_have_the_given_means() -> None:
    path = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.5, 0.5], [1.0, 1.0]], dtype=torch.float64)
    means = torch.tensor([0.0, 0.1, 0.25, 0.4, 0.8, 1.0], dtype=torch.float64)
    found = tabulate_path(path, means)
    torch.testing.assert_close(found.mean(-1), means)
    torch.testing.assert_close(found[1], torch.tensor([0.2, 0.0], dtype=torch.float64))
    repeated = path.repeat_interleave(2, 0)
    torch.testing.assert_close(tabulate_path(repeated, means), found)


def test_find_time_inverts_the_mean_occupancy_of_a_clock() -> None:
    clock = LogTimeClock((0.7, 1.0))
    t = torch.tensor([0.37], dtype=torch.float64)
    assert find_time(clock, float(clock.cdf(t).mean())) == pytest.approx(0.37, abs=1e-12)
