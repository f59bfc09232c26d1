"""Special cases of processes agree with each other and with published formulas."""

from __future__ import annotations

import math

import pytest
import torch
from chains import PAIR, HumpedNoise, masked, uniform
from torch import Tensor

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.prediction import DenseDistribution, Score
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import CosineSchedule, LinearSchedule, PowerSchedule, Schedule
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.testing.probes import INNER, ReachableRows, product, random_log_probs, times

# relative rounding of a few dozen float64 operations on numbers up to 1e3 (weights at t = 0.02)
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
SCHEDULES: list[Schedule] = [LinearSchedule(), CosineSchedule(), PowerSchedule(2.5)]


def density_at(process: ForwardProcess, rows: ReachableRows) -> Tensor:
    return process.density(rows.dist, *rows.args)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_one_level_tree_process_equals_absorbing_mixture_process(schedule: Schedule) -> None:
    tree = TreeProcess(FlatVocabulary(4), CdfClock([schedule]))
    mixture = masked(schedule)  # type: ignore[arg-type]
    rows = ReachableRows(tree, times(INNER))
    torch.testing.assert_close(density_at(tree, rows), density_at(mixture, rows), **CLOSE)
    for s in (0.0, 0.3):
        start = s * rows.t
        steps = [
            p.reverse_log_probs(rows.log_p, rows.zt, rows.t, start).exp() for p in (tree, mixture)
        ]
        torch.testing.assert_close(*steps, **CLOSE)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_masked_diffusion_loss_equals_absorbing_score_entropy(schedule: Schedule) -> None:
    """Eq. 10 of arXiv 2406.07524 (MDLM) equals the score entropy of arXiv 2310.16834 (SEDD).

    A prediction p has the score s(y) = alpha/(1-alpha) p(y) at the mask.
    """
    process = TreeProcess(FlatVocabulary(4), CdfClock([schedule]))
    log_p, x0, t = (
        random_log_probs(4, 4)[:, None].expand(-1, 5, -1).reshape(20, 4),
        torch.arange(20) % 4,
        times(INNER).repeat(4),
    )
    zt = torch.full((20,), 4)
    alpha = schedule.alpha(t)
    ratio = torch.cat([log_p + (alpha / (1.0 - alpha)).log().unsqueeze(-1), torch.zeros(20, 1)], -1)
    expected = (
        -schedule.d_alpha(t) / (1.0 - alpha) * -log_p.gather(-1, x0.unsqueeze(-1)).squeeze(-1)
    )
    torch.testing.assert_close(process.density(Score(ratio), x0, zt, t), expected, **CLOSE)
    torch.testing.assert_close(
        process.density(DenseDistribution(log_p, process.vocabulary), x0, zt, t), expected, **CLOSE
    )


def test_uniform_noise_loss_equals_score_entropy_of_the_sedd_paper() -> None:
    """The formula of arXiv 2310.16834 holds for any prediction.

    It is sigma'/N sum_{y != z} ( s_theta - s ln s_theta + s (ln s - 1) ), with the noise sigma, N
    tokens, and the true and predicted score s and s_theta of y at the state z.
    """
    process, size = uniform(4), 4
    rows = ReachableRows(process, times(INNER))
    alpha = (1.0 - rows.t).unsqueeze(-1)
    q = (1.0 - alpha) / size + alpha * torch.nn.functional.one_hot(rows.x0, size)
    q_bar = (1.0 - alpha) / size + alpha * rows.log_p.exp()
    pick = rows.zt.unsqueeze(-1)
    s, s_theta = q / q.gather(-1, pick), q_bar / q_bar.gather(-1, pick)
    terms = s_theta - s * s_theta.log() + s * (s.log() - 1.0)
    expected = terms.scatter(-1, pick, 0.0).sum(-1) / (1.0 - rows.t) / size
    torch.testing.assert_close(density_at(process, rows), expected, **CLOSE)


