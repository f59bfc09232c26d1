"""Faults planted in the forward process; each must be detected by one conformance check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import PAIR, SINGLE, HumpedComponents, ShuffledThenMasked
from faults import (
    CLOCK2,
    EVEN,
    UNMASKED,
    FalselyClosing,
    Fault,
    OneLevelAtATime,
    assert_detected,
    build_with_parents,
    non_commuting,
    tree_on_pair,
    tree_with_clock,
    uniform_noise,
)
from torch import Tensor

from ddiff.core.components import MixtureProcess
from ddiff.core.dense import DenseProcess
from ddiff.core.kernel import DenseKernel, InterpolatingKernel, Kernel
from ddiff.core.numerics import Constant, interior
from ddiff.core.schedule import LinearSchedule
from ddiff.core.tree import TreeProcess
from ddiff.core.tree_kernel import TreeKernel
from ddiff.core.tree_parents import StochasticParents
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.testing import chain


class JumpAtTheEnd(FalselyClosing):
    """Fault: alpha decreases to 0.1 and jumps to 0 at t = 1."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.where(t < 1.0, super().alpha(t), 0.0)

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        return torch.where(t < 1.0, super().one_minus_alpha(t), 1.0)


class WrongSharesOfParents(StochasticParents):
    """Fault: the probability 1 - xi of a wrong parent is divided by n instead of n - 1 nodes.

    The probabilities of the parents of a node then do not sum to 1.
    """

    def _add_level(self, i: int, j: int) -> None:
        super()._add_level(i, j)
        size = self.vocabulary.level_sizes[j]
        stray = self.stray[i][j]
        if stray is not None and size > 1:
            self.stray[i][j] = stray * (size - 1) / size


class DivisionByZeroNodes(StochasticParents):
    """Fault: the probability (1 - xi)/(n - 1) of a wrong parent is evaluated for n = 1 node."""

    def _add_level(self, i: int, j: int) -> None:
        super()._add_level(i, j)
        size, xi = self.vocabulary.level_sizes[j], 0.8
        self.stray[i][j] = torch.full((size,), 1.0 - xi).double() / torch.tensor(size - 1.0)


class RowAsColumn(TreeKernel):
    """Fault: the method `column` of the kernel returns the row."""

    def column(self, ids: Tensor) -> Tensor:
        return self.row(ids)


class RowAsColumnRates(TreeProcess):
    """Fault: the rates have the kernel `RowAsColumn`."""

    def rates(self, t: Tensor) -> Kernel:
        return RowAsColumn(self.clock.generator(interior(t)), self.parents)


class RatesWithoutDiagonal(ShuffledThenMasked):
    """Fault: the diagonal of the generator (rates of leaving) is 0."""

    def rates(self, t: Tensor) -> Kernel:
        matrix = super().rates(t).dense()
        return DenseKernel(matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)))


class NegatedRates(ShuffledThenMasked):
    """Fault: the rates have the wrong sign."""

    def rates(self, t: Tensor) -> Kernel:
        return DenseKernel(-super().rates(t).dense())


class OtherGeneratorOfSameMarginals(ShuffledThenMasked):
    """Fault: the generator is that of an interpolating process with the same marginals.

    In the interpolating process, masks can become tokens again.
    """

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
    """Fault: the transition is the exponential of the integrated generator.

    This formula is correct only if the generators at all times commute.
    """

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        grid = torch.linspace(0.0, 1.0, 401, dtype=torch.float64)[:-1] + 1.0 / 800.0
        middle = s.unsqueeze(-1) + (t - s).unsqueeze(-1) * grid
        mean = torch.stack([self.rates(row).dense().mean(0) for row in middle])
        return DenseKernel(torch.matrix_exp(mean * (t - s)[:, None, None]))


class MarginalOfDoubleNoise(MixtureProcess):
    """Fault: the marginal q_t contains the noise twice."""

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        return super().log_marginal(super().log_marginal(log_p, t), t)


