"""Planted faults: pairs of a correct and a faulty object, which differ in one line.

A law (conformance check of `ddiff.testing`) must pass on the correct object and fail on the faulty
object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from chains import PAIR
from torch import Tensor

from ddiff.core.clock import CdfClock, LevelClock, LogTimeClock
from ddiff.core.components import MixtureProcess, mask_distribution
from ddiff.core.dense import DenseProcess
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import GeometricSchedule, LinearSchedule, PowerSchedule
from ddiff.core.tree import TreeProcess
from ddiff.core.tree_parents import StochasticParents
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.nn.denoiser import Backbone, Context, Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.testing.bound import Table, rest_conditional_table
from ddiff.testing.report import Law


class Fault(NamedTuple):
    """Law, with builders of an object that obeys the law and of an object that breaks the law."""

    name: str
    law: Law
    build_healthy: Callable[[], Any]
    build_faulty: Callable[[], Any]
    options: Mapping[str, Any] = MappingProxyType({})


def assert_detected(fault: Fault) -> None:
    """Assert that the law passes on the healthy object and fails on the faulty object."""
    healthy = fault.law(fault.build_healthy(), **fault.options)
    assert healthy.passed, str(healthy)
    assert healthy.probes > 0
    report = fault.law(fault.build_faulty(), **fault.options)
    assert not report.passed
    # the law must find it by its numbers, not because the planted code raises
    assert "raised" not in report.where, report.where


# ---------------------------------------------------------------------- small objects

CLOCK2 = LogTimeClock((0.5, 1.0))
CLOCK3 = LogTimeClock((1.0, 2.0, 1.0))
UNMASKED = FlatVocabulary(3, mask=False)
EVEN = torch.full((3,), 1.0 / 3.0)
UNEVEN = torch.tensor([0.6, 0.3, 0.1])
ONE_LEVEL = TreeProcess(FlatVocabulary(3), LogTimeClock((1.0,)))
STOCHASTIC_PARENTS = TreeProcess(PAIR, LogTimeClock((1.0, 1.0)), 0.8)


def build_with_parents(
    kind: type[StochasticParents], tree: HierarchicalVocabulary, xi: float
) -> TreeProcess:
    """Build a tree process whose stochastic parents have the class `kind`.

    xi: probability that a node moves to its true parent.
    """
    process = TreeProcess(tree, LogTimeClock((1.0,) * tree.num_levels), xi)
    process.parents = kind(tree, (xi,) * tree.num_levels)
    return process


def tree_on_pair(kind: type[TreeProcess], xi: float = 1.0) -> Callable[[], TreeProcess]:
    """Return a builder of a two-level tree process of the class `kind`."""
    return lambda: kind(PAIR, CLOCK2, xi)


def tree_with_clock(clock: LevelClock) -> Callable[[], TreeProcess]:
    """Return a builder of a two-level tree process with the given clock."""
    return lambda: TreeProcess(PAIR, clock)


def power_masking(kind: type[TreeProcess]) -> Callable[[], TreeProcess]:
    """Return a builder of a masked process of the class `kind`, with alpha = 1 - t^0.3."""
    return lambda: kind(FlatVocabulary(4), CdfClock([PowerSchedule(0.3)]))


def uniform_noise(kind: type[MixtureProcess]) -> Callable[[], MixtureProcess]:
    """Return a builder of a process of the class `kind` with uniform noise."""
    return lambda: kind(UNMASKED, LinearSchedule(), EVEN)  # type: ignore[call-arg]


def uneven_noise(kind: type[MixtureProcess]) -> Callable[[], MixtureProcess]:
    """Return a builder of a process of the class `kind` with unequal noise probabilities."""
    return lambda: kind(UNMASKED, LinearSchedule(), UNEVEN)  # type: ignore[call-arg]


def masking(kind: type[MixtureProcess]) -> Callable[[], MixtureProcess]:
    """Return a builder of a masked process of the class `kind`."""
    vocabulary = ONE_LEVEL.vocabulary
    noise = mask_distribution(vocabulary)
    return lambda: kind(vocabulary, LinearSchedule(), noise)  # type: ignore[call-arg]


def noisy_from_the_start(kind: type[MixtureProcess]) -> Callable[[], MixtureProcess]:
    """Return a builder of a process of the class `kind` that has noise at t = 0."""
    schedule = GeometricSchedule(0.1, 5.0)
    return lambda: kind(UNMASKED, schedule, EVEN)  # type: ignore[call-arg]


def non_commuting(kind: type[DenseProcess]) -> Callable[[], DenseProcess]:
    """Return a builder of a dense process whose generators at different times do not commute."""
    return lambda: kind.examples()[1]  # type: ignore[return-value]


def small_tree(kind: type[HierarchicalVocabulary]) -> Callable[[], HierarchicalVocabulary]:
    """Return a builder of a two-level vocabulary of the class `kind`."""
    return lambda: kind([[0, 1, 0, 0]], tokenizer_fingerprint="of a tokenizer")


class MeanBackbone(Backbone):
    """Backbone in which each position attends equally to all valid positions of its document."""

    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 4)

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        hidden = self.embedding(ids)
        batch, length = ids.shape
        mask = context.attention_mask()
        if mask is None:
            weight = torch.ones(batch, length, length).to(hidden)
        else:
            weight = mask[:, 0].to(hidden)
        mean = (weight @ hidden) / weight.sum(-1, keepdim=True)
        return hidden + mean + t.unsqueeze(-1)


def build_denoiser(backbone: type[MeanBackbone], head: type[TokenHead] = TokenHead) -> Denoiser:
    return Denoiser(backbone(), head(FlatVocabulary(3), 4))


# ---------------------------------------------------------------------- faults of several laws


def full_conditional_table(process: ForwardProcess, log_joint: Tensor) -> Table:
    """Fault: a network that predicts each of two tokens given the states of both positions.

    The prediction P(x_i | z) is conditioned on the state z_i of the same position. The formulas of
    the bound multiply the prediction by q_t(z_i|x_i) again, so the bound is wrong.
    """
    rest = rest_conditional_table(process, log_joint)

    def table(zt: Tensor, t: Tensor) -> Tensor:
        own = process.log_likelihood(zt.reshape(-1), t.reshape(-1))
        return (rest(zt, t) + own.reshape(*zt.shape, -1)).log_softmax(-1)

    return table


class OneLevelAtATime(LogTimeClock):
    """Fault: the transition over a finite step never rises by two levels of the tree."""

    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        single = super().transition(s, t).tril(1)
        return single / single.sum(-1, keepdim=True)


class FalselyClosing(LinearSchedule):
    """Fault: the schedule declares alpha(1) = 0, but alpha(1) is `floor`."""

    def __init__(self, floor: float) -> None:
        super().__init__(floor)
        self.closes_at_prior = True


class RawDecoding(TreeProcess):
    """Fault: the decoding term ignores the state z: it is -ln p(x) instead of -ln P(x|z)."""

    def decode_nll(
        self, prediction: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        return -prediction.log_prob(x0)


class NoClosingTerm(TreeProcess):
    """Fault: the prior term of the bound (KL to the prior at t = 1) is 0."""

    def closing_kl(self, prediction: CleanDistribution, x0: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


class LatePosterior(MixtureProcess):
    """Fault: the posterior of z_s is that of a time between s and t."""

    def reverse_log_probs(self, log_p: Tensor, zt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return super().reverse_log_probs(log_p, zt, t, s + 0.5 * (t - s))


class InactiveMasks(TreeProcess):
    """Fault: masks count as inactive, so that they add nothing to the bound."""

    def active(self, zt: Tensor) -> Tensor:
        return self.vocabulary.level_of(zt) == 1
