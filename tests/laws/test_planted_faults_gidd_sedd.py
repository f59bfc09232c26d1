"""What goes wrong with these two families is found by the kit: each fault is one line away from what passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddiff_gidd.losses import Dynamic
from ddiff_gidd.process import MIXINGS, Form, GeneralizedInterpolation
from ddiff_sedd.head import RatioDistribution, Ratios
from ddiff_sedd.process import ScoreEntropyDiffusion
from faults import Fault, assert_found
from torch import Tensor

from ddiff import FlatVocabulary, MixtureProcess, Score
from ddiff.core.schedule import GeometricSchedule, Schedule
from ddiff.testing import bound, chain, derived_formulas, schedule
from ddiff.testing.bound import full_conditional_table

WORDS = FlatVocabulary(3)


def mixed(
    kind: type[GeneralizedInterpolation] = GeneralizedInterpolation,
    gamma: float = 1.0,
    form: Form = "current",
) -> GeneralizedInterpolation:
    return kind(WORDS, MIXINGS[form](0.2, gamma, 3))


# ---------------------------------------------------------------------- mask and uniform noise


class TrainedWeight(GeneralizedInterpolation):
    """The weight of a training loss where the bound's is due."""

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return Dynamic("snr").weight(self, x0, zt, t)


class TrainedWeightAsIs(GeneralizedInterpolation):
    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return Dynamic("sigmoid").weight(self, x0, zt, t)


class ClippedBound(GeneralizedInterpolation):
    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().weight(x0, zt, t).clamp(0.0, 2.0)


class WithoutTheHumpsSlope(GeneralizedInterpolation):
    """The rates without c': the uniform noise is taken for constant."""

    def d_coefficients(self, t: Tensor) -> Tensor:
        slope = super().d_coefficients(t)
        return torch.stack([slope[:, 0], torch.zeros_like(t)], -1)


class WithoutItsPower(GeneralizedInterpolation):
    """(v^g)' = -v^(g-1), as published before: right for g = 1 only. It changes alpha' and, by C', everything."""

    def d_alpha(self, t: Tensor) -> Tensor:
        return super().d_alpha(t) + self._missing(t) * (1.0 - self.alpha(t))

    def d_coefficients(self, t: Tensor) -> Tensor:
        return super().d_coefficients(t) - self._missing(t).unsqueeze(-1) * self.coefficients(t)

    def _missing(self, t: Tensor) -> Tensor:
        """(g - 1) v^(g-1)/C, v and C both by the factor that makes the word end at t = 1."""
        gamma = self.mixing.gamma
        left = 1.0 - t + self.mixing.per_token ** (2.0 / gamma)
        return (gamma - 1.0) * left ** (gamma - 1.0) * self.coefficients(t)[:, 0] / t**gamma


class WithoutTheMinusOne(GeneralizedInterpolation):
    """The older split, KL + rho - ln rho, without the alpha'/alpha that makes it the bound on average."""

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().divergence(prediction, x0, zt, t) + 1.0


class LeftOutWords(GeneralizedInterpolation):
    """Rows are charged at masks alone, as if words were never wrong."""

    def active(self, zt: Tensor) -> Tensor:
        return zt == self.vocabulary.root


