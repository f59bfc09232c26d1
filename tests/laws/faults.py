"""Planted faults: an object that obeys a law of the kit, and one a line away that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from chains import PAIR
from torch import Tensor

from ddiff.core.clock import CdfClock, LevelClock, LogTimeClock
from ddiff.core.dense import DenseProcess
from ddiff.core.interpolating import MixtureProcess, mask_distribution
from ddiff.core.prediction import CleanDistribution
from ddiff.core.schedule import GeometricSchedule, LinearSchedule, PowerSchedule
from ddiff.core.tree import StochasticParents, TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.nn.denoiser import Context, Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.testing.report import Law


class Fault(NamedTuple):
    what: str
    law: Law
    healthy: Callable[[], Any]
    faulty: Callable[[], Any]
    options: Mapping[str, Any] = MappingProxyType({})


def assert_found(fault: Fault) -> None:
    """The law passes for the healthy one, with something to look at, and is broken by the faulty one."""
    healthy = fault.law(fault.healthy(), **fault.options)
    assert healthy.passed, str(healthy)
    assert healthy.probes > 0
    report = fault.law(fault.faulty(), **fault.options)
    assert not report.passed
    assert "raised" not in report.where, (
        report.where
    )  # found by its numbers, not because the plant itself is broken


class OneLevelAtATime(LogTimeClock):
    """A finite transition in which nobody climbs two levels."""

    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        single = super().transition(s, t).tril(1)
        return single / single.sum(-1, keepdim=True)


class SaidToClose(LinearSchedule):
    """alpha(1) = 0.01, declared 0."""

    def __init__(self, floor: float) -> None:
        super().__init__(floor)
        self.closes_at_prior = True


def with_parents(
    kind: type[StochasticParents], tree: HierarchicalVocabulary, xi: float
) -> TreeProcess:
    process = TreeProcess(tree, LogTimeClock((1.0,) * tree.num_levels), xi)
    process.parents = kind(tree, (xi,) * tree.num_levels)
    return process


class RawDecoding(TreeProcess):
    """-ln p(x) where -ln P(x|z) is due."""

    def decode_nll(self, law: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return -law.log_prob(x0)


class FreeClosing(TreeProcess):
    def closing_kl(self, law: CleanDistribution, x0: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


class LatePosterior(MixtureProcess):
    def reverse_log_probs(self, log_p: Tensor, zt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return super().reverse_log_probs(log_p, zt, t, s + 0.5 * (t - s))


class IdleMasks(TreeProcess):
    def active(self, zt: Tensor) -> Tensor:
        return self.vocabulary.level_of(zt) == 1


class Trunk(torch.nn.Module):
    """Every position sees the valid positions of its own document, by their mean."""

    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 4)

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        hidden = self.embedding(ids)
        mask = context.attention_mask()
        weight = (
            torch.ones(ids.shape[0], ids.shape[1], ids.shape[1]).to(hidden)
            if mask is None
            else mask[:, 0].to(hidden)
        )
        return hidden + (weight @ hidden) / weight.sum(-1, keepdim=True) + t.unsqueeze(-1)


def network(trunk: type[Trunk], head_: type[TokenHead] = TokenHead) -> Denoiser:
    return Denoiser(trunk(), head_(FlatVocabulary(3), 4))


def masks_by_power(kind: type[TreeProcess]) -> Callable[[], TreeProcess]:
    return lambda: kind(FlatVocabulary(4), CdfClock([PowerSchedule(0.3)]))


CLOCK2, CLOCK3 = LogTimeClock((0.5, 1.0)), LogTimeClock((1.0, 2.0, 1.0))


BARE = FlatVocabulary(3, mask=False)


EVEN = torch.full((3,), 1.0 / 3.0)


UNEVEN = torch.tensor([0.6, 0.3, 0.1])


ONE_LEVEL = TreeProcess(FlatVocabulary(3), LogTimeClock((1.0,)))


STRAYING = TreeProcess(PAIR, LogTimeClock((1.0, 1.0)), 0.8)


def on_pair(kind: type[TreeProcess], xi: float = 1.0) -> Callable[[], TreeProcess]:
    return lambda: kind(PAIR, CLOCK2, xi)


def mixture(kind: type[MixtureProcess]) -> Callable[[], MixtureProcess]:
    return lambda: kind(BARE, LinearSchedule(), EVEN)  # type: ignore[call-arg]


def masking(kind: type[MixtureProcess]) -> Callable[[], MixtureProcess]:
    return lambda: kind(
        ONE_LEVEL.vocabulary, LinearSchedule(), mask_distribution(ONE_LEVEL.vocabulary)
    )  # type: ignore[call-arg]


def late(kind: type[MixtureProcess]) -> MixtureProcess:
    """Noise that does not start at 0."""
    return kind(BARE, GeometricSchedule(0.1, 5.0), EVEN)  # type: ignore[call-arg]


def uneven(kind: type[MixtureProcess]) -> Callable[[], MixtureProcess]:
    return lambda: kind(BARE, LinearSchedule(), UNEVEN)  # type: ignore[call-arg]


def turning(kind: type[DenseProcess]) -> Callable[[], DenseProcess]:
    return lambda: kind.examples()[1]  # type: ignore[return-value]


def tree_of(kind: type[HierarchicalVocabulary]) -> Callable[[], HierarchicalVocabulary]:
    return lambda: kind([[0, 1, 0, 0]], tokenizer_fingerprint="of a tokenizer")


def of_clock(clock_: LevelClock) -> Callable[[], TreeProcess]:
    return lambda: TreeProcess(PAIR, clock_)