def masses(gamma: float, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return alpha, beta_c, beta_m and beta_m' at time t by the formulas of arXiv 2510.08632.

    They are the probabilities of the token, cluster and mask level, and the derivative of the last.
    """
    u = 1.0 - t
    alpha = u**gamma
    if gamma == 1.0:
        beta_c, d_beta_m = -u * u.log(), -u.log()
    else:
        beta_c = gamma * (u - u**gamma) / (gamma - 1.0)
        d_beta_m = gamma * (1.0 - u ** (gamma - 1.0)) / (gamma - 1.0)
    return alpha, beta_c, 1.0 - alpha - beta_c, d_beta_m


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.0])
def test_two_level_tree_loss_equals_cross_entropies_of_the_hdlm_paper(gamma: float) -> None:
    process = TreeProcess(PAIR, LogTimeClock((gamma, 1.0)))
    rows = ReachableRows(process, times(INNER))
    _, beta_c, beta_m, d_beta_m = masses(gamma, rows.t)
    d_alpha = -gamma * (1.0 - rows.t) ** (gamma - 1.0)
    level = PAIR.level_of(rows.zt)
    log_cluster = rows.dist.log_prob(PAIR.parent(rows.x0))
    log_word = rows.dist.log_prob(rows.x0) - log_cluster
    expected = torch.where(
        level == 2, -d_beta_m / beta_m * log_cluster, d_alpha / beta_c * log_word
    )
    # beta_m is a difference of numbers near 1: at t = 0.02 it keeps 12 digits
    torch.testing.assert_close(
        density_at(process, rows), torch.where(level == 0, 0.0, expected), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.0])
def test_level_transitions_equal_the_formulas_of_the_hdlm_paper(gamma: float) -> None:
    s, t = product(times((0.0, 0.2, 0.5)), times((0.5, 0.7, 0.95)))
    ratio = (1.0 - t) / (1.0 - s)
    to_cluster = masses(gamma, 1.0 - ratio)[1]  # token -> own cluster is beta_c at u = ratio
    got = LogTimeClock((gamma, 1.0)).transition(s, t)
    rows = {
        (0, 0): ratio**gamma, (0, 1): to_cluster, (0, 2): 1.0 - ratio**gamma - to_cluster,
        (1, 1): ratio, (1, 2): 1.0 - ratio, (2, 2): torch.ones_like(t), (1, 0): torch.zeros_like(t),
    }  # fmt: skip
    for (i, j), expected in rows.items():
        torch.testing.assert_close(got[:, i, j], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("xi", [0.9, 0.8])
def test_tree_loss_with_stochastic_parents_equals_closed_form(xi: float) -> None:
    """Compare the integrand of the bound with a formula for clusters that may be wrong.

    rho_x is the distribution of clusters for the token x, rho^ its mean under the prediction p, and
    w_m and w_c are the weights of masks and clusters. The integrand is w_m KL(rho_x || rho^) at
    masks and -w_c ln[ rho_x(k) p(x) / rho^_k ] at cluster k.
    """
    process = TreeProcess(PAIR, LogTimeClock((1.0, 1.0)), xi)
    rows = ReachableRows(process, times(INNER))
    _, beta_c, beta_m, d_beta_m = masses(1.0, rows.t)
    cluster = torch.tensor([4, 5])
    right = (PAIR.parent(rows.x0).unsqueeze(-1) == cluster).double()
    rho = xi * right + (1.0 - xi) * (1.0 - right)
    mass = rows.dist.log_mass(1).exp()
    rho_hat = xi * mass + (1.0 - xi) * (1.0 - mass)
    at_mask = d_beta_m / beta_m * (rho * (rho / rho_hat).log()).sum(-1)
    pick = (rows.zt - 4).clamp(0, 1).unsqueeze(-1)
    evidence = (rho / rho_hat).gather(-1, pick).squeeze(-1).log()
    at_cluster = -(evidence + rows.dist.log_prob(rows.x0)) / beta_c
    level = PAIR.level_of(rows.zt)
    expected = torch.where(level == 2, at_mask, torch.where(level == 1, at_cluster, 0.0))
    torch.testing.assert_close(density_at(process, rows), expected, rtol=1e-10, atol=1e-10)


def test_gidd_noise_without_uniform_part_equals_masked_diffusion() -> None:
    flat, tree = HumpedNoise(0.0), TreeProcess(FlatVocabulary(3), LogTimeClock((1.0,)))
    rows = ReachableRows(tree, times(INNER))
    torch.testing.assert_close(density_at(flat, rows), density_at(tree, rows), **CLOSE)


def test_interpolating_process_with_gidd_noise_has_the_gidd_weights() -> None:
    """The weights of arXiv 2503.04482 (GIDD) are omega/q; those of ddiff are omega (1 - q)/q.

    omega is the total rate of arrival in the state z, and q = q_t(z|x). For gamma = 1, omega/q is
    1/(t(1-t)) at the mask, 1/(2t(1-t)) at a wrong token, and a longer formula at the clean token.
    omega (1 - q)/q is the true reverse rate out of z.
    """
    process, size = HumpedNoise(0.2), 3
    rows = ReachableRows(process, times(INNER))
    t, c = rows.t, process.height * (rows.t * (1.0 - rows.t)).sqrt()
    d_c = 0.5 * (1.0 - 2.0 * t) / (t * (1.0 - t)) * c
    own = (c + (1.0 - t) * d_c) / (size * (1.0 - t) * (1.0 - t + c / size))
    both = t * (1.0 - t)
    expected = torch.where(
        rows.zt == size, 1.0 / both, torch.where(rows.zt == rows.x0, own, 0.5 / both)
    )
    torch.testing.assert_close(
        process.weight(rows.x0, rows.zt, t), expected * (1.0 - rows.weight), **CLOSE
    )


def test_tree_posterior_can_turn_a_mask_into_a_leaf_token_in_one_step() -> None:
    """A mask at t is the token x at s with probability alpha_s P(token -> mask) p(x) / beta_m(t).

    beta_m(t) is the probability of the mask at t. In the published sampler, a mask at t is always a
    mask or a cluster at s.
    """
    process, s, t = TreeProcess(PAIR, LogTimeClock((0.5, 1.0))), times((0.3,)), times((0.8,))
    log_p = random_log_probs(4, 1)
    alpha = masses(0.5, s)[0]
    ratio = (1.0 - t) / (1.0 - s)
    jump = 1.0 - ratio**0.5 - masses(0.5, 1.0 - ratio)[1]
    got = process.reverse_log_probs(log_p, torch.tensor([PAIR.root]), t, s).exp()
    expected = alpha * jump / masses(0.5, t)[2] * log_p.exp()
    torch.testing.assert_close(got[:, :4], expected, **CLOSE)
    assert float(expected.sum()) > 0.05
    assert math.isclose(float(got.sum()), 1.0, rel_tol=1e-12)
