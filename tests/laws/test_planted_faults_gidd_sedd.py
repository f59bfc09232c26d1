"""Faults planted in the gidd and sedd processes; each must be detected by one conformance check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddiff_gidd.losses import Dynamic
from ddiff_gidd.process import MIXINGS, Form, GeneralizedInterpolation
from ddiff_sedd.head import RatioDistribution, Ratios
from ddiff_sedd.process import ScoreEntropyDiffusion
from faults import Fault, assert_detected, full_conditional_table
from torch import Tensor

from ddiff import FlatVocabulary, MixtureProcess, Score
from ddiff.core.schedule import GeometricSchedule, Schedule
from ddiff.testing import bound, chain, derived_formulas, schedule
from ddiff.testing.probes import INNER, ReachableRows, times

VOCABULARY = FlatVocabulary(3)


def mixed(
    kind: type[GeneralizedInterpolation] = GeneralizedInterpolation,
    gamma: float = 1.0,
    form: Form = "current",
) -> GeneralizedInterpolation:
    return kind(VOCABULARY, MIXINGS[form](0.2, gamma, 3))


# ---------------------------------------------------------------------- mask and uniform noise


class SnrWeight(GeneralizedInterpolation):
    """Fault: the weight is the "snr" weight of a training loss instead of that of the bound."""

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return Dynamic("snr").weight(self, x0, zt, t)


class SigmoidWeight(GeneralizedInterpolation):
    """Fault: the weight is the "sigmoid" weight of a training loss instead of that of the bound."""

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return Dynamic("sigmoid").weight(self, x0, zt, t)


class ClippedBound(GeneralizedInterpolation):
    """Fault: the weight of the bound is clipped at 2."""

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().weight(x0, zt, t).clamp(0.0, 2.0)


class ConstantUniformNoise(GeneralizedInterpolation):
    """Fault: the rates lack the derivative c' of the uniform noise c, as if c were constant."""

    def d_coefficients(self, t: Tensor) -> Tensor:
        slope = super().d_coefficients(t)
        return torch.stack([slope[:, 0], torch.zeros_like(t)], -1)


class MissingGamma(GeneralizedInterpolation):
    """Fault: the derivative of v^g lacks the factor g, where v = 1 - t and g = gamma.

    The published formula has this error; it is correct only for g = 1.
    """

    def d_alpha(self, t: Tensor) -> Tensor:
        return super().d_alpha(t) + self._missing(t) * (1.0 - self.alpha(t))

    def d_coefficients(self, t: Tensor) -> Tensor:
        return super().d_coefficients(t) - self._missing(t).unsqueeze(-1) * self.coefficients(t)

    def _missing(self, t: Tensor) -> Tensor:
        """Return (g - 1) v^(g-1)/C, the error of the derivative, for the normalizer C of q_t."""
        gamma = self.mixing.gamma
        left = 1.0 - t + self.mixing.per_token ** (2.0 / gamma)
        return (gamma - 1.0) * left ** (gamma - 1.0) * self.coefficients(t)[:, 0] / t**gamma


class DivergencePlusOne(GeneralizedInterpolation):
    """Fault: the divergence lacks the term -1, as in an older version of the paper."""

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().divergence(prediction, x0, zt, t) + 1.0


class InactiveTokens(GeneralizedInterpolation):
    """Fault: only masks add to the bound, as if visible tokens were always correct."""

    def active(self, zt: Tensor) -> Tensor:
        return zt == self.vocabulary.root


