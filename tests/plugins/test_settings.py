"""Numerical effect of recipe keys: clocks, schedules, and zeros that must not become defaults."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ddiff_core.objectives import Flat
from ddiff_core.samplers import EntropyBound, Remasking
from ddiff_gidd.losses import Dynamic
from ddiff_gidd.process import GeneralizedInterpolation
from ddiff_hdlm.losses import Empirical, HardTokens
from ddiff_hdlm.process import HierarchicalDiffusion
from ddiff_hybrid.epsilon import EpsilonHybrid
from ddiff_hybrid.gamma import GammaHybrid
from ddiff_hybrid.losses import Published
from ddiff_mdlm.process import MaskedDiffusion
from ddiff_sedd.head import RatioDistribution, Ratios
from ddiff_sedd.process import ScoreEntropyDiffusion
from torch import Tensor

from ddiff import ComponentConfig, FlatVocabulary, HierarchicalVocabulary
from ddiff.core.numerics import EARLIEST, LATEST
from ddiff.core.prediction import DenseDistribution
from ddiff.testing.probes import INNER, likelihoods, times

TWO = HierarchicalVocabulary([[0, 1, 0, 1, 1, 2]])
THREE = HierarchicalVocabulary([[2, 0, 1, 0, 1, 2], [1, 0, 1]])
T = times(INNER)


def levels(process: Any, t: Tensor) -> Tensor:
    """Return the probability [n,L+1] of each level at times t [n], for token 0.

    L is the number of levels above the tokens.
    """
    mass = likelihoods(process, t)[:, 0]
    return torch.stack(
        [part.sum(-1) for part in mass.split(process.vocabulary.level_sizes, -1)], -1
    )


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------- clocks


@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.0])
def test_hdlm_gamma_is_the_rate_of_leaving_the_leaf_tokens(gamma: float) -> None:
    """Compare the level probabilities with formulas.

    The token level has alpha = (1 - t)^gamma, and the cluster level
    beta_c = gamma ((1 - t) - (1 - t)^gamma)/(gamma - 1).
    """
    process = HierarchicalDiffusion.build(HierarchicalDiffusion.Config(gamma=gamma), vocabulary=TWO)
    clean = (1.0 - T) ** gamma
    cluster = gamma * ((1.0 - T) - clean) / (gamma - 1.0)
    close(levels(process, T), torch.stack([clean, cluster, 1.0 - clean - cluster], -1))


def test_hdlm_gamma_is_one_by_default() -> None:
    process = HierarchicalDiffusion.build(HierarchicalDiffusion.Config(), vocabulary=TWO)
    close(levels(process, T)[:, 1], -(1.0 - T) * torch.log1p(-T))


def test_hdlm_rates_are_listed_from_the_lowest_level_up() -> None:
    """With rates = (4, 0.5), the rate of leaving the tokens is 4, so that alpha = (1 - t)^4."""
    process = HierarchicalDiffusion.build(
        HierarchicalDiffusion.Config(rates=(4.0, 0.5)), vocabulary=TWO
    )
    clean = (1.0 - T) ** 4
    cluster = 4.0 * (clean - (1.0 - T) ** 0.5) / (0.5 - 4.0)
    close(levels(process, T), torch.stack([clean, cluster, 1.0 - clean - cluster], -1))


def test_hdlm_gamma_sets_only_the_rate_of_the_token_level() -> None:
    built = [
        HierarchicalDiffusion.build(HierarchicalDiffusion.Config(**keys), vocabulary=THREE)
        for keys in ({"gamma": 2.0}, {"rates": (2.0, 1.0, 1.0)})
    ]
    close(levels(built[0], T), levels(built[1], T))


def test_hdlm_setting_powers_lists_the_lowest_level_first() -> None:
    process = HierarchicalDiffusion.build(
        HierarchicalDiffusion.Config(powers=(0.8, 3.0)), vocabulary=TWO
    )
    close(levels(process, T), torch.stack([1.0 - T**0.8, T**0.8 - T**3, T**3], -1))


def test_hdlm_xi_is_the_probability_of_the_true_parent() -> None:
    process = HierarchicalDiffusion.build(HierarchicalDiffusion.Config(xi=0.7), vocabulary=TWO)
    at_clusters = likelihoods(process, T)[:, 0, 6:9]
    close(at_clusters / at_clusters.sum(-1, keepdim=True), times((0.7, 0.15, 0.15)).expand(5, -1))


@pytest.mark.parametrize(
    ("keys", "alpha"),
    [
        ({"schedule": "linear"}, lambda t: 1.0 - t),
        ({"schedule": "cosine"}, lambda t: 1.0 - torch.sin(math.pi / 2 * t)),
        ({"schedule": "power", "power": 0.4}, lambda t: 1.0 - t**0.4),
        ({"schedule": "power", "power": 2.5}, lambda t: 1.0 - t**2.5),
    ],
    ids=["linear", "cosine", "power .4", "power 2.5"],
)
def test_mdlm_uses_the_named_schedule(keys: dict[str, Any], alpha: Any) -> None:
    process = MaskedDiffusion.build(MaskedDiffusion.Config(**keys), vocabulary=FlatVocabulary(4))
    close(levels(process, T)[:, 0], alpha(T))


# ------------------------------------------------------- zeros that must not become defaults


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
@pytest.mark.parametrize(
    ("keys", "left"), [({}, 1e-3), ({"floor": 0.0}, 0.0), ({"floor": 0.2}, 0.2)], ids=str
)
def test_sedd_floor_is_the_fraction_of_tokens_unchanged_at_t_1(
    graph: Any, keys: dict[str, float], left: float
) -> None:
    vocabulary = FlatVocabulary(3, mask=graph == "absorb")
    process = ScoreEntropyDiffusion.build(
        ScoreEntropyDiffusion.Config(graph=graph, **keys), vocabulary=vocabulary
    )
    close(
        process.schedule.alpha(times((0.0, 0.5, 1.0))), 1.0 - (1.0 - left) * times((0.0, 0.5, 1.0))
    )
    assert process.closes_at_prior == (left == 0.0)


@pytest.mark.parametrize(
    ("keys", "sigmas"),
    [({}, (1e-4, 20.0)), ({"sigma_min": 0.1}, (0.1, 20.0)), ({"sigma_max": 3.0}, (1e-4, 3.0))],
    ids=str,
)
def test_sedd_geometric_noise_runs_from_sigma_min_to_sigma_max(
    keys: dict[str, float], sigmas: tuple[float, float]
) -> None:
    config = ScoreEntropyDiffusion.Config(noise="geometric", **keys)
    schedule = ScoreEntropyDiffusion.build(config, vocabulary=FlatVocabulary(3)).schedule
    least, most = sigmas
    close(schedule.alpha(T), torch.exp(-(least ** (1.0 - T)) * most**T))


def test_remasking_component_does_not_replace_eta_0_by_the_default() -> None:
    for setting, default in (
        ("cap", 0.008),
        ("rescale", 0.015),
        ("confidence", 1.0),
        ("loop", 0.02),
    ):
        zero = Remasking.Config(setting=setting, eta=0.0)  # type: ignore[arg-type]
        assert Remasking.build(zero, steps=4).kappa.eta == 0.0
        unset = Remasking.Config(setting=setting)  # type: ignore[arg-type]
        assert Remasking.build(unset, steps=4).kappa.eta == default


def test_published_loss_component_does_not_replace_lambda_0_by_the_default() -> None:
    process = EpsilonHybrid.build(EpsilonHybrid.Config(), vocabulary=FlatVocabulary(3))
    for config, lam in ((Published.Config(lam=0.0), 0.0), (Published.Config(), 1.0)):
        loss: Any = Published.build(config, process=process)
        assert loss.lam == lam


def test_entropy_sampler_component_does_not_replace_bound_0_by_the_default() -> None:
    sampler: Any = EntropyBound.build(EntropyBound.Config(bound=0.0))
    assert sampler.bound == 0.0


def test_gidd_with_p_uniform_zero_replaces_no_token_by_another() -> None:
    config = GeneralizedInterpolation.Config(p_uniform=0.0)
    process = GeneralizedInterpolation.build(config, vocabulary=FlatVocabulary(3))
    assert float(likelihoods(process, T)[:, 0, 1:3].max()) == 0.0


# ---------------------------------------------------------------------- losses of hdlm


def test_hdlm_empirical_loss_weights_equal_fitted_polynomials() -> None:
    """The loss weights are t^2 - t + 3 at masks and 3 - 2t at clusters, for any clock.

    The divergence is that of the bound.
    """
    process = HierarchicalDiffusion.build(HierarchicalDiffusion.Config(gamma=2.0), vocabulary=TWO)
    loss = Empirical.build(ComponentConfig(), process=process)
    t = times((0.0, 0.25, 1.0))
    x0 = torch.zeros(3, dtype=torch.long)
    root, cluster = torch.full_like(x0, 9), torch.full_like(x0, 6)
    assert loss.weight(process, x0, root, t).tolist() == [3.0, 2.8125, 3.0]
    assert loss.weight(process, x0, cluster, t).tolist() == [3.0, 2.5, 1.0]
    prediction = DenseDistribution(
        torch.tensor([[0.3, 0.2, 0.2, 0.1, 0.1, 0.1]] * 3, dtype=torch.float64).log(), TWO
    )
    at = times((0.2, 0.25, 0.9))
    close(
        loss.divergence(process, prediction, x0, root, at),
        process.divergence(prediction, x0, root, at),
    )
    close(
        loss.divergence(process, prediction, x0, root, at), -times((0.5, 0.5, 0.5)).log()
    )  # the predicted probability of the cluster of x0 is .3 + .2


def test_hdlm_hard_loss_predicts_the_token_at_every_level() -> None:
    """The loss is min(weight of the bound, `largest`) times -ln P(x | node)."""
    process = HierarchicalDiffusion.build(HierarchicalDiffusion.Config(gamma=1.0), vocabulary=TWO)
    loss = HardTokens.build(HardTokens.Config(largest=1.5), process=process)
    assert HardTokens.Config().largest == 2.0
    x0 = torch.zeros(2, dtype=torch.long)
    zt, t = torch.tensor([9, 6]), times((0.5, 0.5))
    prediction = DenseDistribution(
        torch.tensor([[0.3, 0.2, 0.2, 0.1, 0.1, 0.1]] * 2, dtype=torch.float64).log(), TWO
    )
    close(loss.divergence(process, prediction, x0, zt, t), -times((0.3, 0.3 / 0.5)).log())
    early, late = times((0.05, 0.05)), times((0.9, 0.9))
    for at in (early, t, late):
        expected = [min(weight, 1.5) for weight in process.weight(x0, zt, at).tolist()]
        assert loss.weight(process, x0, zt, at).tolist() == expected
    assert float(process.weight(x0, zt, early).max()) > 1.5


def test_gamma_hybrid_key_floor_is_alpha_at_time_one() -> None:
    """With time = "noise", alpha = e^-sigma at t = 1 is the key `floor`, 0.005 by default."""
    for keys, left in (({}, 0.005), ({"floor": 0.0}, 0.0), ({"floor": 0.2}, 0.2)):
        config = GammaHybrid.Config(gamma=0.3, time="noise", **keys)
        process = GammaHybrid.build(config, vocabulary=FlatVocabulary(3))
        close(process.noise.alpha(times((1.0,))), times((left,)))
        assert process.closes_at_prior == (left == 0.0)
    assert (
        GammaHybrid.build(GammaHybrid.Config(gamma=0.3), vocabulary=FlatVocabulary(3)).noise.floor
        == 0.0
    )


def test_component_defaults_equal_the_documented_defaults() -> None:
    assert (Flat.Config().start, Flat.Config().stop) == (1e-3, 1.0)
    assert (Dynamic.Config().clean, Dynamic.Config().smallest, Dynamic.Config().largest) == (
        "snr",
        0.0,
        2.0,
    )
    assert (EARLIEST, LATEST) == (1e-12, 1.0 - 1e-12)


def test_score_head_log_ratio_is_zero_at_the_current_state() -> None:
    """A score contains ratios to the probability of z_t, so its entry at z_t is always 1."""
    process = ScoreEntropyDiffusion.build(
        ScoreEntropyDiffusion.Config(), vocabulary=FlatVocabulary(3)
    )
    zt, t = torch.tensor([3, 1]), times((0.5, 0.5))
    parameterization = Ratios(True)
    raw = RatioDistribution(
        torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]).double(), process.vocabulary
    )
    network = parameterization.wrap_callback(
        lambda score, idx: score.log_ratio, process, zt, t, parameterization.prepare(process, zt, t)
    )
    ratio = network(raw, torch.arange(2))
    assert ratio.gather(-1, zt.unsqueeze(-1)).tolist() == [[0.0], [0.0]]
