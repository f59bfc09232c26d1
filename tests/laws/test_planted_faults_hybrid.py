"""The faults of the hybrids, each one line away from the process that passes, and the law that finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ddiff_hybrid.epsilon import EpsilonHybrid
from ddiff_hybrid.gamma import GammaHybrid, PowerOf
from ddiff_hybrid.losses import EverywhereCrossEntropy, MixedEntropies
from faults import Fault, assert_found
from torch import Tensor

from ddiff.core.interpolating import MixtureProcess, token_distribution
from ddiff.core.kernel import InterpolatingKernel, Kernel
from ddiff.core.numerics import interior
from ddiff.core.prediction import CleanDistribution, DenseDistribution
from ddiff.core.schedule import LinearSchedule
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.testing import bound, chain, derived_formulas, draws, reverse_process
from ddiff.testing.bound import full_conditional_table, random_joint, rest_conditional_table
from ddiff.testing.probes import INNER, times
from ddiff.testing.report import Gap, compare, law

GAMMA, WORDS = 0.3, 3


def gamma_hybrid(kind: type[GammaHybrid] = GammaHybrid) -> Callable[[], GammaHybrid]:
    return lambda: kind(FlatVocabulary(WORDS), GAMMA)


def epsilon_hybrid(kind: type[EpsilonHybrid] = EpsilonHybrid) -> Callable[[], EpsilonHybrid]:
    return lambda: kind(FlatVocabulary(WORDS), LinearSchedule(), 0.3)


@law("rates = the paper's", tolerance=1e-12)
def rates_are_the_papers(process: GammaHybrid) -> Iterator[Gap]:
    """Q_t = sigma' [ (1 - gamma) Q_absorb + gamma Q_uniform ] with (1 - gamma) sigma' = 1/(1 - t); relative rounding.

    Whoever changes rates and transitions together passes every law of the kit.
    """
    t = times(INNER)
    mixed = -torch.eye(WORDS + 1, dtype=torch.float64)
    mixed[:WORDS, :WORDS] += process.gamma / WORDS
    mixed[:WORDS, WORDS] = 1.0 - process.gamma
    mixed[WORDS] = 0.0
    expected = mixed / ((1.0 - t) * (1.0 - process.gamma))[:, None, None]
    yield compare(
        process.rates(t).dense(), expected, {"t": t}, expected.abs().amax((1, 2), keepdim=True)
    )


class PublishedAsBound(GammaHybrid):  # type: ignore[misc]
    """The loss of the paper's code offered as the density."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.published = MixedEntropies(self)

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return self.published.weight(self, x0, zt, interior(t))

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return self.published.divergence(self, prediction, x0, zt, t)