class FreeDecodingOfTokens(GeneralizedInterpolation):
    """Fault: the decoding term of visible tokens is 0, although noise may have replaced them."""

    def decode_nll(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return torch.where(
            zt == self.vocabulary.root, super().decode_nll(prediction, x0, zt, t), 0.0
        )


# ---------------------------------------------------------------------- scores


def absorbing(kind: type[MixtureProcess] = MixtureProcess) -> MixtureProcess:
    return _as(
        kind, ScoreEntropyDiffusion.build(ScoreEntropyDiffusion.Config(), vocabulary=VOCABULARY)
    )


def uniform(kind: type[MixtureProcess] = MixtureProcess) -> MixtureProcess:
    config = ScoreEntropyDiffusion.Config(
        graph="uniform", noise="geometric", sigma_min=0.05, sigma_max=3.0
    )
    return _as(kind, ScoreEntropyDiffusion.build(config, vocabulary=FlatVocabulary(3, mask=False)))


def _as(kind: type[MixtureProcess], process: MixtureProcess) -> MixtureProcess:
    return kind(process.vocabulary, process.schedule, process.target)


class UnscaledScores(MixtureProcess):  # type: ignore[misc]
    """Fault: the score of a prediction p at the mask is p instead of p/(e^sigma - 1)."""

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        if isinstance(prediction, Score):
            growth = (self.schedule.one_minus_alpha(t) / self.schedule.alpha(t)).log()
            masked = torch.where(zt == self.vocabulary.root, growth, 0.0).unsqueeze(-1)
            prediction = Score((prediction.log_ratio + masked).scatter(-1, zt.unsqueeze(-1), 0.0))
        return super().divergence(prediction, x0, zt, t)


class ScoresOfHalfTheNoise(MixtureProcess):  # type: ignore[misc]
    """Fault: the score is computed for half the noise sigma."""

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().divergence(
            Score(0.5 * prediction.log_ratio) if isinstance(prediction, Score) else prediction,
            x0,
            zt,
            t,
        )


class FalselyClosing(MixtureProcess):  # type: ignore[misc]
    """Fault: geometric noise declares z_0 = x and q_1 = prior, which are only approximate."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.closes_at_clean = self.closes_at_prior = True


class SlopeWithoutLogarithm(GeometricSchedule):  # type: ignore[misc]
    """Fault: d sigma/dt lacks the factor ln(sigma_max/sigma_min)."""

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.sigma(t) * self.alpha(t)


class FalselyClosingAtClean(GeometricSchedule):  # type: ignore[misc]
    """Fault: a schedule with noise at t = 0 declares that it starts at the clean token."""

    closes_at_clean = True


class SubtractedAlpha(GeometricSchedule):  # type: ignore[misc]
    """Fault: 1 - alpha is computed by subtraction, which loses digits at low noise."""

    one_minus_alpha = Schedule.one_minus_alpha


FAULTS = [
    Fault(
        "the density has the snr weight",
        derived_formulas.density_is_derived,
        mixed,
        lambda: mixed(SnrWeight),
    ),
    Fault("the bound has the snr weight", bound.constant_denoiser, mixed, lambda: mixed(SnrWeight)),
    Fault(
        "the bound has the sigmoid weight",
        bound.entropy_equality,
        mixed,
        lambda: mixed(SigmoidWeight),
    ),
    Fault(
        "the bound has a clipped weight",
        bound.constant_denoiser,
        mixed,
        lambda: mixed(ClippedBound),
    ),
    Fault(
        "the rates lack c'",
        chain.transition_is_oracle,
        mixed,
        lambda: mixed(ConstantUniformNoise),
    ),
    Fault(
        "the bound lacks c'",
        bound.constant_denoiser,
        mixed,
        lambda: mixed(ConstantUniformNoise),
    ),
    Fault(
        "(v^gamma)' lacks gamma in the rates",
        chain.transition_is_oracle,
        lambda: mixed(gamma=2.0, form="original"),
        lambda: mixed(MissingGamma, 2.0, "original"),
    ),
    Fault(
        "(v^gamma)' lacks gamma in the bound",
        bound.constant_denoiser,
        lambda: mixed(gamma=2.0, form="original"),
        lambda: mixed(MissingGamma, 2.0, "original"),
    ),
    Fault(
        "the divergence lacks the term -1",
        derived_formulas.density_is_a_divergence,
        mixed,
        lambda: mixed(DivergencePlusOne),
    ),
    Fault(
        "visible tokens are inactive", bound.entropy_equality, mixed, lambda: mixed(InactiveTokens)
    ),
    Fault(
        "visible tokens have no decoding term",
        derived_formulas.decode_nll_is_derived,
        mixed,
        lambda: mixed(FreeDecodingOfTokens),
    ),
    Fault(
        "the bound has no decoding term at visible tokens",
        bound.constant_denoiser,
        mixed,
        lambda: mixed(FreeDecodingOfTokens),
    ),
    Fault(
        "the score lacks 1/(e^sigma - 1)",
        derived_formulas.density_accepts_scores,
        absorbing,
        lambda: absorbing(UnscaledScores),
    ),
    Fault(
        "the score is that of half the noise",
        derived_formulas.density_accepts_scores,
        uniform,
        lambda: uniform(ScoresOfHalfTheNoise),
    ),
    Fault(
        "the process does not end as declared",
        chain.ends_as_declared,
        uniform,
        lambda: uniform(FalselyClosing),
    ),
    Fault(
        "sigma' lacks its logarithm",
        schedule.derivative_is_autograd,
        lambda: GeometricSchedule(0.05, 3.0),
        lambda: SlopeWithoutLogarithm(0.05, 3.0),
    ),
    Fault(
        "the integral of sigma' lacks its logarithm",
        schedule.one_minus_alpha_is_accurate,
        GeometricSchedule,
        lambda: SlopeWithoutLogarithm(),
    ),
    Fault(
        "the schedule has undeclared noise at t = 0",
        schedule.schedule_ends,
        GeometricSchedule,
        FalselyClosingAtClean,
    ),
    Fault(
        "1 - alpha loses its digits at low noise",
        schedule.one_minus_alpha_is_accurate,
        lambda: GeometricSchedule(1e-9, 1.0),
        lambda: SubtractedAlpha(1e-9, 1.0),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    torch.set_num_threads(1)
    assert_detected(fault)


@pytest.mark.parametrize("form", list(MIXINGS))
def test_entropy_check_rejects_a_network_that_conditions_on_the_state_of_the_position(
    form: Form,
) -> None:
    """Cross-entropy at visible tokens trains P(x|z), conditioned on the position's own state.

    The bound requires a prediction that is not conditioned on this state.
    """
    process = mixed(form=form)
    assert bound.entropy_equality(process).passed
    assert bound.entropy_equality(process, denoiser=full_conditional_table).error > 0.05


def test_score_head_gives_the_exact_bound_only_if_its_output_is_scaled() -> None:
    """The head output ln p + ln V gives the score of p only if the head scales its output."""
    process = absorbing()
    rows = ReachableRows(process, times(INNER))
    raw = torch.nn.functional.pad(rows.log_p + torch.tensor(3.0).double().log(), (0, 1))
    expected = process.density(rows.dist, rows.x0, rows.zt, rows.t)
    charged = {}
    for scaled in (True, False):

        def fn(prediction, idx):
            return process.density(prediction, rows.x0[idx], rows.zt[idx], rows.t[idx])

        parameterization = Ratios(scaled)
        question = parameterization.wrap_callback(
            fn, process, rows.zt, rows.t, parameterization.prepare(process, rows.zt, rows.t)
        )
        charged[scaled] = question(RatioDistribution(raw, VOCABULARY), torch.arange(len(rows.zt)))
    torch.testing.assert_close(charged[True], expected, rtol=1e-10, atol=1e-10)
    assert (charged[False] - expected).abs().max() > 0.05
