"""Shuffled row order as a pure function of seed, epoch and position.

The order of an epoch is a keyed permutation of the row numbers. The permutation is a Feistel
network on the smallest even number of bits that can represent all row numbers. If the result is not
a row number, the network is applied again ("cycle walking"). The order does not depend on the
number of workers, the number of processes or interruptions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddiff.errors import ArgumentError

_ROUNDS = 8  # four are enough for wide halves; narrow halves (few rows) need more
_UINT = NDArray[np.uint64]


def row_at(seed: int, position: ArrayLike, num_rows: int) -> NDArray[np.int64]:
    """Return the row number for each global sample number in `position`.

    Sample numbers count from 0 over all epochs. Epoch e consists of the sample numbers e*num_rows
    .. (e+1)*num_rows - 1, and contains every row exactly once.
    """
    if num_rows < 1:
        raise ArgumentError(f"row_at: num_rows must be at least 1; got {num_rows}.")
    positions = np.asarray(position, dtype=np.int64)
    if positions.size and positions.min() < 0:
        raise ArgumentError(f"row_at: position must be >= 0; got {positions.min()}.")
    flat = positions.ravel().astype(np.uint64)
    epoch, place = np.divmod(flat, np.uint64(num_rows))
    seed_bits = np.uint64(seed % 2**64)  # a seed may be negative or have more bits
    key = _mix(_mix(seed_bits) ^ epoch)
    num_bits = int(num_rows - 1).bit_length()
    half_bits = max(1, (num_bits + 1) // 2)
    rows = _feistel(place, key, half_bits)
    # Cycle walking takes at most 4 tries on average, because at most 4 * num_rows numbers are
    # permuted.
    outside = rows >= num_rows
    while outside.any():
        rows[outside] = _feistel(rows[outside], key[outside], half_bits)
        outside = rows >= num_rows
    return rows.astype(np.int64).reshape(positions.shape)


def _feistel(value: _UINT, key: _UINT, half_bits: int) -> _UINT:
    """Apply a keyed permutation of the integers 0 .. 4**half_bits - 1 to `value`."""
    shift = np.uint64(half_bits)
    low = np.uint64(2**half_bits - 1)
    left = value >> shift
    right = value & low
    for number in range(_ROUNDS):
        # The round number uses bits above those of `right`, so each round has a different function.
        round_value = _mix(key ^ _mix(right + np.uint64(number << 40))) & low
        left, right = right, left ^ round_value
    return (left << shift) | right


def _mix(value: _UINT | np.uint64) -> _UINT:
    """Mix the bits of 64-bit integers with the finalizer of splitmix64."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        z = np.atleast_1d(value) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
