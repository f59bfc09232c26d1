"""Joint distribution of two tokens, for which the output of samplers is computed exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.components import MixtureProcess
from ddiff.core.dense import DenseProcess
from ddiff.core.elbo import Network, network_from_table
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import LinearSchedule, Schedule
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary

JOINT = torch.tensor(
    [[0.30, 0.02, 0.08], [0.02, 0.20, 0.03], [0.05, 0.05, 0.25]], dtype=torch.float64
)
"""P(x_1, x_2), far from the product of its marginals."""


def processes() -> dict[str, ForwardProcess]:
    """Return processes of every kind on three tokens, by name."""
    bare, rates = (
        FlatVocabulary(3, mask=False),
        torch.tensor([[-3.0, 2.0, 1.0], [0.5, -1.5, 1.0], [1.0, 1.0, -2.0]]),
    )
    return {
        "masked": TreeProcess(FlatVocabulary(3), CdfClock([LinearSchedule()])),
        "tree": TreeProcess(HierarchicalVocabulary([[0, 1, 0]]), LogTimeClock((1.0, 1.0))),
        "uncertain tree": TreeProcess(
            HierarchicalVocabulary([[0, 1, 0]]), LogTimeClock((1.0, 1.0)), xi=0.8
        ),
        "uniform": MixtureProcess(bare, LinearSchedule(), torch.full((3,), 1 / 3)),
        "dense": DenseProcess(bare, rates.double()),
    }


class EarlyNoise(Schedule):
    """Schedule alpha = 0.9 (1 - t): noise remains at t = 0 until the final decoding step."""

    closes_at_clean = False

    def alpha(self, t: Tensor) -> Tensor:
        return 0.9 * (1.0 - t)


def exact_conditionals(process: ForwardProcess) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function (zt [B,2], t [B,2]) -> log-distributions [B,2,3], exact for JOINT.

    The function predicts the distribution of each token given the state of the other position.
    """

    def table(zt: Tensor, t: Tensor) -> Tensor:
        evidence = (
            process.log_likelihood(zt.reshape(-1), t.reshape(-1)).exp().reshape(*zt.shape, -1)
        )
        dists = torch.stack([evidence[:, 1] @ JOINT.T, evidence[:, 0] @ JOINT], 1)
        return (dists / dists.sum(-1, keepdim=True)).log()

    return table


def exact_network(process: ForwardProcess) -> Network:
    return network_from_table(exact_conditionals(process), process.vocabulary)


def distribution_after_steps(process: ForwardProcess, num_steps: int) -> Tensor:
    """Return the exact distribution [S,S] of both positions after `num_steps` ancestral steps.

    The steps have equal length and begin at the prior. Given the states before a step, the two
    positions move independently, by `reverse_log_probs`. The sum is over all pairs of states.
    """
    size = process.vocabulary.num_states
    canvases = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    prior = process.prior.log_prob.exp()
    dist = torch.outer(prior, prior).reshape(-1)
    for k in range(num_steps, 0, -1):
        possible = canvases[dist > 0]
        now, then = (
            torch.full((2 * len(possible),), step / num_steps).double() for step in (k, k - 1)
        )
        log_p = exact_conditionals(process)(possible, now.reshape(-1, 2)).reshape(-1, 3)
        step = (
            process.reverse_log_probs(log_p, possible.reshape(-1), now, then)
            .exp()
            .reshape(-1, 2, size)
        )
        dist = torch.einsum("c,ca,cb->ab", dist[dist > 0], step[:, 0], step[:, 1]).reshape(-1)
    return dist.reshape(size, size)


def distance(dist: Tensor) -> float:
    """Return the total variation distance of a distribution [S,S] of two states to JOINT."""
    whole = torch.zeros_like(dist)
    whole[:3, :3] = JOINT
    return 0.5 * float((dist - whole).abs().sum())
