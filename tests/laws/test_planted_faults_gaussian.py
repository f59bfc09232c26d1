"""Faults planted in Gaussian processes of vectors; each must be detected by one law."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults import Fault, assert_detected
from torch import Tensor

from ddiff.core.gaussian import (
    GaussianDecoder,
    GaussianProcess,
    GridDecoder,
    NormalPrior,
    PredictedMean,
    VectorDecoder,
    to_normal,
)
from ddiff.core.gaussian_schedule import CosineVP, Flow, GaussianSchedule, LinearBetaVP
from ddiff.testing import gaussian_bound, gaussian_draws, gaussian_forward, gaussian_terms

# ---------------------------------------------------------------------- schedules


class FalselyVP(GaussianSchedule):
    """Fault: the linear schedule a = 1 - t, sigma = t is declared variance preserving."""

    preserves_variance = True

    def signal(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def deviation(self, t: Tensor) -> Tensor:
        return t


class RatioOfVariances(CosineVP):  # type: ignore[misc]
    """Fault: `ratio` is SNR instead of its square root, so SNR is squared."""

    def ratio(self, t: Tensor) -> Tensor:
        return super().ratio(t) ** 2


class RisingSnr(GaussianSchedule):
    """Fault: SNR rises again after t = 0.8."""

    def signal(self, t: Tensor) -> Tensor:
        return 1.0 - t + 2.0 * (t - 0.8).clamp(min=0.0)

    def deviation(self, t: Tensor) -> Tensor:
        return t


class FalselyClosing(GaussianProcess):  # type: ignore[misc]
    """Fault: the process declares that q_1 is the prior, although SNR(1) is above 0."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.closes_at_prior = True


class ThousandIndices(GaussianProcess):  # type: ignore[misc]
    """Fault: noise is that of the next of 1000 time indices."""

    def _cut(self, t: Tensor) -> Tensor:
        return (t * 1000.0).ceil() / 1000.0


class ThousandIndicesInSample(ThousandIndices):
    """Fault: `sample` uses 1000 time indices, and the bound uses continuous times."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().sample(x0, self._cut(t), u)


class ThousandIndicesInPosterior(ThousandIndices):
    """Fault: `transition` uses 1000 time indices."""

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return super().transition(self._cut(s), self._cut(t))


# ---------------------------------------------------------------------- outputs


class VelocityWithOtherSign(GaussianProcess):  # type: ignore[misc]
    """Fault: v is sigma x - a eps in both directions."""

    def to_clean(self, kind: Any, output: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().to_clean(kind, -output if kind == "v" else output, zt, t)

    def from_clean(self, kind: Any, clean: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        output = super().from_clean(kind, clean, zt, t)
        return -output if kind == "v" else output


class VarianceInConversion(GaussianProcess):  # type: ignore[misc]
    """Fault: the conversion of eps divides by the variance instead of the deviation."""

    def from_clean(self, kind: Any, clean: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        output = super().from_clean(kind, clean, zt, t)
        return output / self.deviation(t).unsqueeze(-1) if kind == "eps" else output


class AcceptsEverything(GaussianProcess):  # type: ignore[misc]
    """Fault: singular outputs are accepted."""

    def check_output(self, kind: Any) -> None:
        pass


class VelocityOfScheduleTime(GaussianProcess):  # type: ignore[misc]
    """Fault: the velocity is the derivative by the time of the schedule."""

    def velocity(self, clean: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return self.from_clean("u", clean, zt, t)


# ---------------------------------------------------------------------- transition and posterior


class VarianceAsDeviation(GaussianProcess):  # type: ignore[misc]
    """Fault: the transition returns its variance as its deviation."""

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        factor, deviation = super().transition(s, t)
        return factor, deviation**2


class LargerPosteriorVariance(GaussianProcess):  # type: ignore[misc]
    """Fault: a step draws with the deviation of the transition instead of the posterior."""

    def posterior(
        self, clean: Tensor, zt: Tensor, t: Tensor, s: Tensor, eta: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        mean, _ = super().posterior(clean, zt, t, s, eta)
        return mean, eta * self.transition(s, t)[1]


class VarianceOfNextStep(GaussianProcess):  # type: ignore[misc]
    """Fault: the kept noise ignores the drawn noise, so the variance rises with eta."""

    def posterior(
        self, clean: Tensor, zt: Tensor, t: Tensor, s: Tensor, eta: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        mean, _ = super().posterior(clean, zt, t, s, 0.0)
        return mean, super().posterior(clean, zt, t, s, eta)[1]


class DoubleSquareRoot(GaussianProcess):  # type: ignore[misc]
    """Fault: the square root is applied twice to the kept noise, as in published DDIM code."""

    def posterior(
        self, clean: Tensor, zt: Tensor, t: Tensor, s: Tensor, eta: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        mean, drawn = super().posterior(clean, zt, t, s, eta)
        center = self.signal(s).unsqueeze(-1) * clean
        kept = (self.deviation(s) ** 2 - drawn**2).clamp(min=0.0).sqrt().unsqueeze(-1)
        return center + (mean - center) / kept.sqrt(), drawn


# ---------------------------------------------------------------------- draws


def normals_of_logistic(u: Tensor) -> Tensor:
    """Return the logistic approximation of normal numbers, a wrong inverse."""
    return torch.logit(u) / 1.702


class LogisticNoise(GaussianProcess):  # type: ignore[misc]
    """Fault: the noise of `sample` is logistic."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        noise = self.deviation(t).unsqueeze(-1) * normals_of_logistic(u)
        return self.signal(t).unsqueeze(-1) * x0 + noise


