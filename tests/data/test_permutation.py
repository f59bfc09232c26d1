"""The row order is a permutation in each epoch, and depends only on seed and position."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ddiff.data.permutation import row_at
from ddiff.errors import ArgumentError

SIZES = [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 4097]


@pytest.mark.parametrize("num_rows", SIZES)
def test_row_order_is_a_permutation_in_every_epoch(num_rows: int) -> None:
    for seed, epoch in ((0, 0), (3, 1), (2**63, 12345)):
        shown = row_at(seed, np.arange(epoch * num_rows, (epoch + 1) * num_rows), num_rows)
        assert sorted(shown) == list(range(num_rows))


def test_row_order_differs_between_epochs_and_seeds() -> None:
    first = row_at(0, np.arange(1000), 1000)
    for other in (row_at(0, np.arange(1000, 2000), 1000), row_at(1, np.arange(1000), 1000)):
        # Two random permutations agree at one position on average (Poisson distribution): 12 or
        # more have probability 1e-9.
        assert (first == other).sum() < 12


def test_row_at_an_array_of_positions_equals_row_at_each_position() -> None:
    together = row_at(7, np.arange(300), 129)
    assert [int(row_at(7, position, 129)) for position in range(300)] == together.tolist()
    assert (
        row_at(7, np.arange(300).reshape(3, 100), 129).tolist() == together.reshape(3, 100).tolist()
    )


@pytest.mark.parametrize("num_rows", [2, 3, 5, 12])
def test_shuffled_row_at_a_position_is_uniformly_distributed_over_seeds(num_rows: int) -> None:
    counts = np.bincount(
        [int(row_at(seed, 0, num_rows)) for seed in range(1000)], minlength=num_rows
    )
    expected = 1000 / num_rows
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # Fixed seeds; for at most 11 degrees of freedom a value above 45 has probability under 1e-5.
    assert chi_square < 45


def test_row_order_rarely_keeps_consecutive_rows_together() -> None:
    shown = row_at(0, np.arange(1000), 1000)
    consecutive = sum(after - before == 1 for before, after in pairwise(shown.tolist()))
    assert consecutive < 12  # one on average


def test_shuffled_row_order_repeats_no_row_near_position_1e15() -> None:
    num_rows = 1_000_003
    position = 10**15
    epoch = position // num_rows
    window = np.arange(epoch * num_rows, epoch * num_rows + 2000)
    assert len(set(row_at(0, window, num_rows).tolist())) == 2000
    assert 0 <= row_at(0, position, num_rows) < num_rows


@pytest.mark.parametrize(
    ("position", "num_rows", "named"), [(0, 0, "num_rows"), (-1, 5, "position")]
)
def test_row_order_refuses_negative_positions_and_empty_data(
    position: int, num_rows: int, named: str
) -> None:
    with pytest.raises(ArgumentError, match=named):
        row_at(0, position, num_rows)
