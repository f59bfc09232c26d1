"""Training losses of vector fields: equal to squared errors of the outputs they name."""

from __future__ import annotations

import pytest
import torch

from ddiff.core.gaussian import GaussianProcess, Output, PredictedMean
from ddiff.core.gaussian_schedule import CosineVP, Flow, LinearBetaVP
from ddiff.errors import ArgumentError
from ddiff.training.gaussian_losses import MinSnr, OutputMse, SigmoidWeighted

PROCESSES = {
    "cosine": GaussianProcess(CosineVP(), 3),
    "flow": GaussianProcess(Flow(), 3),
    "linear": GaussianProcess(LinearBetaVP(), 3),
}


def rows(process: GaussianProcess) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0.0, 0.98, 7, dtype=torch.float64)
    x0, noise, guess = torch.randn(3, 7, 3, generator=generator, dtype=torch.float64)
    zt = process.signal(t).unsqueeze(-1) * x0 + process.deviation(t).unsqueeze(-1) * noise
    return x0, zt, t, guess


@pytest.mark.parametrize("name", list(PROCESSES))
@pytest.mark.parametrize("output", ["eps", "x0", "v", "u"])
def test_output_mse_equals_the_squared_error_of_the_output(name: str, output: Output) -> None:
    process = PROCESSES[name]
    if output == "eps" and process.closes_at_prior:
        pytest.skip("such a schedule refuses eps")
    x0, zt, t, guess = rows(process)
    loss = OutputMse(output)
    found = loss.weight(process, x0, zt, t) * loss.divergence(
        process, PredictedMean(guess), x0, zt, t
    )
    true = process.from_clean(output, x0, zt, t)
    predicted = process.from_clean(output, guess, zt, t)
    torch.testing.assert_close(found, (true - predicted).square().sum(-1), rtol=1e-9, atol=1e-9)


def test_sigmoid_weight_is_the_bound_weight_below_its_bias_and_small_above() -> None:
    process = PROCESSES["cosine"]
    x0, zt, t, _ = rows(process)
    factor = SigmoidWeighted(2.0).weight(process, x0, zt, t) / process.weight(x0, zt, t)
    torch.testing.assert_close(factor, torch.sigmoid(2.0 - process.snr(t).log()))


def test_min_snr_weight_is_clipped_at_gamma() -> None:
    process = PROCESSES["cosine"]
    x0, zt, t, _ = rows(process)
    weight = MinSnr(5.0).weight(process, x0, zt, t)
    torch.testing.assert_close(weight, torch.minimum(process.snr(t), torch.tensor(5.0)))


def test_gaussian_losses_refuse_settings_out_of_range() -> None:
    with pytest.raises(ArgumentError, match="gamma must be a positive number"):
        MinSnr(0.0)
    with pytest.raises(ArgumentError, match="bias must be finite"):
        SigmoidWeighted(float("nan"))
