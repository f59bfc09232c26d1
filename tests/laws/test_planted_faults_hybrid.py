"""Faults planted in the hybrid processes; each must be detected by one conformance check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ddiff_hybrid.epsilon import EpsilonHybrid
from ddiff_hybrid.gamma import GammaHybrid, PowerOf
from ddiff_hybrid.losses import EverywhereCrossEntropy, MixedEntropies
from faults import Fault, assert_detected, full_conditional_table
from torch import Tensor

from ddiff.core.components import MixtureProcess, token_distribution
from ddiff.core.kernel import InterpolatingKernel, Kernel
from ddiff.core.numerics import interior
from ddiff.core.prediction import CleanDistribution, DenseDistribution
from ddiff.core.schedule import LinearSchedule
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.testing import bound, chain, derived_formulas, draws, reverse_process
from ddiff.testing.bound import random_joint, rest_conditional_table
from ddiff.testing.probes import INNER, times
from ddiff.testing.report import Gap, compare, law

GAMMA = 0.3
NUM_TOKENS = 3


def gamma_hybrid(kind: type[GammaHybrid] = GammaHybrid) -> Callable[[], GammaHybrid]:
    return lambda: kind(FlatVocabulary(NUM_TOKENS), GAMMA)


def epsilon_hybrid(kind: type[EpsilonHybrid] = EpsilonHybrid) -> Callable[[], EpsilonHybrid]:
    return lambda: kind(FlatVocabulary(NUM_TOKENS), LinearSchedule(), 0.3)


@law("rates = the paper's", tolerance=1e-12)
def rates_are_the_papers(process: GammaHybrid) -> Iterator[Gap]:
    """Check that the rates Q_t are those of the paper, up to a relative rounding of 1e-12.

    Q_t = sigma' [ (1 - gamma) Q_absorb + gamma Q_uniform ], where sigma' is the derivative of the
    noise, and (1 - gamma) sigma' = 1/(1 - t). No law of `ddiff.testing` detects a fault that
    changes rates and transitions together.
    """
    t = times(INNER)
    mixed = -torch.eye(NUM_TOKENS + 1, dtype=torch.float64)
    mixed[:NUM_TOKENS, :NUM_TOKENS] += process.gamma / NUM_TOKENS
    mixed[:NUM_TOKENS, NUM_TOKENS] = 1.0 - process.gamma
    mixed[NUM_TOKENS] = 0.0
    expected = mixed / ((1.0 - t) * (1.0 - process.gamma))[:, None, None]
    yield compare(
        process.rates(t).dense(),
        expected,
        {"t": t},
        relative_to=expected.abs().amax((1, 2), keepdim=True),
    )


class PublishedAsBound(GammaHybrid):  # type: ignore[misc]
    """Fault: the integrand of the bound is replaced by the loss in the code of the paper."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.published = MixedEntropies(self)

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return self.published.weight(self, x0, zt, interior(t))

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return self.published.divergence(self, prediction, x0, zt, t)


