"""GIDD, a process with mask noise and uniform noise: published formulas, limits, loss weights."""

from __future__ import annotations

import pytest
import torch
from ddiff_gidd.losses import Dynamic
from ddiff_gidd.process import MIXINGS, Form, GeneralizedInterpolation
from ddiff_mdlm.process import MaskedDiffusion
from pydantic import ValidationError
from torch import Tensor

from ddiff import ArgumentError, ClippedLoss, FlatVocabulary, HierarchicalVocabulary
from ddiff.core.process import ForwardProcess
from ddiff.testing import assert_laws, check_process
from ddiff.testing.probes import INNER, ReachableRows, likelihoods, times

# Both sides are a few dozen float64 operations on numbers up to 1e4, compared relatively.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
WORDS = 4


def make(
    p_uniform: float = 0.2, gamma: float = 1.0, form: Form = "current", words: int = WORDS
) -> GeneralizedInterpolation:
    return GeneralizedInterpolation(FlatVocabulary(words), MIXINGS[form](p_uniform, gamma, words))


def name_of(process: ForwardProcess) -> str:
    assert isinstance(process, GeneralizedInterpolation)
    return str(process.mixing)


@pytest.mark.parametrize("process", GeneralizedInterpolation.examples(), ids=name_of)
def test_gidd_passes_every_conformance_check_in_every_setting(process: ForwardProcess) -> None:
    torch.set_num_threads(1)
    assert_laws(check_process(process))


# ---------------------------------------------------------------------- published formulas


