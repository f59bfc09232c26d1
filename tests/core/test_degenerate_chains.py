"""Bounds are exact if rates are 0 for some time, or if a state has probability 1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddiff.core.components import MixtureProcess, mask_distribution, token_distribution
from ddiff.core.dense import DenseProcess
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import LinearSchedule, Schedule
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary

MASKED = FlatVocabulary(3)
BARE = FlatVocabulary(3, mask=False)
PREDICTION = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


class DelayedSchedule(Schedule):
    """Schedule with alpha = 1 until `start`; alpha then falls linearly to 0."""

    def __init__(self, start: float) -> None:
        self.start = start

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - self.one_minus_alpha(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.where(t > self.start, -1.0 / (1.0 - self.start), 0.0).to(t)

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        return (t - self.start).clamp(min=0.0) / (1.0 - self.start)


def constant_prediction_bound(
    process: ForwardProcess, token: int, length: int, times: int = 2000
) -> float:
    """Return the diffusion term of the bound of one token, for the constant prediction PREDICTION.

    The integral over time is a midpoint sum with `times` points in the uniform from which noise
    times are drawn. `length` is the sequence length on which these draws depend.
    """
    v = (torch.arange(times, dtype=torch.float64) + 0.5) / times
    t, speed = process.information_time.draw(v, 0.0, 1.0, length)
    num_states = process.vocabulary.num_states
    rows = times * num_states
    time = t.repeat_interleave(num_states)
    state = torch.arange(num_states).repeat(times)
    truth = torch.full((rows,), token)
    dist = DenseDistribution(PREDICTION.log().expand(rows, -1), process.vocabulary)
    probability = process.log_likelihood(state, time)[:, token].exp()
    read = process.active(state) & (probability > 0)
    density = process.weight(truth, state, time) * process.divergence(dist, truth, state, time)
    charged = torch.where(read, probability * density, 0.0).reshape(times, num_states).sum(-1)
    return float((speed * charged).mean())


@pytest.mark.parametrize("start", [0.1, 0.6, 0.9999])
@pytest.mark.parametrize("length", [1, 4096])
@pytest.mark.parametrize("noise", ["mask", "tokens"])
def test_bound_of_constant_prediction_is_minus_log_p_if_early_rates_are_zero(
    noise: str, length: int, start: float
) -> None:
    masked = noise == "mask"
    vocabulary = MASKED if masked else BARE
    target = mask_distribution(vocabulary) if masked else token_distribution(vocabulary)
    process = MixtureProcess(vocabulary, DelayedSchedule(start), target)
    for token in range(3):
        expected = -math.log(float(PREDICTION[token]))
        assert constant_prediction_bound(process, token, length) == pytest.approx(
            expected, abs=3e-3
        )


def test_drawn_noise_times_do_not_cluster_at_times_with_zero_rates() -> None:
    matrix = torch.ones(3, 3, dtype=torch.float64) - 3.0 * torch.eye(3, dtype=torch.float64)

    def late(t: Tensor) -> Tensor:
        rate = (t > 0.3) / (1.0 - t)
        return rate[:, None, None] * matrix

    clock = DenseProcess(BARE, late).information_time
    v = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = clock.draw(v, 0.0, 1.0, 64)[0]
    assert float((t < 0.3).double().mean()) < 0.3


@pytest.mark.parametrize("name", ["one token", "one masked token", "no rates"])
def test_noise_times_are_uniform_if_the_noise_removes_no_information(name: str) -> None:
    alone = FlatVocabulary(1, mask=False)
    hidden = FlatVocabulary(1)
    process: ForwardProcess = {
        "one token": MixtureProcess(alone, LinearSchedule(), token_distribution(alone)),
        "one masked token": MixtureProcess(hidden, LinearSchedule(), mask_distribution(hidden)),
        "no rates": DenseProcess(BARE, torch.zeros(3, 3, dtype=torch.float64)),
    }[name]
    tau = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    torch.testing.assert_close(process.information_time.at(tau)[0], tau)
    t, speed = process.information_time.draw(
        torch.linspace(0.0, 1.0, 9, dtype=torch.float64), 0.1, 0.9, 64
    )
    assert t.isfinite().all()
    assert (t.diff() > 0).all()
    assert speed.isfinite().all()


@pytest.mark.parametrize("t", [1e-6, 0.4, 1.0 - 1e-6])
def test_bound_integrand_equals_default_formula_if_all_noise_is_one_token(t: float) -> None:
    """All noise is token 0, so that the token x = 0 never changes.

    The prediction also gives probability to other tokens, so the integrand at x = 0 is positive.
    """
    target = torch.tensor([1.0, 0.0, 0.0])
    process = MixtureProcess(BARE, LinearSchedule(), target)
    truth = torch.tensor([0, 1, 1])
    state = torch.tensor([0, 0, 1])
    time = torch.full((3,), t, dtype=torch.float64)
    dist = DenseDistribution(PREDICTION.log().expand(3, -1), BARE)
    derived = ForwardProcess.density(process, dist, truth, state, time)
    assert float(derived[0]) > 0
    torch.testing.assert_close(
        process.density(dist, truth, state, time), derived, rtol=1e-6, atol=0
    )
    weight = process.weight(truth, state, time)
    torch.testing.assert_close(weight, ForwardProcess.weight(process, truth, state, time))
    torch.testing.assert_close(
        weight * process.divergence(dist, truth, state, time), derived, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("token", [0, 1, 2])
def test_bound_is_minus_log_p_if_all_noise_is_one_token(token: int) -> None:
    process = MixtureProcess(BARE, LinearSchedule(), torch.tensor([1.0, 0.0, 0.0]))
    expected = -math.log(float(PREDICTION[token]))
    assert constant_prediction_bound(process, token, 64) == pytest.approx(expected, abs=1e-3)


def test_tree_bound_integrand_is_zero_at_leaf_tokens_for_any_prediction() -> None:
    tree = HierarchicalVocabulary([[0, 1, 0, 1, 1]])
    process = TreeProcess.examples()[1]
    certain = torch.eye(5, dtype=torch.float64).log()[[4, 4]]
    dist = DenseDistribution(certain, tree)
    time = torch.full((2,), 0.5, dtype=torch.float64)
    density = process.density(dist, torch.tensor([0, 4]), torch.tensor([1, 4]), time)
    assert density.tolist() == [0.0, 0.0]
