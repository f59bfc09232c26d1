"""CounterRng: numbers are uniform, and depend only on seed, step, purpose, sample and position.

Statistical tests have fixed seeds. With a random seed, each of them would fail with probability
1e-6.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError

INDEX = torch.tensor([5, 0, 9])


def uniform(
    seed: int = 1, step: int = 2, index: Tensor = INDEX, length: int = 4, purpose: str = "train"
) -> Tensor:
    return CounterRng(seed, step, index, length, purpose).uniform("channel")


def test_rng_numbers_equal_stored_values() -> None:
    assert torch.equal(uniform(), uniform())
    # A changed generator would change the result of every run that is resumed or repeated.
    assert uniform()[0, :2].tolist() == [0.27460777260881075, 0.10581297539501044]


def test_rng_numbers_are_float64_in_half_open_unit_interval() -> None:
    u = CounterRng(0, 0, torch.arange(500), 200).uniform("x")
    assert u.dtype == torch.float64
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    assert not torch.equal(u, u.float().double())  # 53 bits, not 24


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 3}, {"purpose": "evaluation"}])
def test_rng_seed_step_and_purpose_each_change_every_number(change: dict[str, int]) -> None:
    assert not (uniform() == uniform(**change)).any()  # type: ignore[arg-type]


def test_rng_channels_samples_and_positions_have_distinct_random_numbers() -> None:
    rng = CounterRng(0, 0, torch.arange(6), 7)
    everything = torch.cat([rng.uniform("a").flatten(), rng.uniform("b", 3).flatten()])
    assert len(everything.unique()) == 6 * 7 * 4


def test_rng_swapping_seed_step_and_index_changes_the_numbers() -> None:
    draws = [
        uniform(seed=a, step=b, index=torch.tensor([c]))
        for a, b, c in itertools.permutations((3, 4, 5))
    ]
    assert len(torch.cat(draws).unique()) == 6 * 4


def test_rng_numbers_of_a_sample_do_not_depend_on_its_batch() -> None:
    whole = uniform(index=torch.arange(10))
    shuffled = torch.tensor([7, 2, 2, 9])
    assert torch.equal(uniform(index=shuffled), whole[shuffled])


def test_rng_numbers_of_a_position_do_not_depend_on_sequence_length() -> None:
    for length in (1, 3, 4, 5, 8, 33):  # the generator makes blocks of four
        assert torch.equal(uniform(length=33)[:, :length], uniform(length=length))


def test_rng_first_of_several_uniforms_equals_the_single_uniform() -> None:
    rng = CounterRng(3, 1, INDEX, 4)
    three = rng.uniform("x", 3)
    assert three.shape == (3, 4, 3)
    assert torch.equal(three[..., 0], rng.uniform("x"))


def test_uniform_per_group_does_not_depend_on_the_samples_in_the_group() -> None:
    one, other = (
        CounterRng(4, 5, index, length).uniform_per_group("x")
        for index, length in [(INDEX, 3), (torch.tensor([8]), 9)]
    )
    assert torch.equal(one[:1], other)
    assert one[0] != CounterRng(4, 6, INDEX, 3).uniform_per_group("x")[0]
    assert one.unique().numel() == 1
    assert 0.0 <= float(one[0]) < 1.0


def test_rng_group_uniforms_differ_between_groups() -> None:
    group = torch.tensor([3, 7, 3])
    index = torch.arange(3)
    shared = CounterRng(4, 5, index, 2, group=group).uniform_per_group("x")
    assert shared[0] == shared[2] != shared[1]
    assert shared[1] == CounterRng(4, 5, index[:1], 2, group=group[1:2]).uniform_per_group("x")[0]


def test_uniforms_of_zero_samples_have_zero_rows() -> None:
    assert uniform(index=torch.empty(0, dtype=torch.long)).shape == (0, 4)


def test_rng_neither_reads_nor_changes_torch_global_state() -> None:
    torch.manual_seed(0)
    before = uniform()
    torch.rand(7)
    assert torch.equal(before, uniform())
    state = torch.get_rng_state()
    uniform()
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------- statistics

FAILURE = 1e-6


def distance_from_uniform(u: Tensor) -> float:
    """Return the Kolmogorov-Smirnov statistic of numbers u against the uniform distribution."""
    ordered, count = u.flatten().sort().values, u.numel()
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return float(torch.maximum((ordered - steps[:-1]).abs(), (steps[1:] - ordered).abs()).max())


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_rng_numbers_are_uniform(seed: int) -> None:
    u = CounterRng(seed, 17, torch.arange(400), 250).uniform("x")
    # Dvoretzky-Kiefer-Wolfowitz-Massart: P(D > d) <= 2 exp(-2 n d^2)
    assert distance_from_uniform(u) < math.sqrt(math.log(2 / FAILURE) / (2 * u.numel()))


def test_rng_numbers_of_first_position_are_uniform_over_samples_and_steps() -> None:
    """Stratified noise times use only the first number of each sample and step."""
    over_samples = CounterRng(0, 3, torch.arange(20_000), 1).uniform("time")
    over_steps = torch.cat(
        [CounterRng(0, step, torch.tensor([6]), 1).uniform("time") for step in range(5_000)]
    )
    for u in (over_samples, over_steps):
        assert distance_from_uniform(u) < math.sqrt(math.log(2 / FAILURE) / (2 * u.numel()))


def test_rng_numbers_of_channels_positions_and_seeds_are_uncorrelated() -> None:
    rng = CounterRng(0, 0, torch.arange(400), 100)
    x = rng.uniform("x", 2)
    pairs = {
        "channels": (x[..., 0], rng.uniform("y")),
        "numbers of a channel": (x[..., 0], x[..., 1]),
        "positions": (x[:, :-1, 0], x[:, 1:, 0]),
        "block of four": (x[:, ::4, 0], x[:, 1::4, 0]),
        "samples": (x[:-1, :, 0], x[1:, :, 0]),
        "steps": (x[..., 0], CounterRng(0, 1, torch.arange(400), 100).uniform("x")),
        "seeds": (x[..., 0], CounterRng(1, 0, torch.arange(400), 100).uniform("x")),
        "purposes": (x[..., 0], CounterRng(0, 0, torch.arange(400), 100, "sampling").uniform("x")),
    }
    for name, (one, other) in pairs.items():
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        # nearly normal with variance 1/n: |z| > 5.3 has probability 1.2e-7, and there are eight
        # pairs
        assert abs(float(correlation)) < 5.3 / math.sqrt(one.numel()), name


def test_seed_per_sample_gives_the_numbers_of_a_batch_with_this_seed() -> None:
    seeds = [7, 2**64 - 1, 7]
    mixed = CounterRng(seeds, 3, INDEX, 4)
    for row, seed in enumerate(seeds):
        single = CounterRng(seed, 3, INDEX[row : row + 1], 4)
        assert torch.equal(mixed.uniform("x", 2)[row], single.uniform("x", 2)[0])
        assert mixed.uniform_per_group("x")[row] == single.uniform_per_group("x")[0]
        derived = mixed.derive("child", 6).uniform("x")[row]
        assert torch.equal(derived, single.derive("child", 6).uniform("x")[0])


def test_list_of_seeds_of_another_length_is_refused() -> None:
    with pytest.raises(ArgumentError, match="one seed per sample, 3; got 2 seeds"):
        CounterRng([1, 2], 0, INDEX, 4)
    with pytest.raises(ArgumentError, match="seed must be in"):
        CounterRng([1, 2, -1], 0, INDEX, 4)
