"""Exponential moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddiff.errors import ArgumentError
from ddiff.training.ema import ExponentialMovingAverage

YES, NO = torch.tensor(True), torch.tensor(False)


def test_ema_equals_the_weighted_mean_of_all_past_parameters() -> None:
    net = nn.Linear(3, 2).double()
    shown = [net.weight.detach().clone()]
    average = ExponentialMovingAverage(net, decay=0.3)
    weights = torch.ones(1, dtype=torch.float64)
    for n in range(6):
        with torch.no_grad():
            net.weight.copy_(
                torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
            )
        average.update(YES)
        shown.append(net.weight.detach().clone())
        decay = min(0.3, (1 + n) / (10 + n))
        weights = torch.cat([weights * decay, torch.tensor([1 - decay], dtype=torch.float64)])
    assert weights.sum().item() == pytest.approx(1.0)
    expected = (weights[:, None, None] * torch.stack(shown)).sum(0)
    torch.testing.assert_close(
        average.weights["weight"], expected, rtol=1e-14, atol=1e-14
    )  # rounding of seven float64 sums


def test_ema_ignores_skipped_steps() -> None:
    net = nn.Linear(3, 2)
    average = ExponentialMovingAverage(net, decay=0.9)
    before = average.weights["weight"].clone()
    with torch.no_grad():
        net.weight.add_(1.0)
    average.update(NO)
    assert torch.equal(average.weights["weight"], before)
    average.update(YES)
    torch.testing.assert_close(
        average.weights["weight"], before + 0.9, rtol=1e-6, atol=1e-7
    )  # equal to the average after the first step
    assert not torch.equal(average.weights["weight"], before)


def test_ema_of_bfloat16_weights_is_float32() -> None:
    average = ExponentialMovingAverage(nn.Linear(3, 2).bfloat16(), decay=0.9999)
    assert average.weights["weight"].dtype == torch.float32


def test_ema_state_loading_restores_averages_and_update_count() -> None:
    nets = [nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    first, second = ExponentialMovingAverage(nets[0], 0.9), ExponentialMovingAverage(nets[1], 0.9)
    first.update(YES)
    second.load_tree(first.to_tree())
    for average, net in ((first, nets[0]), (second, nets[1])):
        with torch.no_grad():
            net.weight.add_(1.0)
        average.update(YES)
    assert torch.equal(first.weights["weight"], second.weights["weight"])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_ema_refuses_a_decay_outside_the_interval_0_to_1(decay: float) -> None:
    with pytest.raises(ArgumentError, match=r"decay must be in \(0, 1\)"):
        ExponentialMovingAverage(nn.Linear(3, 2), decay)