class WrongPrior(MixtureProcess):
    """Fault: the prior is not the marginal at t = 1."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prior.log_prob = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()


class NaNAtTheEnd(MixtureProcess):
    """Fault: the marginal q_t divides 0 by 0 if alpha is 0."""

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        alpha = self.alpha(t).unsqueeze(-1)
        return (alpha * (log_p.exp() + (1.0 - alpha) / alpha * self.target)).log()


class FalselyEvenComponents(HumpedComponents):
    """Fault: the noise is declared equal for all tokens, although one component is not."""

    def __init__(self) -> None:
        super().__init__(FlatVocabulary(3))
        self.components = torch.tensor(
            [[0.0, 0.0, 0.0, 1.0], [0.5, 0.3, 0.2, 0.0]], dtype=torch.float64
        )
        self._components_on = Constant(self.components).on


class UnevenComponents(FalselyEvenComponents):
    """Correct counterpart of `FalselyEvenComponents`, which declares the noise as unequal."""

    def __init__(self) -> None:
        super().__init__()
        self._is_even_on_tokens = False


FAULTS = [
    Fault(
        "transition rows do not sum to 1",
        chain.transition_rows_are_distributions,
        lambda: build_with_parents(StochasticParents, PAIR, 0.8),
        lambda: build_with_parents(WrongSharesOfParents, PAIR, 0.8),
    ),
    Fault(
        "the generator is wrong but the marginals are right",
        chain.transition_is_oracle,
        ShuffledThenMasked,
        OtherGeneratorOfSameMarginals,
    ),
    Fault(
        "a level of one node causes a division by zero",
        chain.transition_rows_are_distributions,
        lambda: build_with_parents(StochasticParents, SINGLE, 0.8),
        lambda: build_with_parents(DivisionByZeroNodes, SINGLE, 0.8),
    ),
    Fault(
        "the generator has no diagonal",
        chain.rates_rows_sum_to_zero,
        ShuffledThenMasked,
        RatesWithoutDiagonal,
    ),
    Fault(
        "the rates have the wrong sign",
        chain.rates_are_not_negative,
        ShuffledThenMasked,
        NegatedRates,
    ),
    Fault(
        "column returns the row",
        chain.kernels_agree,
        tree_on_pair(TreeProcess),
        tree_on_pair(RowAsColumnRates),
    ),
    Fault(
        "the transition is one matrix exponential",
        chain.transition_is_oracle,
        non_commuting(DenseProcess),
        non_commuting(OneExponential),
    ),
    Fault(
        "transitions rise by at most one level",
        chain.chapman_kolmogorov,
        tree_with_clock(CLOCK2),
        tree_with_clock(OneLevelAtATime((0.5, 1.0))),
    ),
    Fault(
        "the marginal applies the noise twice",
        chain.marginal_follows_transitions,
        uniform_noise(MixtureProcess),
        uniform_noise(MarginalOfDoubleNoise),
    ),
    Fault(
        "the marginal does not sum to 1",
        chain.total_probability,
        lambda: build_with_parents(StochasticParents, PAIR, 0.8),
        lambda: build_with_parents(WrongSharesOfParents, PAIR, 0.8),
    ),
    Fault(
        "the prior is not q_1",
        chain.ends_as_declared,
        uniform_noise(MixtureProcess),
        uniform_noise(WrongPrior),
    ),
    Fault(
        "alpha jumps to 0 at t = 1",
        chain.ends_are_approached,
        lambda: MixtureProcess(UNMASKED, LinearSchedule(0.1), EVEN),
        lambda: MixtureProcess(UNMASKED, JumpAtTheEnd(0.1), EVEN),
    ),
    Fault(
        "the marginal is 0/0 at t = 1",
        chain.safe_at_ends,
        uniform_noise(MixtureProcess),
        uniform_noise(NaNAtTheEnd),
    ),
    Fault(
        "uneven noise counts as even",
        chain.total_probability,
        UnevenComponents,
        FalselyEvenComponents,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)