class KeepingWhatIsLeft(GeneralizedInterpolation):
    """What still stands at the end is taken for the word itself, which the uniform noise forbids."""

    def decode_nll(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return torch.where(
            zt == self.vocabulary.root, super().decode_nll(prediction, x0, zt, t), 0.0
        )


# ---------------------------------------------------------------------- scores


def absorbing(kind: type[MixtureProcess] = MixtureProcess) -> MixtureProcess:
    return _as(kind, ScoreEntropyDiffusion.build(ScoreEntropyDiffusion.Config(), vocabulary=WORDS))


def uniform(kind: type[MixtureProcess] = MixtureProcess) -> MixtureProcess:
    config = ScoreEntropyDiffusion.Config(
        graph="uniform", noise="geometric", sigma_min=0.05, sigma_max=3.0
    )
    return _as(kind, ScoreEntropyDiffusion.build(config, vocabulary=FlatVocabulary(3, mask=False)))


def _as(kind: type[MixtureProcess], process: MixtureProcess) -> MixtureProcess:
    return kind(process.vocabulary, process.schedule, process.target)


class Unscaled(MixtureProcess):  # type: ignore[misc]
    """Reads ratios to the mask as if e^sigma - 1 were not in them: the law's own p in place of p/(e^sigma - 1)."""

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        if isinstance(prediction, Score):
            growth = (self.schedule.one_minus_alpha(t) / self.schedule.alpha(t)).log()
            masked = torch.where(zt == self.vocabulary.root, growth, 0.0).unsqueeze(-1)
            prediction = Score((prediction.log_ratio + masked).scatter(-1, zt.unsqueeze(-1), 0.0))
        return super().divergence(prediction, x0, zt, t)


class ScoresForAProcessAtHalfTheNoise(MixtureProcess):  # type: ignore[misc]
    """The ratios of e^(sigma/2) where those of e^sigma are due."""

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().divergence(
            Score(0.5 * prediction.log_ratio) if isinstance(prediction, Score) else prediction,
            x0,
            zt,
            t,
        )


class AsIfClosed(MixtureProcess):  # type: ignore[misc]
    """Geometric noise that is said to end at the prior and to start from the word."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.closes_at_clean = self.closes_at_prior = True


class RatesByTimeNotNoise(GeometricSchedule):  # type: ignore[misc]
    """d sigma/dt without ln(sigma_max/sigma_min)."""

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.sigma(t) * self.alpha(t)


class FromTheWord(GeometricSchedule):  # type: ignore[misc]
    """A noise that has begun before t = 0, said to start from the word."""

    closes_at_clean = True


class BySubtraction(GeometricSchedule):  # type: ignore[misc]
    one_minus_alpha = Schedule.one_minus_alpha


FAULTS = [
    Fault(
        "dynamic weight in the density",
        derived_formulas.density_is_derived,
        mixed,
        lambda: mixed(TrainedWeight),
    ),
    Fault(
        "dynamic weight in the bound", bound.constant_denoiser, mixed, lambda: mixed(TrainedWeight)
    ),
    Fault(
        "dynamic weight as it is in the bound",
        bound.entropy_equality,
        mixed,
        lambda: mixed(TrainedWeightAsIs),
    ),
    Fault(
        "clipped weight in the bound", bound.constant_denoiser, mixed, lambda: mixed(ClippedBound)
    ),
    Fault(
        "c' missing in the rates",
        chain.transition_is_oracle,
        mixed,
        lambda: mixed(WithoutTheHumpsSlope),
    ),
    Fault(
        "c' missing in the bound",
        bound.constant_denoiser,
        mixed,
        lambda: mixed(WithoutTheHumpsSlope),
    ),
    Fault(
        "gamma missing in (v^gamma)', rates",
        chain.transition_is_oracle,
        lambda: mixed(gamma=2.0, form="original"),
        lambda: mixed(WithoutItsPower, 2.0, "original"),
    ),
    Fault(
        "gamma missing in (v^gamma)', bound",
        bound.constant_denoiser,
        lambda: mixed(gamma=2.0, form="original"),
        lambda: mixed(WithoutItsPower, 2.0, "original"),
    ),
    Fault(
        "no -1 beside rho - ln rho",
        derived_formulas.density_is_a_divergence,
        mixed,
        lambda: mixed(WithoutTheMinusOne),
    ),
    Fault("words that are never wrong", bound.entropy_equality, mixed, lambda: mixed(LeftOutWords)),
    Fault(
        "words that are right at the end",
        derived_formulas.decode_nll_is_derived,
        mixed,
        lambda: mixed(KeepingWhatIsLeft),
    ),
    Fault(
        "words that are right at the end, bound",
        bound.constant_denoiser,
        mixed,
        lambda: mixed(KeepingWhatIsLeft),
    ),
    Fault(
        "e^sigma - 1 missing",
        derived_formulas.density_accepts_scores,
        absorbing,
        lambda: absorbing(Unscaled),
    ),
    Fault(
        "ratios of another noise",
        derived_formulas.density_accepts_scores,
        uniform,
        lambda: uniform(ScoresForAProcessAtHalfTheNoise),
    ),
    Fault(
        "open ends said to be closed", chain.ends_as_declared, uniform, lambda: uniform(AsIfClosed)
    ),
    Fault(
        "sigma' without its logarithm",
        schedule.derivative_is_autograd,
        lambda: GeometricSchedule(0.05, 3.0),
        lambda: RatesByTimeNotNoise(0.05, 3.0),
    ),
    Fault(
        "sigma' without its logarithm, integrated",
        schedule.one_minus_alpha_is_accurate,
        GeometricSchedule,
        lambda: RatesByTimeNotNoise(),
    ),
    Fault(
        "noise before t = 0, not declared", schedule.schedule_ends, GeometricSchedule, FromTheWord
    ),
    Fault(
        "digits lost at little noise",
        schedule.one_minus_alpha_is_accurate,
        lambda: GeometricSchedule(1e-9, 1.0),
        lambda: BySubtraction(1e-9, 1.0),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_the_law_meant_for_a_fault_finds_it(fault: Fault) -> None:
    torch.set_num_threads(1)
    assert_found(fault)


@pytest.mark.parametrize("form", list(MIXINGS))
def test_a_law_of_visible_rows_by_cross_entropy_is_no_rest_law(form: Form) -> None:
    """Plain cross-entropy at visible rows gives P(x|z) with the row's own evidence in it: tenths of a nat in the bound."""
    process = mixed(form=form)
    assert bound.entropy_equality(process).passed
    assert bound.entropy_equality(process, denoiser=full_conditional_table).error > 0.05


def test_an_unscaled_reading_is_not_the_score_of_its_law() -> None:
    """What the head says for a law p, ln p + ln V, is the law's score with the scale and something else without."""
    process = absorbing()
    rows = derived_formulas.ReachableRows(process, derived_formulas.times(derived_formulas.INNER))
    raw = torch.nn.functional.pad(rows.log_p + torch.tensor(3.0).double().log(), (0, 1))
    expected, charged = process.density(rows.dist, rows.x0, rows.zt, rows.t), {}
    for scaled in (True, False):

        def fn(prediction, idx):
            return process.density(prediction, rows.x0[idx], rows.zt[idx], rows.t[idx])

        reading = Ratios(scaled)
        question = reading.question(
            fn, process, rows.zt, rows.t, reading.prepared(process, rows.zt, rows.t)
        )
        charged[scaled] = question(RatioDistribution(raw, WORDS), torch.arange(len(rows.zt)))
    torch.testing.assert_close(charged[True], expected, rtol=1e-10, atol=1e-10)
    assert (charged[False] - expected).abs().max() > 0.05
