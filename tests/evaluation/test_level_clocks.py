"""Search for a path in a noisy field of the bound of a tree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tables import Known, constant, full_rows, processes
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.level_paths import choose_points, integrate_field, make_diagonal
from ddiff.core.times import FlatTimes
from ddiff.errors import NonFiniteError
from ddiff.evaluation.level_clocks import MeasuredField, choose_path, split_documents
from ddiff.evaluation.likelihood import score_documents
from ddiff.progress import show_progress

POINTS = choose_points(2, 6)
DOCUMENTS = 40
POSITIONS = 400.0
RECIPE = LogTimeClock((1.0, 1.0)).cdf(torch.linspace(0.0, 1.0, 101, dtype=torch.float64))


def conservative_field(points: Tensor) -> Tensor:
    """Return the gradient of F_1^2 F_2 + 2 F_1 + F_2, whose integral is 4 on every path."""
    first = 2.0 * points[:, 0] * points[:, 1] + 2.0
    second = points[:, 0] ** 2 + 1.0
    return torch.stack([first, second], -1)


def rotating_field(points: Tensor) -> Tensor:
    """Return the conservative field plus a part for which paths far from the diagonal are best."""
    turn = torch.stack([0.4 * points[:, 1], -0.4 * points[:, 0]], -1)
    return conservative_field(points) + turn


def measured(field: Tensor, noise: float, seed: int) -> MeasuredField:
    """Return a measurement of field values [P,L] whose documents have independent errors."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(POINTS), DOCUMENTS, 2)
    errors = noise * torch.randn(size, generator=generator, dtype=torch.float64)
    positions = torch.full(size, POSITIONS, dtype=torch.float64)
    nats = (field.unsqueeze(1) + errors) * positions
    return MeasuredField(POINTS, nats, torch.zeros_like(nats), positions)


def test_found_path_of_a_rotating_field_is_better_than_the_recipe_and_the_diagonal() -> None:
    chosen = choose_path(measured(rotating_field(POINTS), 0.1, 0), RECIPE, 16)
    assert chosen.path is not None
    found = integrate_field(rotating_field, chosen.path)
    assert found < integrate_field(rotating_field, RECIPE) - 0.05
    assert found < integrate_field(rotating_field, make_diagonal(2)) - 0.1
    assert max(chosen.gains.values()) > 0.05


def test_gain_in_noise_is_near_0_on_documents_that_did_not_determine_the_path() -> None:
    """The field is the same on all paths, so every gain is noise.

    The gain on the documents that determined the path is positive for every seed, and the mean of
    the other gains is not. The tolerance is four standard errors of 30 gains.
    """
    fitted = []
    checked = []
    for seed in range(30):
        chosen = choose_path(measured(conservative_field(POINTS), 0.5, seed), RECIPE, 8)
        checked.append(chosen.gains[3])
        if chosen.path is not None:
            fitted.append(chosen.fitted_gain)
    assert min(fitted) > 0.0
    gains = torch.tensor(checked)
    assert abs(float(gains.mean())) < 4.0 * float(gains.std()) / 30**0.5
    assert float(gains.mean()) < min(fitted) + float(gains.std())


def test_standard_errors_of_the_field_are_those_of_its_noise() -> None:
    """The relative error of a standard deviation of 40 numbers is about 0.11."""
    errors = measured(conservative_field(POINTS), 0.5, 1).standard_errors()
    expected = torch.full_like(errors, 0.5 / DOCUMENTS**0.5)
    torch.testing.assert_close(errors, expected, rtol=0.5, atol=0.0)


def test_reference_changes_no_mean_and_its_noise_cancels() -> None:
    plain = measured(rotating_field(POINTS), 0.5, 2)
    fixed = torch.full_like(plain.nats, 3.0 * POSITIONS)
    noise = plain.nats - (rotating_field(POINTS).unsqueeze(1) * plain.positions)
    shared = MeasuredField(POINTS, plain.nats, fixed + noise, plain.positions)
    offset = (noise.sum((0, 1)) / plain.positions.sum((0, 1))).expand(len(POINTS), -1)
    torch.testing.assert_close(shared.means(), rotating_field(POINTS) + offset)
    assert float(shared.standard_errors().max()) < 1e-9


def test_documents_are_split_into_every_other_document() -> None:
    halves = split_documents(np.array([4, 4, 5, 7, 7, 9]))
    assert [half.tolist() for half in halves] == [[0, 1, 3, 4], [2, 5]]


def test_infinite_divergence_is_refused_and_gives_no_path() -> None:
    field = measured(rotating_field(POINTS), 0.1, 0)
    field.nats[3, 2, 1] = torch.inf
    with pytest.raises(NonFiniteError, match="got NaN or infinity at the occupancies"):
        choose_path(field, RECIPE, 4)


def test_infinite_bound_of_a_document_is_refused() -> None:
    """The network gives token 0 the probability 0, and one of the three documents has token 0."""
    p = torch.tensor([0.0, 0.4, 0.3, 0.3], dtype=torch.float64)
    ids = torch.tensor([[1, 2], [3, 0], [2, 1]])
    with show_progress(None, "test") as bar, pytest.raises(NonFiniteError, match="the bound is"):
        score_documents(
            Known(processes()["masked"], constant(p)),
            full_rows(ids),
            np.arange(3),
            length=2,
            times=FlatTimes(),
            draws=16,
            bar=bar,
        )
