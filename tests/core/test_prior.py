"""Draws from the prior are by inverse CDF, and make no tensor [rows, states]."""

from __future__ import annotations

import torch

from ddiff.core.numerics import draw_index
from ddiff.core.process import Prior


def test_prior_draws_are_inverse_cdf_for_uniforms_of_any_shape() -> None:
    mass = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64)
    u = torch.tensor([[0.0, 0.1, 0.2], [0.69, 0.71, 1.0 - 2.0**-53]], dtype=torch.float64)
    drawn = Prior(mass.log()).draw(u)
    assert torch.equal(drawn, draw_index(mass.expand(6, -1), u.reshape(-1)).reshape(2, 3))
    assert drawn.tolist() == [[1, 1, 3], [3, 4, 4]]


def test_prior_at_a_single_state_returns_this_state_for_every_uniform() -> None:
    u = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    assert Prior.point(2, 4).draw(u).tolist() == [2, 2, 2]


def test_prior_draw_makes_no_tensor_of_shape_rows_by_states() -> None:
    many = 2**20  # such a table would take 8 TB
    assert bool(
        (Prior.point(many - 1, many).draw(torch.zeros(many, dtype=torch.float64)) == many - 1).all()
    )