class AllTheNoise(GammaHybrid):  # type: ignore[misc]
    """e^sigma where e^{gamma sigma} belongs, in the bound of words."""

    def density(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        words = self.uniform
        self.uniform = MixtureProcess(
            words.vocabulary, _all(self), token_distribution(words.vocabulary)
        )
        charged = self.uniform.density(prediction, x0, self._token(zt), t)
        self.uniform = words
        return torch.where(
            self._is_masked(zt), super().density(prediction, x0, zt, t), self.gamma * charged
        )


class AllTheNoiseInTheDraw(GammaHybrid):  # type: ignore[misc]
    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self._corrupt(x0, self.visible.one_minus_alpha(t), _all(self).one_minus_alpha(t), u)


def _all(process: GammaHybrid) -> PowerOf:
    """e^-sigma."""
    return PowerOf(process.noise, process.masking + process.redrawing)


class Interpolating(GammaHybrid):  # type: ignore[misc]
    """The interpolating process with these marginals: it arrives at words from the mask."""

    def rates(self, t: Tensor) -> Kernel:
        t = interior(t)
        masks = (self.masking + self.redrawing * t) / (1.0 - t)
        words = torch.full((len(t), WORDS), self.redrawing / WORDS, dtype=torch.float64)
        arrive = torch.cat([words, masks.unsqueeze(-1)], -1)
        return InterpolatingKernel(-arrive.sum(-1), arrive)


class InterpolatingThroughout(Interpolating):
    """Its transitions too, and the formulas that follow from both."""

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        left = torch.where(s < t, (1.0 - t) / (1.0 - s), 1.0) ** (self.masking + self.redrawing)

        def each(time: Tensor) -> Tensor:
            return (self._redrawn_per_token(time) * (1.0 - time)).unsqueeze(-1).expand(-1, WORDS)

        before, after = (torch.cat([each(time), time.unsqueeze(-1)], -1) for time in (s, t))
        return InterpolatingKernel(left, (after - left.unsqueeze(-1) * before).clamp(min=0.0))


class MixedStep(GammaHybrid):  # type: ignore[misc]
    """Masks that are revealed to the word of the law itself, as if nothing had been redrawn before the mask came."""

    def _move(
        self,
        query: Any,
        zt: Tensor,
        t: Tensor,
        s: Tensor,
        reveal: Tensor,
        arrive: Tensor,
        u: Tensor,
    ) -> Tensor:
        moved = super()._move(query, zt, t, s, reveal, arrive, u)
        revealed = (self._is_masked(zt) & ~self._is_masked(moved)).nonzero().squeeze(-1)

        def draw(prediction: Any, z: Tensor, u: Tensor) -> Tensor:
            return prediction.draw(z, torch.zeros_like(z), u)

        if len(revealed):
            z = zt[revealed]
            moved[revealed] = query(revealed, self.scope(z), draw, z, u[revealed, 1])
        return moved


class WithoutItsEvidence(GammaHybrid):  # type: ignore[misc]
    """A score is drawn from by its shares alone, whatever word stands there."""

    def decode(self, query: Any, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        def draw(prediction: Any, z: Tensor, u: Tensor) -> Tensor:
            log_p = prediction.log_ratio[:, :WORDS].log_softmax(-1)
            root = torch.full_like(z, self.vocabulary.root)
            return DenseDistribution(log_p, self.vocabulary).draw(root, torch.zeros_like(z), u)

        return query(torch.arange(len(zt)), self.scope(zt), draw, zt, u[:, 1])


class WithoutTheLastDraw(EpsilonHybrid):  # type: ignore[misc]
    """What shuffled words cost is left out."""

    def decode_nll(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return torch.where(
            zt == self.vocabulary.root, super().decode_nll(prediction, x0, zt, t), 0.0
        )


class RawLastDraw(EpsilonHybrid):  # type: ignore[misc]
    """-ln p(x) where -ln P(x | z) is due."""

    def decode_nll(
        self, prediction: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        return -prediction.log_prob(x0)


class SaidToClose(EpsilonHybrid):  # type: ignore[misc]
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.closes_at_clean = True


class AlwaysAnother(EpsilonHybrid):  # type: ignore[misc]
    """A shuffled word never stays itself."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        drawn = super().sample(x0, t, u)
        redrawn = (drawn == x0) & (u[:, 0] >= self.alpha(t))
        return torch.where(redrawn, (x0 + 1) % WORDS, drawn)


FAULTS = [
    Fault(
        "the published loss as bound",
        derived_formulas.density_is_derived,
        gamma_hybrid(),
        gamma_hybrid(PublishedAsBound),
    ),
    Fault(
        "the published loss is no bound",
        bound.constant_denoiser,
        gamma_hybrid(),
        gamma_hybrid(PublishedAsBound),
    ),
    Fault(
        "e^sigma for e^(gamma sigma)",
        derived_formulas.density_is_derived,
        gamma_hybrid(),
        gamma_hybrid(AllTheNoise),
    ),
    Fault(
        "e^sigma for e^(gamma sigma) in the draw",
        draws.sample_follows_marginal,
        gamma_hybrid(),
        gamma_hybrid(AllTheNoiseInTheDraw),
    ),
    Fault(
        "interpolating rates",
        chain.transition_is_oracle,
        gamma_hybrid(),
        gamma_hybrid(Interpolating),
    ),
    Fault(
        "an interpolating chain",
        rates_are_the_papers,
        gamma_hybrid(),
        gamma_hybrid(InterpolatingThroughout),
    ),
    Fault(
        "masks that hide clean words",
        draws.step_follows_posterior,
        gamma_hybrid(),
        gamma_hybrid(MixedStep),
    ),
    Fault(
        "a score without the evidence",
        reverse_process.scores_are_decoded,
        gamma_hybrid(),
        gamma_hybrid(WithoutItsEvidence),
    ),
    Fault(
        "no last draw",
        derived_formulas.decode_nll_is_derived,
        epsilon_hybrid(),
        epsilon_hybrid(WithoutTheLastDraw),
    ),
    Fault(
        "no last draw is no bound",
        bound.constant_denoiser,
        epsilon_hybrid(),
        epsilon_hybrid(WithoutTheLastDraw),
    ),
    Fault(
        "a raw last draw", bound.constant_denoiser, epsilon_hybrid(), epsilon_hybrid(RawLastDraw)
    ),
    Fault(
        "shuffling that is denied",
        chain.ends_as_declared,
        epsilon_hybrid(),
        epsilon_hybrid(SaidToClose),
    ),
    Fault(
        "never shuffled onto itself",
        draws.sample_follows_marginal,
        epsilon_hybrid(),
        epsilon_hybrid(AlwaysAnother),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_the_law_meant_for_a_fault_finds_it(fault: Fault) -> None:
    assert_found(fault)


def test_no_law_but_the_pinned_rates_sees_an_interpolating_chain() -> None:
    """Why the rates are pinned: with another generator throughout everything that is derived agrees with itself."""
    other = gamma_hybrid(InterpolatingThroughout)()
    for one in (
        chain.transition_is_oracle,
        chain.chapman_kolmogorov,
        chain.marginal_follows_transitions,
    ):
        assert one(other).passed, str(one(other))
    assert not rates_are_the_papers(other).passed


@pytest.mark.parametrize(
    "process", [epsilon_hybrid()(), gamma_hybrid()()], ids=["epsilon", "gamma"]
)
def test_cross_entropy_at_visible_words_read_as_the_law_of_the_rest_breaks_the_bound(
    process: Any,
) -> None:
    """What the published epsilon-loss trains is the full conditional; the engine's formulas want the law of the rest."""
    assert bound.entropy_equality(process).passed
    assert (
        bound.entropy_equality(process, denoiser=full_conditional_table).error > 0.05
    )  # tenths of a nat on these joints


def test_the_published_epsilon_loss_is_least_for_the_full_conditional() -> None:
    """At a visible word its expected cross-entropy is that of P(x | z): the law of the rest put in its place does worse,
    and converted from it does as well, exactly."""
    process, log_joint = epsilon_hybrid()(), random_joint(WORDS)
    t = times((0.4,))
    seen = process.log_likelihood(torch.arange(WORDS), t.expand(WORDS)).exp().T  # [x, z]
    chance = torch.einsum("ab,ai,bj->aij", log_joint.exp(), seen, seen)  # first word, both states
    first, second = torch.cartesian_prod(torch.arange(WORDS), torch.arange(WORDS)).T
    states, now = torch.stack([first, second], -1), t.expand(WORDS * WORDS)
    loss = EverywhereCrossEntropy()

    def expected(log_p: Tensor, plain: bool) -> float:
        total = 0.0
        for x in range(WORDS):
            x0 = torch.full_like(first, x)
            law_ = DenseDistribution(log_p, process.vocabulary)
            nll = -law_.log_prob(x0) if plain else loss.divergence(process, law_, x0, first, now)
            total += (chance[x].reshape(-1) * nll).sum().item()
        return total

    rest, full = (
        table(process, log_joint)(states, now[:, None].expand(-1, 2))[:, 0]
        for table in (rest_conditional_table, full_conditional_table)
    )
    posterior = (chance / chance.sum(0)).log()
    least = -(chance * posterior).sum().item()
    assert expected(full, plain=True) == pytest.approx(least, rel=1e-12)
    assert expected(rest, plain=False) == pytest.approx(least, rel=1e-12)
    assert expected(rest, plain=True) > least + 0.01
