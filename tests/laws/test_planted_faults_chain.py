"""Faults planted in the forward chain, each found by the law meant for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import PAIR, SINGLE, HumpedComponents, ShuffledThenMasked
from faults import (
    BARE,
    CLOCK2,
    EVEN,
    Fault,
    OneLevelAtATime,
    SaidToClose,
    assert_found,
    mixture,
    of_clock,
    on_pair,
    turning,
    with_parents,
)
from torch import Tensor

from ddiff.core.dense import DenseProcess
from ddiff.core.interpolating import MixtureProcess
from ddiff.core.kernel import DenseKernel, InterpolatingKernel, Kernel
from ddiff.core.numerics import Constant, interior
from ddiff.core.schedule import LinearSchedule
from ddiff.core.tree import StochasticParents, TreeKernel, TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.testing import chain


class JumpingAtTheEnd(SaidToClose):
    """alpha falls to 0.1 and then jumps to 0, so that the end itself looks right."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.where(t < 1.0, super().alpha(t), 0.0)

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        return torch.where(t < 1.0, super().one_minus_alpha(t), 1.0)


class SharingWithItself(StochasticParents):
    """The wrong parents share 1 - xi among n instead of n - 1, so that rows miss (1 - xi)/n."""

    def _climb(self, i: int, j: int) -> None:
        super()._climb(i, j)
        size = self.vocabulary.level_sizes[j]
        stray = self.stray[i][j]
        if stray is not None and size > 1:
            self.stray[i][j] = stray * (size - 1) / size


class WithoutACareForOne(StochasticParents):
    """(1 - xi)/(n - 1) at a level with one node."""

    def _climb(self, i: int, j: int) -> None:
        super()._climb(i, j)
        size, xi = self.vocabulary.level_sizes[j], 0.8
        self.stray[i][j] = torch.full((size,), 1.0 - xi).double() / torch.tensor(size - 1.0)


class ConfusedKernel(TreeKernel):
    def column(self, ids: Tensor) -> Tensor:
        return self.row(ids)


class ConfusedRates(TreeProcess):
    def rates(self, t: Tensor) -> Kernel:
        return ConfusedKernel(self.clock.generator(interior(t)), self.parents)


class LeakyRates(ShuffledThenMasked):
    """A generator without its diagonal."""

    def rates(self, t: Tensor) -> Kernel:
        matrix = super().rates(t).dense()
        return DenseKernel(matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)))


class BackwardRates(ShuffledThenMasked):
    def rates(self, t: Tensor) -> Kernel:
        return DenseKernel(-super().rates(t).dense())


class SameMarginalsAnotherGenerator(ShuffledThenMasked):
    """The arrivals of the interpolating process with these very marginals: it leaves the mask."""

    def rates(self, t: Tensor) -> Kernel:
        left = 1.0 - interior(t)
        alpha, unmasked = left ** (self.redraw + self.mask), left**self.mask
        d_word = (
            (-self.mask * unmasked + (self.redraw + self.mask) * alpha) / left / self.num_tokens
        )
        word = d_word + (self.redraw + self.mask) / left * (unmasked - alpha) / self.num_tokens
        mask = self.mask * unmasked / left + (self.redraw + self.mask) / left * (1.0 - unmasked)
        arrive = torch.cat([word.unsqueeze(-1).expand(-1, self.num_tokens), mask.unsqueeze(-1)], -1)
        return InterpolatingKernel(-arrive.sum(-1), arrive)


class OneExponential(DenseProcess):
    """exp of the integrated generator, which forgets the order of time."""

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        grid = torch.linspace(0.0, 1.0, 401, dtype=torch.float64)[:-1] + 1.0 / 800.0
        middle = s.unsqueeze(-1) + (t - s).unsqueeze(-1) * grid
        mean = torch.stack([self.rates(row).dense().mean(0) for row in middle])
        return DenseKernel(torch.matrix_exp(mean * (t - s)[:, None, None]))


class HastyMarginal(MixtureProcess):
    """Noised twice as much as its own rates say."""

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        return super().log_marginal(super().log_marginal(log_p, t), t)


class WrongPrior(MixtureProcess):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prior.log_prob = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()


class NaNAtTheEnd(MixtureProcess):
    """0/0 where alpha is 0."""

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        alpha = self.alpha(t).unsqueeze(-1)
        return (alpha * (log_p.exp() + (1.0 - alpha) / alpha * self.target)).log()


class SaidToBeEven(HumpedComponents):
    """Noise of one value for all words, where it has two components with several."""

    def __init__(self) -> None:
        super().__init__(FlatVocabulary(3))
        self.components = torch.tensor(
            [[0.0, 0.0, 0.0, 1.0], [0.5, 0.3, 0.2, 0.0]], dtype=torch.float64
        )
        self._on = Constant(self.components).on


class KnownToBeUneven(SaidToBeEven):
    def __init__(self) -> None:
        super().__init__()
        self._even = False


FAULTS = [
    Fault(
        "perturbation rows that do not sum to one",
        chain.transition_rows_are_distributions,
        lambda: with_parents(StochasticParents, PAIR, 0.8),
        lambda: with_parents(SharingWithItself, PAIR, 0.8),
    ),
    Fault(
        "right marginals with another generator",
        chain.transition_is_oracle,
        ShuffledThenMasked,
        SameMarginalsAnotherGenerator,
    ),
    Fault(
        "a level of one node with xi < 1",
        chain.transition_rows_are_distributions,
        lambda: with_parents(StochasticParents, SINGLE, 0.8),
        lambda: with_parents(WithoutACareForOne, SINGLE, 0.8),
    ),
    Fault("rates without a diagonal", chain.rates_rows_sum_to_zero, ShuffledThenMasked, LeakyRates),
    Fault(
        "rates of the wrong sign", chain.rates_are_not_negative, ShuffledThenMasked, BackwardRates
    ),
    Fault(
        "a column that is a row", chain.kernels_agree, on_pair(TreeProcess), on_pair(ConfusedRates)
    ),
    Fault(
        "one exponential for all times",
        chain.transition_is_oracle,
        turning(DenseProcess),
        turning(OneExponential),
    ),
    Fault(
        "transitions one level at a time",
        chain.chapman_kolmogorov,
        of_clock(CLOCK2),
        of_clock(OneLevelAtATime((0.5, 1.0))),
    ),
    Fault(
        "marginals of another speed",
        chain.marginal_follows_transitions,
        mixture(MixtureProcess),
        mixture(HastyMarginal),
    ),
    Fault(
        "parents that lose mass",
        chain.total_probability,
        lambda: with_parents(StochasticParents, PAIR, 0.8),
        lambda: with_parents(SharingWithItself, PAIR, 0.8),
    ),
    Fault(
        "a prior that is not the end",
        chain.ends_as_declared,
        mixture(MixtureProcess),
        mixture(WrongPrior),
    ),
    Fault(
        "a jump at the end",
        chain.ends_are_approached,
        lambda: MixtureProcess(BARE, LinearSchedule(0.1), EVEN),
        lambda: MixtureProcess(BARE, JumpingAtTheEnd(0.1), EVEN),
    ),
    Fault("0/0 at the end", chain.safe_at_ends, mixture(MixtureProcess), mixture(NaNAtTheEnd)),
    Fault("noise said to be even", chain.total_probability, KnownToBeUneven, SaidToBeEven),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_found(fault)