class TotalNoiseInDensity(GammaHybrid):  # type: ignore[misc]
    """Fault: the integrand at visible tokens uses the noise sigma in place of gamma sigma."""

    def density(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        own = self.uniform
        self.uniform = MixtureProcess(
            own.vocabulary, _all(self), token_distribution(own.vocabulary)
        )
        charged = self.uniform.density(prediction, x0, self._token(zt), t)
        self.uniform = own
        return torch.where(
            self._is_masked(zt), super().density(prediction, x0, zt, t), self.gamma * charged
        )


class TotalNoiseInSample(GammaHybrid):  # type: ignore[misc]
    """Fault: `sample` uses the noise sigma in place of gamma sigma."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self._corrupt(x0, self.visible.one_minus_alpha(t), _all(self).one_minus_alpha(t), u)


def _all(process: GammaHybrid) -> PowerOf:
    """Return the schedule with alpha = e^-sigma."""
    return PowerOf(process.noise, process.masking + process.redrawing)


class InterpolatingRates(GammaHybrid):  # type: ignore[misc]
    """Fault: the rates are those of an interpolating process with the same marginals."""

    def rates(self, t: Tensor) -> Kernel:
        t = interior(t)
        masks = (self.masking + self.redrawing * t) / (1.0 - t)
        words = torch.full((len(t), NUM_TOKENS), self.redrawing / NUM_TOKENS, dtype=torch.float64)
        arrive = torch.cat([words, masks.unsqueeze(-1)], -1)
        return InterpolatingKernel(-arrive.sum(-1), arrive)


class InterpolatingTransitions(InterpolatingRates):
    """Fault: rates and transitions are those of an interpolating process."""

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        left = torch.where(s < t, (1.0 - t) / (1.0 - s), 1.0) ** (self.masking + self.redrawing)

        def each(time: Tensor) -> Tensor:
            return (
                (self._redrawn_per_token(time) * (1.0 - time)).unsqueeze(-1).expand(-1, NUM_TOKENS)
            )

        before, after = (torch.cat([each(time), time.unsqueeze(-1)], -1) for time in (s, t))
        return InterpolatingKernel(left, (after - left.unsqueeze(-1) * before).clamp(min=0.0))


class RevealsPredictedToken(GammaHybrid):  # type: ignore[misc]
    """Fault: masks become clean tokens, although tokens may be redrawn before they are masked."""

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


class ScoreWithoutEvidence(GammaHybrid):  # type: ignore[misc]
    """Fault: `decode` of a score ignores the current state of the row."""

    def decode(self, query: Any, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        def draw(prediction: Any, z: Tensor, u: Tensor) -> Tensor:
            log_p = prediction.log_ratio[:, :NUM_TOKENS].log_softmax(-1)
            root = torch.full_like(z, self.vocabulary.root)
            return DenseDistribution(log_p, self.vocabulary).draw(root, torch.zeros_like(z), u)

        return query(torch.arange(len(zt)), self.scope(zt), draw, zt, u[:, 1])


class FreeDecoding(EpsilonHybrid):  # type: ignore[misc]
    """Fault: the decoding term of visible tokens is 0, although they may have been redrawn."""

    def decode_nll(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return torch.where(
            zt == self.vocabulary.root, super().decode_nll(prediction, x0, zt, t), 0.0
        )


class RawDecoding(EpsilonHybrid):  # type: ignore[misc]
    """Fault: the decoding term ignores the state z: it is -ln p(x) instead of -ln P(x|z)."""

    def decode_nll(
        self, prediction: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        return -prediction.log_prob(x0)


class FalselyClosing(EpsilonHybrid):  # type: ignore[misc]
    """Fault: the process declares z_0 = x, although tokens are redrawn at t = 0."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.closes_at_clean = True


class NeverRedrawnAsItself(EpsilonHybrid):  # type: ignore[misc]
    """Fault: a redrawn token is never the same token."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        drawn = super().sample(x0, t, u)
        redrawn = (drawn == x0) & (u[:, 0] >= self.alpha(t))
        return torch.where(redrawn, (x0 + 1) % NUM_TOKENS, drawn)


FAULTS = [
    Fault(
        "the density is the published loss",
        derived_formulas.density_is_derived,
        gamma_hybrid(),
        gamma_hybrid(PublishedAsBound),
    ),
    Fault(
        "the bound has the published loss as density",
        bound.constant_denoiser,
        gamma_hybrid(),
        gamma_hybrid(PublishedAsBound),
    ),
    Fault(
        "the density has e^sigma for e^(gamma sigma)",
        derived_formulas.density_is_derived,
        gamma_hybrid(),
        gamma_hybrid(TotalNoiseInDensity),
    ),
    Fault(
        "samples have e^sigma for e^(gamma sigma)",
        draws.sample_follows_marginal,
        gamma_hybrid(),
        gamma_hybrid(TotalNoiseInSample),
    ),
    Fault(
        "the rates are interpolating",
        chain.transition_is_oracle,
        gamma_hybrid(),
        gamma_hybrid(InterpolatingRates),
    ),
    Fault(
        "rates and transitions are interpolating",
        rates_are_the_papers,
        gamma_hybrid(),
        gamma_hybrid(InterpolatingTransitions),
    ),
    Fault(
        "masks become clean tokens",
        draws.step_follows_posterior,
        gamma_hybrid(),
        gamma_hybrid(RevealsPredictedToken),
    ),
    Fault(
        "decode with a score ignores the own state",
        reverse_process.scores_are_decoded,
        gamma_hybrid(),
        gamma_hybrid(ScoreWithoutEvidence),
    ),
    Fault(
        "the decoding term is missing",
        derived_formulas.decode_nll_is_derived,
        epsilon_hybrid(),
        epsilon_hybrid(FreeDecoding),
    ),
    Fault(
        "the bound has no decoding term",
        bound.constant_denoiser,
        epsilon_hybrid(),
        epsilon_hybrid(FreeDecoding),
    ),
    Fault(
        "the decoding term is -ln p(x)",
        bound.constant_denoiser,
        epsilon_hybrid(),
        epsilon_hybrid(RawDecoding),
    ),
    Fault(
        "the process does not end as declared",
        chain.ends_as_declared,
        epsilon_hybrid(),
        epsilon_hybrid(FalselyClosing),
    ),
    Fault(
        "a token is never redrawn as itself",
        draws.sample_follows_marginal,
        epsilon_hybrid(),
        epsilon_hybrid(NeverRedrawnAsItself),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)


def test_interpolating_process_passes_chain_checks_but_differs_from_published_rates() -> None:
    """A consistent process with another generator obeys all laws of `ddiff.testing`."""
    other = gamma_hybrid(InterpolatingTransitions)()
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
def test_entropy_check_rejects_a_network_that_conditions_on_the_state_of_the_position(
    process: Any,
) -> None:
    """The published loss of the epsilon hybrid trains P(x_i | all states).

    The bound requires P(x_i | states of the other positions).
    """
    assert bound.entropy_equality(process).passed
    assert bound.entropy_equality(process, denoiser=full_conditional_table).error > 0.05  # nats


def test_published_epsilon_hybrid_loss_is_minimal_at_full_conditional() -> None:
    """The expected cross-entropy at a visible token is minimal for the full conditional P(x | z).

    The conditional given only the states of other positions has a larger loss, unless it is
    multiplied by the likelihood q_t(z_i|x_i) of the position's own state.
    """
    process = epsilon_hybrid()()
    log_joint = random_joint(NUM_TOKENS)
    t = times((0.4,))
    seen = process.log_likelihood(torch.arange(NUM_TOKENS), t.expand(NUM_TOKENS)).exp().T  # [x, z]
    chance = torch.einsum("ab,ai,bj->aij", log_joint.exp(), seen, seen)  # first token, both states
    first, second = torch.cartesian_prod(torch.arange(NUM_TOKENS), torch.arange(NUM_TOKENS)).T
    states, now = torch.stack([first, second], -1), t.expand(NUM_TOKENS * NUM_TOKENS)
    loss = EverywhereCrossEntropy()

    def expected(log_p: Tensor, plain: bool) -> float:
        total = 0.0
        for x in range(NUM_TOKENS):
            x0 = torch.full_like(first, x)
            dist = DenseDistribution(log_p, process.vocabulary)
            nll = -dist.log_prob(x0) if plain else loss.divergence(process, dist, x0, first, now)
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