def hump(process: GeneralizedInterpolation, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (c_t, dc_t/dt), where c_t is the unnormalized uniform noise in arXiv 2503.04482."""
    p, gamma = process.mixing.p_uniform, process.mixing.gamma  # type: ignore[attr-defined]
    c = 2.0**gamma * p / (1.0 - p) * (t * (1.0 - t)) ** (gamma / 2)
    return c, gamma / 2 * (1.0 - 2.0 * t) / (t * (1.0 - t)) * c


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_gidd_weight_and_bound_integrand_equal_those_of_the_paper(gamma: float) -> None:
    process = make(0.2, gamma)
    rows = ReachableRows(process, times(INNER))
    t, (c, d_c) = rows.t, hump(process, rows.t)
    arriving = c + (1.0 - t) * d_c
    at_mask, at_other = 1.0 / (t * (1.0 - t)), arriving / ((1.0 - t) * c)
    at_clean = arriving / WORDS / ((1.0 - t) * (1.0 - t + c / WORDS))
    weight = torch.where(
        rows.zt == WORDS, at_mask, torch.where(rows.zt == rows.x0, at_clean, at_other)
    )
    # The weight of every process is the rate out of z, which excludes z itself.
    elsewhere = 1.0 - rows.weight
    torch.testing.assert_close(process.weight(rows.x0, rows.zt, t), weight * elsewhere, **CLOSE)

    words = torch.nn.functional.one_hot(rows.x0, WORDS).double()
    both = [
        torch.cat([(1.0 - t)[:, None] * p + (c / WORDS)[:, None], t[:, None]], -1)
        / (1.0 + c)[:, None]
        for p in (words, rows.log_p.exp())
    ]
    q, q_bar = both
    log_rho = (q / q_bar).log().gather(-1, rows.zt.unsqueeze(-1)).squeeze(-1)
    divergence = (q * (q / q_bar).log()).sum(-1) + log_rho.exp() - log_rho - 1.0
    torch.testing.assert_close(
        process.mismatch(rows.dist, rows.x0, rows.zt, t), divergence, **CLOSE
    )
    torch.testing.assert_close(
        process.density(rows.dist, rows.x0, rows.zt, t), weight * divergence, **CLOSE
    )


@pytest.mark.parametrize("form", list(MIXINGS))
def test_mean_gidd_bound_over_states_equals_the_bound_of_the_older_paper(form: Form) -> None:
    """The older bound has the term alpha'/alpha in place of -omega/q.

    omega is the rate of arrival in z_t, and q = q_t(z_t|x). The expectation of omega/q over z_t is
    -alpha'/alpha, so both bounds have the same expectation.
    """
    process, t = make(0.3, 1.5, form), times(INNER)
    for x in range(WORDS):
        states = torch.arange(WORDS + 1)
        chance = likelihoods(process, t)[:, x]
        expected = torch.stack(
            [
                (
                    row / (1.0 - row) * process.weight(torch.full((5,), x), states, one.expand(5))
                ).sum()
                for row, one in zip(chance, t)
            ]
        )
        torch.testing.assert_close(expected, -process.d_alpha(t) / process.alpha(t), **CLOSE)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("p_uniform", [0.0, 0.2, 0.6])
def test_gidd_original_form_equals_published_code_if_alpha_is_positive(
    p_uniform: float, gamma: float
) -> None:
    """Compare alpha and the noise with the formulas of the older published code.

    alpha = (v^g - c)/C, and the noise is t^g/C at the mask and c/C at every token. Here g is gamma,
    p is p_uniform, S is the number of states, and

        v = 1 - t,  1/b = 1 + S (1 - p)/(2 p),  c = b (t v)^(g/2),  C = t^g + v^g + (S - 2) c.

    The published code also uses times at which alpha is negative. In ddiff, time is scaled so that
    alpha(1) = 0.
    """
    process, states = make(p_uniform, gamma, "original"), WORDS + 1
    b = 2.0 * p_uniform / (2.0 * p_uniform + (1.0 - p_uniform) * states)
    end = 1.0 / (1.0 + b ** (2.0 / gamma))
    t = times(INNER)
    gone, left = (t * end) ** gamma, (1.0 - t * end) ** gamma
    c = b * (gone * left).sqrt()
    total = gone + left + (states - 2) * c
    torch.testing.assert_close(process.alpha(t), (left - c) / total, **CLOSE)
    torch.testing.assert_close(
        process.coefficients(t), torch.stack([gone, WORDS * c], -1) / total[:, None], **CLOSE
    )
    assert process.closes_at_prior
    after = (1.0 + end) / 2
    assert p_uniform == 0.0 or (1.0 - after) ** gamma < b * (after * (1.0 - after)) ** (gamma / 2)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_gidd_p_uniform_is_the_uniform_noise_fraction_at_t_one_half(gamma: float) -> None:
    half = times((0.5,))
    assert make(0.3, gamma).coefficients(half)[0, 1].item() == pytest.approx(0.3, abs=1e-14)
    # The original form has noise p/S at every token, at the time 1/2 of the published code.
    process = make(0.3, gamma, "original")
    end = 1.0 / (1.0 + process.mixing.per_token ** (2.0 / gamma))
    assert process.coefficients(half / end)[0, 1].item() == pytest.approx(
        0.3 * WORDS / (WORDS + 1), abs=1e-14
    )


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("gamma", "form"), [(0.5, "current"), (1.0, "current"), (2.0, "current"), (1.0, "original")]
)
def test_gidd_without_uniform_noise_is_masked_diffusion(gamma: float, form: Form) -> None:
    ours = make(0.0, gamma, form)
    masked = MaskedDiffusion.build(MaskedDiffusion.Config(), vocabulary=FlatVocabulary(WORDS))
    rows = ReachableRows(masked, times(INNER))
    densities = [process.density(rows.dist, rows.x0, rows.zt, rows.t) for process in (ours, masked)]
    torch.testing.assert_close(*densities, **CLOSE)
    steps = [
        p.reverse_log_probs(rows.log_p, rows.zt, rows.t, 0.3 * rows.t).exp() for p in (ours, masked)
    ]
    torch.testing.assert_close(*steps, **CLOSE)
    states = torch.arange(WORDS + 1)
    assert ours.active(states).tolist() == masked.active(states).tolist()
    assert ours.is_monotone
    assert ours.prior.log_prob.exp().tolist() == masked.prior.log_prob.exp().tolist()


@pytest.mark.parametrize("form", list(MIXINGS))
@pytest.mark.parametrize("words", [2, 4, 50_000])
def test_gidd_arrival_rates_are_never_negative(form: Form, words: int) -> None:
    """For every allowed setting, rates are >= 0 and alpha falls from 1 to 0.

    Times are as close as 1e-12 to t = 0 and t = 1.
    """
    t = torch.sigmoid(torch.linspace(-27.0, 27.0, 200, dtype=torch.float64))
    for p_uniform in (0.0, 1e-3, 0.2, 0.9, 0.9999):
        for gamma in (0.3, 1.0, 1.5, 2.0):
            process = make(p_uniform, gamma, form, words)
            for state in (0, words):
                rates = process.arrivals_at(torch.full((200,), state), t)
                assert rates.isfinite().all(), (p_uniform, gamma, state)
                assert (rates >= 0).all(), (p_uniform, gamma, state)
            assert (process.alpha(t).diff() <= 0).all()
            assert process.alpha(times((0.0, 1.0))).tolist() == pytest.approx([1.0, 0.0], abs=1e-16)


# ---------------------------------------------------------------------- training weights


def test_gidd_dynamic_weights_equal_the_published_weights() -> None:
    process = make(0.2, 1.5)
    t = times(INNER)
    x0 = torch.zeros(len(t), dtype=torch.long)
    at = lambda loss, state: loss.weight(process, x0, torch.full_like(x0, state), t)  # noqa: E731
    height = 2.0**1.5 * 0.2 / 0.8 / (WORDS + 1)
    alpha = process.alpha(t)
    readings = {"snr": (alpha / (1.0 - alpha)) ** -0.75, "sigmoid": (0.75 / (1.0 + t.exp())).exp()}
    for reading, growth in readings.items():
        loss = Dynamic(reading, largest=1e9)  # type: ignore[arg-type]
        assert (at(loss, WORDS) == 2.0).all()
        assert (at(loss, 1) == 1.0).all()
        torch.testing.assert_close(at(loss, 0), height * growth, **CLOSE)
    assert at(Dynamic("snr", smallest=0.5, largest=1.5), WORDS).tolist() == [1.5] * len(t)
    assert at(Dynamic("snr", smallest=0.5, largest=1.5), 0).min() == 0.5


def test_gidd_snr_weight_is_bound_weight_times_two_t_one_minus_t() -> None:
    """For gamma = 1, the weight "snr" is 2 t (1 - t) times the weight omega/q of the bound.

    The equality is exact at masks and wrong tokens. At the clean token it holds in the limit of
    little uniform noise and many tokens: the error is below 0.2 % for p_uniform = 1e-6 and 1000
    tokens. The weight "sigmoid" is not proportional to omega/q.
    """
    process = make(1e-6, 1.0, words=1000)
    t = times(INNER)
    x0 = torch.zeros(len(t), dtype=torch.long)
    for state, tolerance in ((1000, 1e-9), (1, 1e-9), (0, 2e-3)):
        zt = torch.full_like(x0, state)
        bound = (
            2.0
            * t
            * (1.0 - t)
            * process.arrivals_at(zt, t)
            / process.log_likelihood(zt, t)[:, 0].exp()
        )
        torch.testing.assert_close(
            Dynamic("snr").weight(process, x0, zt, t), bound, rtol=tolerance, atol=0.0
        )
    assert not torch.allclose(
        Dynamic("sigmoid").weight(process, x0, x0, t), bound, rtol=0.5, atol=0.0
    )


# ---------------------------------------------------------------------- invalid arguments


@pytest.mark.parametrize(
    "keys",
    [{"p_uniform": 1.0}, {"p_uniform": -0.1}, {"gamma": 0.0}, {"gamma": 2.5}, {"form": "new"}],
)
def test_gidd_settings_out_of_range_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(keys))):
        GeneralizedInterpolation.Config(**keys)


@pytest.mark.parametrize("form", ["current", "original"])
def test_gidd_refuses_much_noise_before_time_1e_12(form: Form) -> None:
    build = lambda **keys: GeneralizedInterpolation.build(  # noqa: E731
        GeneralizedInterpolation.Config(form=form, **keys), vocabulary=FlatVocabulary(WORDS)
    )
    assert build(p_uniform=0.2, gamma=0.3).closes_at_clean
    with pytest.raises(
        ArgumentError, match=r"p_uniform = 0\.99 and gamma = 0\.3.*t = 1e-12.*larger gamma"
    ):
        build(p_uniform=0.99, gamma=0.3)


@pytest.mark.parametrize(
    "vocabulary", [FlatVocabulary(4, mask=False), HierarchicalVocabulary([[0, 1, 0, 1]])]
)
def test_gidd_refuses_a_vocabulary_without_mask_or_with_clusters(
    vocabulary: FlatVocabulary,
) -> None:
    with pytest.raises(
        ArgumentError, match=r'needs a vocabulary of tokens and a mask.*kind = "flat"'
    ):
        GeneralizedInterpolation.build(GeneralizedInterpolation.Config(), vocabulary=vocabulary)


@pytest.mark.parametrize("loss", [Dynamic, ClippedLoss])
def test_gidd_losses_refuse_a_smallest_weight_above_the_largest_weight(
    loss: type[Dynamic] | type[ClippedLoss],
) -> None:
    with pytest.raises(ArgumentError, match=r"smallest <= largest.*got smallest = 3.*largest = 2"):
        loss(smallest=3.0)


def test_gidd_dynamic_loss_refuses_other_processes() -> None:
    masked = MaskedDiffusion.build(MaskedDiffusion.Config(), vocabulary=FlatVocabulary(WORDS))
    with pytest.raises(ArgumentError, match=r"needs the process gidd.*; got MaskedDiffusion"):
        Dynamic.build(Dynamic.Config(), process=masked)