class SharedNoise(GaussianProcess):  # type: ignore[misc]
    """Fault: all dimensions have the noise of the first one."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().sample(x0, t, u[:, :1].expand_as(u))


class StepWithVariance(GaussianProcess):  # type: ignore[misc]
    """Fault: `step` multiplies the noise by a variance."""

    def step(self, query: Any, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        clean = query(torch.arange(len(zt)), self.scope(zt), lambda prediction: prediction.mean)
        mean, deviation = self.posterior(clean, zt, t, s)
        return mean + deviation.unsqueeze(-1) ** 2 * to_normal(u)


class EveryRowQueried(GaussianProcess):  # type: ignore[misc]
    """Fault: `step` also queries rows that do not move."""

    def step(self, query: Any, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        query(torch.arange(len(zt)), self.scope(zt), lambda prediction: prediction.mean)
        return super().step(query, zt, t, s, u)


class CenteredNoise(GaussianProcess):  # type: ignore[misc]
    """Fault: the noise of a batch is shifted to the mean 0."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        z = super().sample(x0, t, u)
        return z - (self.deviation(t).unsqueeze(-1) * to_normal(u)).mean(0)


class WritesIntoState(GaussianProcess):  # type: ignore[misc]
    """Fault: `step` writes the result into its argument."""

    def step(self, query: Any, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        return zt.copy_(super().step(query, zt, t, s, u))


class HalfNormalPrior(NormalPrior):
    """Fault: the prior has the deviation 1/2."""

    def draw(self, u: Tensor) -> Tensor:
        return 0.5 * super().draw(u)


class ProcessWithHalfPrior(GaussianProcess):  # type: ignore[misc]
    """Fault: the process has `HalfNormalPrior`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prior = HalfNormalPrior(self.width)


class MeanOverDimensions(GaussianDecoder):  # type: ignore[misc]
    """Fault: the decoder averages over the dimensions."""

    def nll(self, x0: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        return super().nll(x0, y, noise) / x0.shape[-1]


class NoiseOfHalfWidth(GaussianDecoder):  # type: ignore[misc]
    """Fault: draws of the decoder have half the deviation."""

    def draw(self, y: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        return super().draw(y, noise / 2.0, u)


class NearestValue(GridDecoder):  # type: ignore[misc]
    """Fault: the decoder draws the nearest value."""

    def draw(self, y: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        return super().draw(y, noise * 1e-3, u)


# ---------------------------------------------------------------------- bound


class HalfWeight(GaussianProcess):  # type: ignore[misc]
    """Fault: the weight is a quarter of the loss of SNR."""

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return 0.5 * super().weight(x0, zt, t)


class ClippedWeight(GaussianProcess):  # type: ignore[misc]
    """Fault: the weight of the bound is clipped, as in a training loss."""

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().weight(x0, zt, t).clamp(max=5.0)


class UnitWeight(GaussianProcess):  # type: ignore[misc]
    """Fault: the weight is 1, as in the simple loss of published code."""

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class MeanDivergence(GaussianProcess):  # type: ignore[misc]
    """Fault: the divergence is the mean over the dimensions."""

    def divergence(self, prediction: PredictedMean, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().divergence(prediction, x0, zt, t) / self.width


class DirectionOnly(GaussianProcess):  # type: ignore[misc]
    """Fault: the divergence compares directions, and not lengths."""

    def divergence(self, prediction: PredictedMean, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        cosine = torch.nn.functional.cosine_similarity(prediction.mean, x0, dim=-1)
        return 2.0 - 2.0 * cosine


class AbsoluteDivergence(GaussianProcess):  # type: ignore[misc]
    """Fault: the divergence is |x - x_hat| instead of its square."""

    def divergence(self, prediction: PredictedMean, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return (x0 - prediction.mean).abs().sum(-1)


class ForgottenClosing(GaussianProcess):  # type: ignore[misc]
    """Fault: the closing term lacks the variance."""

    def closing_kl(self, prediction: PredictedMean | None, x0: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (self.signal(t).unsqueeze(-1) * x0).square().sum(-1)


class DecodingTwice(GaussianDecoder):  # type: ignore[misc]
    """Fault: the decoding term is counted twice."""

    def nll(self, x0: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        return 2.0 * super().nll(x0, y, noise)


class InformationOfTwice(GaussianProcess):  # type: ignore[misc]
    """Fault: the information lacks the factor 1/2."""

    def information(self, t: Tensor) -> Tensor:
        return 2.0 * super().information(t)


class UnevenInformation(GaussianProcess):  # type: ignore[misc]
    """Fault: the information time is that of SNR^2."""

    def information(self, t: Tensor) -> Tensor:
        return 0.5 * torch.log1p(self.snr(t) ** 2)

    def information_lost(self, t: Tensor) -> Tensor:
        return self.information(torch.zeros_like(t)) - self.information(t)


class GradientOfRoot(GaussianProcess):  # type: ignore[misc]
    """Fault: the divergence is computed as the square of a distance |x - x_hat|, of 0 at t = 1."""

    def divergence(self, prediction: PredictedMean, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        difference = (x0 - prediction.mean) * (t < 1.0).unsqueeze(-1)
        return difference.square().sum(-1).sqrt() ** 2


# ---------------------------------------------------------------------- table


def on(schedule: Callable[[], GaussianSchedule], *ends: float) -> Callable[[], GaussianProcess]:
    """Return a builder of a process of width 2 on a schedule, with ends of log SNR."""
    return lambda: GaussianProcess(schedule(), 2, *ends)


def cosine(kind: type[GaussianProcess], *ends: float) -> Callable[[], GaussianProcess]:
    """Return a builder of a process of width 2 on the cosine schedule."""
    return lambda: kind(CosineVP(), 2, *ends)


def linear(kind: type[GaussianProcess]) -> Callable[[], GaussianProcess]:
    """Return a builder of a process of width 2 on the linear schedule, whose SNR(1) is above 0."""
    return lambda: kind(LinearBetaVP(), 2)


def decoding(kind: type[VectorDecoder]) -> Callable[[], GaussianProcess]:
    """Return a builder of a process of width 2 with a decoder of continuous data."""
    return lambda: GaussianProcess(CosineVP(), 2, 30.0, -30.0, decoder=kind())


def on_values(kind: type[GridDecoder]) -> Callable[[], GaussianProcess]:
    """Return a builder of a process of width 1 with a decoder of values on a grid."""
    values = torch.tensor([-1.0, 0.0, 1.0])
    return lambda: GaussianProcess(CosineVP(), 1, 4.0, decoder=kind(values))


FORWARD_FAULTS = [
    Fault(
        "ratio returns SNR",
        gaussian_forward.snr_is_derived,
        on(CosineVP),
        on(RatioOfVariances),
    ),
    Fault("SNR rises again", gaussian_forward.snr_falls, on(Flow), on(RisingSnr)),
    Fault(
        "a process with SNR(1) above 0 declares that it closes",
        gaussian_forward.closes_as_declared,
        linear(GaussianProcess),
        linear(FalselyClosing),
    ),
    Fault(
        "a linear schedule is declared VP and is not",
        gaussian_forward.variance_is_preserved,
        on(CosineVP),
        on(FalselyVP),
    ),
    Fault(
        "eps divides by a variance",
        gaussian_forward.outputs_round_trip,
        linear(GaussianProcess),
        linear(VarianceInConversion),
    ),
    Fault(
        "v has the other sign in both directions",
        gaussian_forward.outputs_are_defined,
        cosine(GaussianProcess),
        cosine(VelocityWithOtherSign),
    ),
    Fault(
        "eps is accepted at SNR(1) = 0",
        gaussian_forward.outputs_are_refused,
        cosine(GaussianProcess),
        cosine(AcceptsEverything),
    ),
    Fault(
        "the velocity is by the time of the schedule",
        gaussian_forward.velocity_is_a_derivative,
        cosine(GaussianProcess),
        cosine(VelocityOfScheduleTime),
    ),
    Fault(
        "the transition returns a variance",
        gaussian_forward.transition_composes,
        cosine(GaussianProcess),
        cosine(VarianceAsDeviation),
    ),
    Fault(
        "times of the transition are cut to 1000 indices",
        gaussian_forward.transition_composes,
        on(LinearBetaVP),
        lambda: ThousandIndicesInPosterior(LinearBetaVP(), 2),
    ),
    Fault(
        "a step has the deviation of the transition",
        gaussian_forward.posterior_is_bayes,
        cosine(GaussianProcess),
        cosine(LargerPosteriorVariance),
    ),
    Fault(
        "drawn noise is added to all the kept noise",
        gaussian_forward.posterior_keeps_marginals,
        cosine(GaussianProcess),
        cosine(VarianceOfNextStep),
    ),
    Fault(
        "the square root is applied twice in DDIM",
        gaussian_forward.deterministic_step_is_exact,
        cosine(GaussianProcess),
        cosine(DoubleSquareRoot),
    ),
]
DRAW_FAULTS = [
    Fault(
        "normals come from a wrong inverse",
        gaussian_draws.sample_follows_marginal,
        cosine(GaussianProcess),
        cosine(LogisticNoise),
    ),
    Fault(
        "all dimensions share their noise",
        gaussian_draws.sample_follows_marginal,
        cosine(GaussianProcess),
        cosine(SharedNoise),
    ),
    Fault(
        "times of sample are cut to 1000 indices",
        gaussian_draws.sample_follows_marginal,
        cosine(GaussianProcess),
        cosine(ThousandIndicesInSample),
    ),
    Fault(
        "a step uses a variance as a deviation",
        gaussian_draws.step_follows_posterior,
        cosine(GaussianProcess),
        cosine(StepWithVariance),
    ),
    Fault(
        "the prior has half the deviation",
        gaussian_draws.prior_is_standard_normal,
        cosine(GaussianProcess),
        cosine(ProcessWithHalfPrior),
    ),
    Fault(
        "the decoder averages over dimensions",
        gaussian_draws.decoder_normalizes,
        decoding(GaussianDecoder),
        decoding(MeanOverDimensions),
    ),
    Fault(
        "the decoder draws with half the deviation",
        gaussian_draws.decode_follows_nll,
        decoding(GaussianDecoder),
        decoding(NoiseOfHalfWidth),
    ),
    Fault(
        "the decoder draws the nearest value",
        gaussian_draws.decode_follows_nll,
        on_values(GridDecoder),
        on_values(NearestValue),
    ),
    Fault(
        "rows that do not move are queried",
        gaussian_draws.draws_query_once,
        cosine(GaussianProcess),
        cosine(EveryRowQueried),
    ),
    Fault(
        "the noise of a batch is centered",
        gaussian_draws.draws_are_independent,
        cosine(GaussianProcess),
        cosine(CenteredNoise),
    ),
    Fault(
        "step writes into its argument",
        gaussian_draws.arguments_are_unchanged,
        cosine(GaussianProcess),
        cosine(WritesIntoState),
    ),
]
BOUND_FAULTS = [
    Fault(
        "a square root of 0 has no gradient",
        gaussian_terms.gradients_are_finite,
        cosine(GaussianProcess),
        cosine(GradientOfRoot),
    ),
    Fault(
        "the closing term lacks the variance",
        gaussian_terms.closing_is_a_divergence,
        linear(GaussianProcess),
        linear(ForgottenClosing),
    ),
    Fault(
        "the information lacks a factor 1/2",
        gaussian_terms.information_is_normal,
        cosine(GaussianProcess),
        cosine(InformationOfTwice),
    ),
    Fault(
        "the information time is that of SNR^2",
        gaussian_terms.information_time_is_even,
        cosine(GaussianProcess),
        cosine(UnevenInformation),
    ),
    Fault(
        "the divergence is a mean over dimensions",
        gaussian_terms.density_is_a_product,
        cosine(GaussianProcess),
        cosine(MeanDivergence),
    ),
    Fault(
        "the divergence compares directions only",
        gaussian_terms.density_is_a_product,
        cosine(GaussianProcess),
        cosine(DirectionOnly),
    ),
    Fault(
        "the weight is halved",
        gaussian_terms.weight_integrates,
        cosine(GaussianProcess),
        cosine(HalfWeight),
    ),
    Fault(
        "the weight is clipped",
        gaussian_bound.constant_prediction,
        cosine(GaussianProcess),
        cosine(ClippedWeight),
    ),
    Fault(
        "the divergence is not squared",
        gaussian_bound.other_predictions_are_worse,
        cosine(GaussianProcess),
        cosine(AbsoluteDivergence),
    ),
    Fault(
        "the weight is 1",
        gaussian_bound.schedule_does_not_matter,
        cosine(GaussianProcess),
        cosine(UnitWeight),
    ),
    Fault(
        "a mean over dimensions is no bound",
        gaussian_bound.bound_is_pointwise_tight,
        cosine(GaussianProcess),
        cosine(MeanDivergence),
    ),
    Fault(
        "SNR is squared in the bound",
        gaussian_bound.bound_is_pointwise_tight,
        on(CosineVP),
        on(RatioOfVariances),
    ),
    Fault(
        "decoding is counted twice",
        gaussian_bound.bound_is_tight,
        decoding(GaussianDecoder),
        decoding(DecodingTwice),
    ),
    Fault(
        "times of the noise are cut to 1000 indices",
        gaussian_bound.bound_is_tight,
        cosine(GaussianProcess, 30.0, -30.0),
        cosine(ThousandIndicesInSample, 30.0, -30.0),
    ),
]
FAULTS = [*FORWARD_FAULTS, *DRAW_FAULTS, *BOUND_FAULTS]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_detected(fault)


def test_a_schedule_that_ends_with_other_noise_has_a_closing_term() -> None:
    """sigma(1) = 2 is not the prior, although SNR(1) = 0."""

    class Loud(Flow):  # type: ignore[misc]
        def deviation(self, t: Tensor) -> Tensor:
            return 2.0 * t

    process = GaussianProcess(Loud(), 1)
    assert not process.closes_at_prior
    assert gaussian_forward.closes_as_declared(process).passed
    end = torch.ones(1, dtype=torch.float64)
    kl = process.closing_kl(None, torch.zeros(1, 1, dtype=torch.float64), end)
    assert float(kl) == pytest.approx(0.5 * (4.0 - 1.0 - math.log(4.0)))
