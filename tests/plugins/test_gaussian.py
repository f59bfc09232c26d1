"""Settings of the plugin ddiff_gaussian, and the laws of its example processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ddiff_gaussian.process import GaussianDiffusion
from pydantic import ValidationError

from ddiff import ArgumentError, GaussianProcess, GridDecoder
from ddiff.testing import assert_laws, check_gaussian

EXAMPLES = GaussianDiffusion.examples()


def build(width: int | None = 2, **keys: Any) -> GaussianProcess:
    return GaussianDiffusion.build(GaussianDiffusion.Config.model_validate(keys), width=width)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_gaussian_example_obeys_every_law(number: int) -> None:
    reports = check_gaussian(EXAMPLES[number])
    assert_laws(reports)
    # Two laws need a declaration of the schedule, or wide ends of log SNR.
    assert len(reports) >= 29


def test_gaussian_examples_have_all_schedules_and_decoders() -> None:
    schedules = {type(process.schedule).__name__ for process in EXAMPLES}
    assert schedules == {"CosineVP", "Flow", "LinearBetaVP", "ZeroTerminal", "SigmoidVP"}
    assert any(isinstance(process.decoder, GridDecoder) for process in EXAMPLES)


def test_gaussian_default_is_cosine_with_log_snr_10_at_the_start() -> None:
    process = build()
    start = torch.zeros(1, dtype=torch.float64)
    assert float(process.snr(start).log()) == pytest.approx(10.0, abs=1e-9)
    middle = process.schedule.signal(torch.tensor([0.5], dtype=torch.float64))
    assert float(middle) == pytest.approx(math.sqrt(0.5))


def test_gaussian_zero_terminal_linear_schedule_closes_at_the_prior() -> None:
    assert not build(schedule="linear").closes_at_prior
    assert build(schedule="linear", zero_terminal=True).closes_at_prior


def test_gaussian_noise_rates_set_the_signal_at_the_end() -> None:
    process = build(schedule="linear", smallest_beta=0.2, largest_beta=4.0)
    end = process.signal(torch.ones(1, dtype=torch.float64))
    assert float(end) == pytest.approx(math.exp(-(0.2 + 3.8 / 2.0) / 2.0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zero_terminal": True}, 'zero_terminal can only be given if schedule = "linear"'),
        ({"smallest_beta": 0.2}, "smallest_beta can only be given"),
        ({"schedule": "flow", "span": 2.0}, 'span can only be given if schedule = "sigmoid"'),
        ({"decoder": "grid"}, "values must be given if and only if"),
        ({"values": (0.0, 1.0)}, "values must be given if and only if"),
        ({"decoder": "grid", "values": (0.0, 255.0)}, r"got 255\. Scale the data set"),
        ({"decoder": "grid", "values": (0.0, 0.1)}, r"got 0\.1\. Scale the data set"),
        ({"schedule": "sigmoid", "span": 50.0}, "less than or equal to 10"),
        ({"largest_log_snr": 40.0}, "less than or equal to 30"),
    ],
)
def test_gaussian_config_refuses_keys_of_other_settings_and_extremes(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"width": None}, "is for vectors and needs their width"),
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"schedule": "linear", "smallest_log_snr": -30.0}, "within the values of the schedule"),
        ({"largest_log_snr": -5.0, "smallest_log_snr": 5.0}, "smallest_log_snr < largest_log_snr"),
        ({"schedule": "linear", "smallest_beta": 9.0, "largest_beta": 1.0}, "smallest <= largest"),
        ({"decoder": "grid", "values": (1.0, 1.0)}, "at least two different numbers"),
    ],
)
def test_gaussian_build_refuses_impossible_settings(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build(**keys)


@pytest.mark.parametrize("number", [0.5, 0.98, 7.0, math.nan])
def test_grid_decoder_refuses_numbers_that_are_not_on_the_grid(number: float) -> None:
    """The tolerance is 0.01 of the distance 1 between the values."""
    process = build(decoder="grid", values=(-1.0, 0.0, 1.0))
    t = torch.zeros(2, dtype=torch.float64)
    x = torch.tensor([[1.0, -1.0], [0.0, number]], dtype=torch.float64)
    with pytest.raises(ArgumentError, match=rf"one of the 3 values, from -1 to 1; got {number:g}"):
        process.decode_nll(None, x, x.clone(), t)


def test_grid_decoder_accepts_values_rounded_to_float32() -> None:
    values = tuple(torch.linspace(-1.0, 1.0, 2**16, dtype=torch.float64).tolist())
    process = build(1, decoder="grid", values=values)
    exact = torch.tensor(values, dtype=torch.float64).unsqueeze(-1)
    process.decoder.check(exact.float())
    process.decoder.check(exact)


def test_check_gaussian_refuses_wide_and_other_processes() -> None:
    with pytest.raises(ArgumentError, match="a width of at most 3"):
        check_gaussian(build(width=4))
    with pytest.raises(ArgumentError, match="must be a GaussianProcess"):
        check_gaussian("cosine")  # type: ignore[arg-type]
