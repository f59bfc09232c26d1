"""Order of the theta-trapezoidal sampler: its output distribution is computed exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from joint import JOINT, processes
from torch import Tensor
from torch.nn.functional import one_hot

from ddiff.core.elbo import Network
from ddiff.core.process import ForwardProcess
from ddiff.sampling import tau_leaping, trapezoidal
from ddiff.sampling.grid_sampler import GridSampler
from ddiff.sampling.loop import Canvas
from ddiff.sampling.tau_leaping import TauLeapingSampler
from ddiff.sampling.trapezoidal import TrapezoidalSampler
from ddiff.testing.sampler_distribution import ExactNetwork

TILT = torch.tensor([[1.2, 0.8, 0.95], [0.85, 1.2, 1.0], [1.0, 0.95, 1.0]], dtype=torch.float64)
MILD = (
    torch.outer(torch.tensor([0.3, 0.4, 0.3]).double(), torch.tensor([0.35, 0.25, 0.4]).double())
    * TILT
)
MILD /= MILD.sum()
"""Joint distribution in which no conditional probability of a token is below half of its marginal.

No extrapolated rate is therefore negative.
"""


class ZeroRng:
    """Random generator that returns zeros, for steps that do not use their uniforms."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        return torch.zeros(self.batch, 2, count, dtype=torch.float64)


def leap_distributions(
    sampler: GridSampler,
    process: ForwardProcess,
    network: Network,
    start: Tensor,
    middle: Tensor,
    t: float,
    s: float,
) -> list[Tensor]:
    """Return the distributions [n,2,S] from which the leaps of a step draw both positions.

    A step has one tau-leap per stage. It begins in the states `start` [n,2] at time t and ends at
    time s. The first leap is forced to end in the states `middle` [n,2].
    """
    size, dists, now = process.vocabulary.num_states, [], start
    active = process.active(start.reshape(-1))

    def tau_leap(rates: Tensor, zt: Tensor, span: Tensor, u: Tensor) -> Tensor:
        nonlocal now
        stays = torch.exp(-rates.sum(-1) * span)
        moves = rates * ((1.0 - stays) / rates.sum(-1).clamp(min=1e-300)).unsqueeze(-1)
        dist = one_hot(now.reshape(-1), size).double()
        dist[process.active(now.reshape(-1))] = moves.scatter_add(
            -1, zt.unsqueeze(-1), stays.unsqueeze(-1)
        )
        dists.append(dist.reshape(-1, 2, size))
        now = middle
        return middle.reshape(-1)[active] if len(dists) == 1 else zt

    free = torch.ones(start.shape, dtype=torch.bool)
    times = torch.full(start.shape, t, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for module in (trapezoidal, tau_leaping):
            patch.setattr(module, "tau_leap", tau_leap)
        canvas = Canvas(start, times, ~free, free)
        sampler.move(process, network, canvas, torch.full_like(times, s), ZeroRng(len(start)))  # type: ignore[arg-type]
    return dists


def both(dist: Tensor) -> Tensor:
    """Return the joint distributions [n,S*S] of two independent positions, from `dist` [n,2,S]."""
    return torch.einsum("ca,cb->cab", dist[:, 0], dist[:, 1]).flatten(1)


def distance(sampler: GridSampler, process: ForwardProcess, joint: Tensor) -> float:
    """Return the total variation distance of the exact distribution of samples to `joint`."""
    size, network, prior = (
        process.vocabulary.num_states,
        ExactNetwork(process, joint),
        process.prior.log_prob.exp(),
    )
    canvases = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    dist, times = torch.outer(prior, prior).reshape(-1), sampler.grid.times()
    for t, s in itertools.pairwise(times[:-1]):
        start = canvases[dist > 0]
        first = both(leap_distributions(sampler, process, network, start, start, t, s)[0])
        source, middle = (first > 0).nonzero(as_tuple=True)
        dists = leap_distributions(sampler, process, network, start[source], canvases[middle], t, s)
        weight = dist[dist > 0][source] * first[source, middle]
        dist = weight @ both(dists[1]) if len(dists) > 1 else dist[dist > 0] @ first
    start, last = (
        canvases[dist > 0],
        torch.full((2 * int((dist > 0).sum()),), times[-2], dtype=torch.float64),
    )
    log_p: list[Tensor] = []
    query = network(Canvas(start, last.reshape(-1, 2), start < 0, start >= 0).network_input())
    query(
        torch.arange(len(last)),
        start.reshape(-1),
        lambda prediction: log_p.append(prediction.log_mass(0)),
    )
    drawn = process.reverse_log_probs(
        log_p[0], start.reshape(-1), last, torch.zeros_like(last)
    ).exp()
    final = (dist[dist > 0] @ both(drawn.reshape(-1, 2, size))).reshape(size, size)
    final[:3, :3] -= joint
    return 0.5 * float(final.abs().sum())


@pytest.mark.parametrize(("name", "least"), [("uniform", 3.6), ("masked", 3.3)])
def test_trapezoidal_sampler_is_second_order_if_rates_stay_positive(
    name: str, least: float
) -> None:
    """Twice as many steps divide the distance by four (measured: 3.8).

    For masks and N steps, the error is proportional to ln N / N^2, so the factor is 3.2 to 3.5. A
    method of first order has the factor 2.
    """
    process = processes()[name]
    few, many = (distance(TrapezoidalSampler(n), process, MILD) for n in (12, 24))
    assert few / many > least
    assert few / many < 4.2
    euler = [distance(TauLeapingSampler(n), process, MILD) for n in (12, 24)]
    assert 1.8 < euler[0] / euler[1] < 2.2
    assert many < 0.1 * euler[1]


def test_trapezoidal_sampler_is_second_order_if_a_step_has_two_jumps() -> None:
    """Twice as many steps divide the distance by 3.5, although a position may jump twice in a step.

    The two tokens are independent, and one token is likely. A faulty implementation that subtracts
    the rates of the state before the first jump from those after the jump has the factor 2.2,
    because the differences are then clipped at 0.
    """
    common = torch.tensor([0.9, 0.06, 0.04], dtype=torch.float64)
    few, many = (
        distance(TrapezoidalSampler(n), processes()["uniform"], torch.outer(common, common))
        for n in (16, 32)
    )
    assert few / many > 3.1


def test_trapezoidal_sampler_is_second_order_for_any_theta() -> None:
    process = processes()["uniform"]
    few, many = (distance(TrapezoidalSampler(n, theta=0.4), process, MILD) for n in (12, 24))
    assert few / many > 3.4


def test_trapezoidal_error_is_far_below_tau_leaping_for_dependent_tokens() -> None:
    """In JOINT, a token can make the other token six times less likely.

    Extrapolated rates are then clipped at 0, which adds an error of first order.
    """
    process = processes()["masked"]
    few, many = (distance(TrapezoidalSampler(n), process, JOINT) for n in (16, 32))
    assert few / many < 2.7
    assert many < 0.25 * distance(TauLeapingSampler(32), process, JOINT)
