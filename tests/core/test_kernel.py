"""Structured kernels equal dense matrices; `propagate` equals a Runge-Kutta method."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import forward_step, trees
from torch import Tensor

from ddiff.core.clock import CdfClock
from ddiff.core.kernel import (
    DenseKernel,
    InterpolatingKernel,
    Kernel,
)
from ddiff.core.oracle import propagate
from ddiff.core.schedule import PowerSchedule
from ddiff.core.tree_kernel import TreeKernel
from ddiff.core.tree_parents import StochasticParents
from ddiff.core.vocabulary import HierarchicalVocabulary

EXACT = {"rtol": 0.0, "atol": 1e-13}  # sums of a dozen terms of size 1
ROWS, STATES = 3, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def diagonal(values: Tensor, size: int = STATES) -> Tensor:
    return values[:, None, None] * torch.eye(size, dtype=torch.float64)


def parents_one_by_one(tree: HierarchicalVocabulary, xi: tuple[float, ...]) -> Tensor:
    """Return the matrix [S,S] of P(ancestor | node) for all pairs of levels.

    It is the product of one-level matrices. xi[l] is the probability that a node of level l moves
    to its true parent.
    """
    size = tree.num_states
    kappa = torch.eye(size, dtype=torch.float64)
    up = torch.zeros(size, size, dtype=torch.float64)
    for node in range(size - 1):
        right = forward_step(tree, node)[1]
        level = int(tree.level_of(torch.tensor(right)))
        nodes = range(tree.offsets[level], tree.offsets[level] + tree.level_sizes[level])
        sure = 1.0 if len(nodes) == 1 else xi[level - 1]
        for other in nodes:
            up[node, other] = sure if other == right else (1.0 - sure) / (len(nodes) - 1)
    power = kappa
    for _ in range(tree.num_levels):
        power = power @ up
        kappa = kappa + power
    return kappa


def tree_case(seed: int = 5) -> tuple[Kernel, Tensor]:
    tree = HierarchicalVocabulary([[2, 0, 1, 0, 1, 2], [1, 0, 1]])
    xi = (0.8, 0.3, 1.0)
    levels = random(ROWS, 4, 4, seed=seed).triu()
    level_of = tree.level_of(torch.arange(tree.num_states))
    between = levels[:, level_of][:, :, level_of]
    return TreeKernel(levels, StochasticParents(tree, xi)), between * parents_one_by_one(tree, xi)


def cases() -> dict[str, tuple[Kernel, Tensor]]:
    """Return pairs of a structured kernel and the same kernel as a dense matrix, by name."""
    stay, leave, arrive, full = (
        random(ROWS),
        random(ROWS, seed=1),
        random(ROWS, STATES, seed=2),
        random(ROWS, 5, 5, seed=3),
    )
    mixed = diagonal(stay) + arrive.unsqueeze(1)
    return {
        "dense": (DenseKernel(full), full),
        "interpolating": (InterpolatingKernel(stay, arrive), mixed),
        "sum": (DenseKernel(full) + InterpolatingKernel(stay, arrive), full + mixed),
        "multiple": (leave * InterpolatingKernel(stay, arrive), leave[:, None, None] * mixed),
        "tree": tree_case(),
    }


@pytest.mark.parametrize("name", cases())
def test_structured_transition_kernel_equals_its_dense_matrix(name: str) -> None:
    kernel, matrix = cases()[name]
    states, rows = matrix.shape[-1], torch.arange(ROWS)
    assert kernel.num_states == states
    torch.testing.assert_close(kernel.dense(), matrix, **EXACT)
    for shift in range(states):
        ids = (rows + shift) % states
        torch.testing.assert_close(kernel.row(ids), matrix[rows, ids], **EXACT)
        torch.testing.assert_close(kernel.column(ids), matrix[rows, :, ids], **EXACT)
    vector = random(ROWS, states, seed=4)
    before = vector.clone()
    torch.testing.assert_close(
        kernel.apply(vector), torch.einsum("ry,ryz->rz", vector, matrix), **EXACT
    )
    assert torch.equal(vector, before)


@pytest.mark.parametrize("name", cases())
def test_transition_kernel_apply_keeps_dtype_of_the_vector(name: str) -> None:
    kernel, _ = cases()[name]
    assert kernel.apply(torch.rand(ROWS, kernel.num_states)).dtype == torch.float32


@given(trees(), st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4))
@settings(deadline=None, max_examples=25)
def test_stochastic_parents_matrix_is_product_of_one_level_matrices(
    tree: HierarchicalVocabulary, xi: list[float]
) -> None:
    parents = StochasticParents(tree, xi[: tree.num_levels])
    expected = parents_one_by_one(tree, tuple(xi))
    kernel = TreeKernel(
        torch.ones(1, tree.num_levels + 1, tree.num_levels + 1, dtype=torch.float64).triu(), parents
    )
    torch.testing.assert_close(kernel.dense()[0], expected, **EXACT)


# ---------------------------------------------------------------------- the oracle


def turning(t: Tensor) -> Tensor:
    """Return the generators (1 - t) A + 5 t^2 B [n,4,4] at times t [n].

    Generators of different times do not commute.
    """
    early, late = (random(4, 4, seed=seed) for seed in (6, 7))
    early, late = (m - m.sum(-1).diag() for m in (early, late))
    return (1.0 - t)[:, None, None] * early + (5.0 * t * t)[:, None, None] * late


def runge_kutta(s: float, t: float, steps: int = 400) -> Tensor:
    """Return the transition matrix from s to t of the generator `turning`.

    dP/dt = P Q_t is solved by the classical Runge-Kutta method; 400 steps have an error below 1e-9.
    """
    total, h = torch.eye(4, dtype=torch.float64), (t - s) / steps
    rate = lambda time: turning(torch.tensor([time], dtype=torch.float64))[0]  # noqa: E731
    for step in range(steps):
        at = s + step * h
        first = total @ rate(at)
        second = (total + h / 2 * first) @ rate(at + h / 2)
        third = (total + h / 2 * second) @ rate(at + h / 2)
        fourth = (total + h * third) @ rate(at + h)
        total = total + h / 6 * (first + 2 * second + 2 * third + fourth)
    return total


def pair(s: float, t: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([s], dtype=torch.float64), torch.tensor([t], dtype=torch.float64)


def test_propagate_solves_forward_equation_in_time_order() -> None:
    expected = runge_kutta(0.1, 0.9)
    got = propagate(turning, *pair(0.1, 0.9), 4)[0]
    torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-8)
    early, late = (
        propagate(turning, *pair(0.1, 0.5), 4)[0],
        propagate(turning, *pair(0.5, 0.9), 4)[0],
    )
    torch.testing.assert_close(early @ late, got, rtol=0.0, atol=1e-8)
    assert float((late @ early - got).abs().max()) > 1e-2  # the order of the factors matters
    generators = turning(torch.tensor([0.3, 0.7], dtype=torch.float64))
    assert float((generators[0] @ generators[1] - generators[1] @ generators[0]).abs().max()) > 1e-1


def test_propagate_error_falls_with_fourth_power_of_number_of_steps() -> None:
    """Twice as many steps divide the error by 16, or by 4 if the commutator term is wrong."""
    best = propagate(turning, *pair(0.1, 0.9), 4, steps=640)
    errors = [
        float((propagate(turning, *pair(0.1, 0.9), 4, steps=n) - best).abs().max())
        for n in (10, 20, 40)
    ]
    assert errors[0] < 1e-4
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(16.0, rel=0.15)


def test_single_matrix_exponential_is_wrong_if_generators_do_not_commute() -> None:
    """The exponential of the integrated generator is exact only if generators commute."""
    grid = torch.linspace(0.1, 0.9, 2001, dtype=torch.float64)
    once = torch.matrix_exp(torch.trapezoid(turning(grid), grid, dim=0))
    assert float((once - propagate(turning, *pair(0.1, 0.9), 4)[0]).abs().max()) > 1e-3


def test_propagate_agrees_with_closed_form_level_probabilities_of_a_clock() -> None:
    """The level probabilities at s times the transition from s to t are those at t.

    The rates of the clock diverge at t = 0 and at t = 1.
    """
    clock = CdfClock([PowerSchedule(0.8), PowerSchedule(1.5), PowerSchedule(3.0)])
    t = torch.tensor([0.01, 0.4, 0.99], dtype=torch.float64)
    start = torch.full_like(t, 1e-3)
    moved = propagate(clock.generator, start, t, 4, steps=400)
    reached = (clock.pi(start).unsqueeze(1) @ moved).squeeze(1)
    torch.testing.assert_close(reached, clock.pi(t), rtol=0.0, atol=1e-9)


def test_propagate_over_no_time_is_the_identity_for_each_row() -> None:
    s = torch.tensor([0.3, 0.0, 1.0, 0.2], dtype=torch.float64)
    t = torch.tensor([0.3, 0.0, 1.0, 0.8], dtype=torch.float64)
    moved = propagate(turning, s, t, 4)
    for row in range(3):
        assert torch.equal(moved[row], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(moved[3:], propagate(turning, s[3:], t[3:], 4), **EXACT)
