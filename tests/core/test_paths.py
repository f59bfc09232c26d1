"""Paths of several fields: legs, ties, shares of training paths and densities of draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.field import Field, Fields
from ddiff.core.gaussian import GaussianProcess
from ddiff.core.gaussian_schedule import CosineVP
from ddiff.core.paths import (
    Leg,
    LegPath,
    first_path,
    given_path,
    lagged_path,
    shared_path,
)
from ddiff.core.progress_density import LeastVariance, UniformDensity
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, TimeRule, WindowTimes
from ddiff.core.training_paths import (
    CyclePaths,
    IndependentTimes,
    MixedPaths,
    draw_training,
    require_path,
)
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.errors import ArgumentError

SLOTS = 64
TEXT_GIVEN_LATENT = LegPath({"text": Leg(0.0, 1.0), "latent": "clean"})
LATENT_GIVEN_TEXT = LegPath({"text": "clean", "latent": Leg(0.0, 1.0)})


def make_fields(rule: TimeRule | None = None, *more: str) -> Fields:
    """Return a field of four tokens, a field of one vector, and more fields of vectors."""
    tokens = TreeProcess(FlatVocabulary(3), LogTimeClock((1.0,)))
    fields = {"text": Field(tokens, rule or FlatTimes(tokens=4), 4)}
    for name in ("latent", *more):
        fields[name] = Field(GaussianProcess(CosineVP(), 2), FlatTimes(), 1)
    return fields


def rng_at(slot: Tensor, step: int = 0) -> CounterRng:
    return CounterRng(9, step, slot, 4)


def tau_of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------- legs


def test_first_path_gives_the_last_leg_to_the_field_sampled_first() -> None:
    legs = first_path(["latent", "text", "image"]).legs
    assert legs["latent"] == Leg(pytest.approx(2 / 3), 1.0)
    assert legs["image"] == Leg(0.0, pytest.approx(1 / 3))


def test_lagged_path_keeps_one_field_less_noisy_by_the_lag() -> None:
    path = lagged_path("latent", "text", 0.25)
    times = path.at(make_fields(), tau_of(0.1, 0.5, 0.9))
    assert times["latent"].clean[0].all()
    assert not times["text"].clean[0].any()
    at_prior = times["text"].at_prior
    assert at_prior is not None
    assert at_prior[2].all()
    # Both legs have the length 3/4, so the text is at 2/3 and the latent at 1/3.
    assert float(times["text"].t[1, 0]) == pytest.approx(2.0 / 3.0)


def test_lagged_path_without_lag_is_the_shared_path() -> None:
    assert lagged_path("a", "b", 0.0).legs == shared_path(["a", "b"]).legs


def test_given_path_cuts_the_leg_of_a_given_field_out() -> None:
    path = first_path(["a", "b", "c"])
    assert given_path(path, {"b": "clean"}).legs == {
        "a": Leg(pytest.approx(0.5), 1.0),
        "b": "clean",
        "c": Leg(0.0, pytest.approx(0.5)),
    }
    assert given_path(path, {"a": "clean", "c": "absent"}).legs == {
        "a": "clean",
        "b": Leg(0.0, 1.0),
        "c": "absent",
    }


def test_given_path_keeps_intervals_in_which_another_field_moves() -> None:
    path = LegPath({"a": Leg(0.0, 0.6), "b": Leg(0.4, 1.0), "c": Leg(0.5, 0.7)})
    found = given_path(path, {"c": "clean"}).legs
    assert found["a"] == path.legs["a"]
    assert found["b"] == path.legs["b"]
    only = given_path(path, {"a": "clean", "b": "clean"}).legs
    assert only["c"] == Leg(0.0, 1.0)


def test_given_path_keeps_the_power_of_moving_fields() -> None:
    path = LegPath({"text": Leg(0.0, 1.0), "latent": Leg(0.0, 1.0)}, {"text": 2.0})
    times = given_path(path, {"latent": "clean"}).at(make_fields(), tau_of(0.5))
    assert float(times["text"].t[0, 0]) == pytest.approx(0.25)


def test_given_path_refuses_to_hold_every_field() -> None:
    with pytest.raises(ArgumentError, match="at least one field must move"):
        given_path(shared_path(["a", "b"]), {"a": "clean", "b": "prior"})


@pytest.mark.parametrize(
    ("legs", "message"),
    [
        ({"a": Leg(0.5, 0.5)}, "0 <= start < stop <= 1"),
        ({"a": Leg(-0.1, 1.0)}, "0 <= start < stop <= 1"),
        ({"a": Leg(math.nan, 1.0)}, "0 <= start < stop <= 1"),
        ({"a": Leg(0.0, 1.0), "b": "noisy"}, "must have a Leg, or be held: clean, prior, absent"),
        ({"a": "clean"}, "at least one field must move"),
        ({}, "at least one field must move"),
        ({"a": Leg(0.0, 0.4), "b": Leg(0.6, 1.0)}, "no field moves from 0.4 to 0.6"),
        ({"a": Leg(0.2, 1.0)}, "no field moves from 0.0 to 0.2"),
        ({"a": Leg(0.0, 0.9)}, "until tau = 1; got 0.9"),
    ],
)
def test_leg_path_refuses_impossible_legs(legs, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LegPath(legs)


@pytest.mark.parametrize("power", [{"a": 0.0}, {"a": -1.0}, {"a": math.inf}, {"c": 2.0}])
def test_leg_path_refuses_impossible_powers(power: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="the power of"):
        LegPath({"a": Leg(0.0, 1.0), "b": "clean"}, power)


def test_leg_path_refuses_a_power_of_a_held_field() -> None:
    with pytest.raises(ArgumentError, match='the power of "b" must be above 0, for a field with'):
        LegPath({"a": Leg(0.0, 1.0), "b": "clean"}, {"b": 2.0})


def test_leg_path_refuses_fields_of_other_names() -> None:
    with pytest.raises(ArgumentError, match="legs must name every field once"):
        shared_path(["text", "image"]).at(make_fields(), tau_of(0.5))


def test_leg_path_refuses_windows_of_fields_that_move_together() -> None:
    fields = make_fields(WindowTimes(2))
    with pytest.raises(ArgumentError, match="has a time rule with windows"):
        shared_path(["text", "latent"]).draws(fields, rng_at(torch.arange(4)), torch.arange(4), 4)
    first_path(["latent", "text"]).draws(fields, rng_at(torch.arange(4)), torch.arange(4), 4)


@pytest.mark.parametrize("lag", [-0.1, 1.0])
def test_lagged_path_refuses_a_lag_outside_zero_and_one(lag: float) -> None:
    with pytest.raises(ArgumentError, match="lag must be in"):
        lagged_path("a", "b", lag)


# ---------------------------------------------------------------------- ties of legs


def test_end_terms_at_a_tie_see_later_fields_decoded_and_earlier_ones_at_the_prior() -> None:
    """The latent is sampled first: its leg is [1/2,1], and that of the text [0,1/2]."""
    fields = make_fields()
    path = first_path(["latent", "text"])
    slot = torch.arange(4)
    decoding, closing = path.ends(fields, "latent", rng_at(slot), slot, 4)
    at_prior = decoding["text"].at_prior
    assert at_prior is not None
    assert at_prior.all(), "the latent is decoded before the text leaves its prior"
    assert closing["text"].at_prior is not None
    assert closing["text"].at_prior.all()
    decoding, closing = path.ends(fields, "text", rng_at(slot), slot, 4)
    assert decoding["latent"].clean.all(), "the text is decoded given the clean latent"
    assert closing["latent"].clean.all(), "the text leaves its prior given the clean latent"


def test_fields_with_a_common_start_are_decoded_together() -> None:
    fields = make_fields()
    slot = torch.arange(4)
    decoding, _ = shared_path(["text", "latent"]).ends(fields, "text", rng_at(slot), slot, 4)
    assert not decoding["latent"].clean.any()
    assert not decoding["latent"].t.any()


def test_fields_with_a_common_stop_leave_the_prior_together() -> None:
    fields = make_fields()
    slot = torch.arange(4)
    path = LegPath({"text": Leg(0.0, 1.0), "latent": Leg(0.4, 1.0)})
    for name, other in (("text", "latent"), ("latent", "text")):
        _, closing = path.ends(fields, name, rng_at(slot), slot, 4)
        at_prior = closing[other].at_prior
        assert at_prior is not None
        assert at_prior.all()


# ---------------------------------------------------------------------- training paths


def test_draw_of_a_path_with_two_legs_keeps_the_sum_of_the_speeds() -> None:
    """Each sample has one leg with twice its speed, so the mean speed of each field is 1."""
    fields = make_fields()
    slot = torch.arange(4096)
    path = first_path(["text", "latent"])
    times = draw_training(path, fields, rng_at(slot), slot, 4096).times
    moves = {name: (field.speed > 0).any(-1) for name, field in times.items()}
    assert torch.equal(moves["text"], ~moves["latent"])
    # t runs from 0 to 1, so the integral of dt is 1 for every field.
    assert float(times["text"].speed.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(times["latent"].speed.mean()) == pytest.approx(1.0, abs=0.1)


def mean_speeds(path, lacks_latent: bool) -> tuple[float, float]:
    """Return the mean speed of the text in diffusion terms and in decoding terms.

    Of 40 steps with 64 samples. With `lacks_latent`, the means are those of the samples without a
    latent, about half of them. They are random, since the slot of a sample is also its stratum.
    """
    slot = torch.arange(SLOTS)
    fields = make_fields()
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(3, dtype=torch.float64)
    for step in range(40):
        everyone = torch.ones(SLOTS, dtype=torch.bool)
        chosen = torch.rand(SLOTS, generator=generator) < 0.5 if lacks_latent else everyone
        present = {"text": everyone, "latent": ~chosen} if lacks_latent else None
        times, decodes = draw_training(
            path, fields, rng_at(slot, step), slot, SLOTS, present, {"text": 0.25}
        )
        speed = times["text"].speed[:, 0]
        decoded = decodes.get("text", ~everyone)
        sums[0] += speed[chosen & ~decoded].sum()
        sums[1] += speed[chosen & decoded].sum()
        sums[2] += chosen.sum()
    diffusion, decoding, count = sums.tolist()
    return diffusion / count, decoding / count


@pytest.mark.parametrize(
    ("path", "weight"),
    [
        (shared_path(["text", "latent"]), 1.0),
        (first_path(["text", "latent"]), 1.0),
        (MixedPaths([(TEXT_GIVEN_LATENT, 0.3), (LATENT_GIVEN_TEXT, 0.7)]), 0.3),
        (IndependentTimes(["text", "latent"]), 1.0),
        (CyclePaths([(TEXT_GIVEN_LATENT, 1), (LATENT_GIVEN_TEXT, 3)]), 0.25),
    ],
)
@pytest.mark.parametrize("lacks_latent", [False, True])
def test_weights_of_a_field_add_up_for_samples_with_and_without_other_fields(
    path, weight: float, lacks_latent: bool
) -> None:
    """The mean speed is the integral of dt, 1, times the share of the parts that train the text.

    The same holds for the weights of the decoding term. The tolerances are 4 standard errors of the
    noisiest case.
    """
    diffusion, decoding = mean_speeds(path, lacks_latent)
    assert diffusion == pytest.approx(weight, abs=0.15)
    assert decoding == pytest.approx(weight, abs=0.25)


@pytest.mark.parametrize(
    "path",
    [
        first_path(["text", "latent"]),
        MixedPaths([(TEXT_GIVEN_LATENT, 0.3), (LATENT_GIVEN_TEXT, 0.7)]),
    ],
)
def test_a_sample_without_a_field_is_never_drawn_on_a_leg_of_this_field_only(path) -> None:
    slot = torch.arange(SLOTS)
    without = slot % 2 == 0
    present = {"text": torch.ones_like(without), "latent": ~without}
    legs = set()
    for step in range(10):
        times, _ = draw_training(path, make_fields(), rng_at(slot, step), slot, SLOTS, present)
        speed = times["text"].speed[:, 0]
        assert (speed[without] > 0).all()
        legs.update((speed[~without] > 0).tolist())
    assert legs == {True, False}, "complete samples are drawn on both legs"


def test_decoding_samples_are_those_of_a_leg_of_the_field_with_its_end_times() -> None:
    slot = torch.arange(SLOTS)
    fields = make_fields()
    path = first_path(["latent", "text"])
    times, decodes = draw_training(path, fields, rng_at(slot), slot, SLOTS, decoding={"text": 0.25})
    assert set(decodes) == {"text"}
    chosen = decodes["text"]
    assert 4 <= int(chosen.sum()) <= 12, "a quarter of the half of the samples on the text's leg"
    assert not times["text"].t[chosen].any()
    assert (times["text"].speed[chosen] == 2.0 / 0.25).all()
    assert times["latent"].clean[chosen].all(), "the latent is decoded before the text"
    assert not times["latent"].speed[chosen].any()


def test_mixed_paths_give_each_part_its_share_of_the_batch() -> None:
    mixed = MixedPaths([(TEXT_GIVEN_LATENT, 3.0), (LATENT_GIVEN_TEXT, 1.0)])
    slot = torch.arange(SLOTS)
    for step in range(20):
        times = draw_training(mixed, make_fields(), rng_at(slot, step), slot, SLOTS).times
        given_latent = times["latent"].clean[:, 0]
        assert torch.equal(given_latent, ~times["text"].clean[:, 0])
        assert abs(int(given_latent.sum()) - 48) <= 2


def test_mixed_paths_spread_every_part_over_all_ranks() -> None:
    mixed = MixedPaths([(TEXT_GIVEN_LATENT, 1.0), (LATENT_GIVEN_TEXT, 1.0)])
    slot = torch.arange(SLOTS)
    for step in range(20):
        times = draw_training(mixed, make_fields(), rng_at(slot, step), slot, SLOTS).times
        of_rank = times["latent"].clean[:, 0].double().reshape(8, 8).sum(-1)
        assert (of_rank - 4.0).abs().max() <= 2.0


def test_mixed_paths_spread_the_times_of_every_part() -> None:
    """The samples of one part must not get one half of the times."""
    mixed = MixedPaths([(TEXT_GIVEN_LATENT, 1.0), (LATENT_GIVEN_TEXT, 1.0)])
    slot = torch.arange(SLOTS)
    for step in range(20):
        times = draw_training(mixed, make_fields(), rng_at(slot, step), slot, SLOTS).times
        t = times["text"].t[times["text"].speed[:, 0] > 0, 0]
        assert float(t.min()) < 0.1
        assert float(t.max()) > 0.9
        largest_gap = t.sort().values.diff().max()
        assert float(largest_gap) < 0.2


def test_mixed_paths_are_drawn_again_in_every_step_and_alike_in_every_part() -> None:
    mixed = MixedPaths([(TEXT_GIVEN_LATENT, 1.0), (shared_path(["text", "latent"]), 1.0)])
    slot = torch.arange(SLOTS)
    whole = draw_training(mixed, make_fields(), rng_at(slot), slot, SLOTS).times
    other = draw_training(mixed, make_fields(), rng_at(slot, 1), slot, SLOTS).times
    part = draw_training(mixed, make_fields(), rng_at(slot[24:40]), slot[24:40], SLOTS).times
    for name, times in whole.items():
        torch.testing.assert_close(part[name].t, times.t[24:40], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part[name].speed, times.speed[24:40], rtol=1e-12, atol=1e-12)
        assert torch.equal(part[name].clean, times.clean[24:40])
    assert not torch.equal(other["text"].t, whole["text"].t)


@pytest.mark.parametrize("paired", [True, False])
def test_paths_with_and_without_windows_are_not_mixed_in_a_batch(paired: bool) -> None:
    """Blocks and a clean copy of the text (paired) serve all samples of a batch or none."""
    fields = make_fields(WindowTimes(2, paired=paired))
    mixed = MixedPaths([(TEXT_GIVEN_LATENT, 1.0), (LATENT_GIVEN_TEXT, 1.0)])
    slot = torch.arange(SLOTS)
    kinds = set()
    for step in range(12):
        times = draw_training(mixed, fields, rng_at(slot, step), slot, SLOTS).times
        part = draw_training(mixed, fields, rng_at(slot[:5], step), slot[:5], SLOTS).times
        assert part["text"].paired == times["text"].paired
        assert len(set((times["latent"].speed[:, 0] > 0).tolist())) == 1
        has_blocks = times["text"].block is not None
        assert has_blocks is bool((times["text"].speed > 0).any())
        assert (part["text"].block is not None) is has_blocks
        kinds.add(has_blocks)
    assert kinds == {True, False}


@pytest.mark.parametrize(
    ("path", "share"),
    [
        (MixedPaths([(TEXT_GIVEN_LATENT, 0.9), (LATENT_GIVEN_TEXT, 0.1)]), 0.1),
        # One of the two legs of the first part moves the latent.
        (MixedPaths([(first_path(["latent", "text"]), 0.5), (TEXT_GIVEN_LATENT, 0.5)]), 0.25),
        (first_path(["latent", "text"]), 0.5),
    ],
)
@pytest.mark.parametrize("paired", [True, False])
def test_parts_with_windows_are_trained_as_often_as_their_weights_say(
    path, share: float, paired: bool
) -> None:
    fields = make_fields(WindowTimes(2, paired=paired))
    slot = torch.arange(4)
    steps = 600
    moves = 0
    for step in range(steps):
        times = draw_training(path, fields, rng_at(slot, step), slot, 4).times
        moves += int((times["latent"].speed > 0).any())
    # 4 standard deviations of the share.
    assert moves / steps == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / steps))


@pytest.mark.parametrize("parts", [[], [(TEXT_GIVEN_LATENT, 0.0)], [(TEXT_GIVEN_LATENT, -1.0)]])
def test_mixed_paths_refuse_weights_that_are_not_positive(parts) -> None:
    with pytest.raises(ArgumentError, match="weights above 0"):
        MixedPaths(parts)


def test_cycle_trains_every_part_for_its_steps_in_turn() -> None:
    fields = make_fields()
    slot = torch.arange(SLOTS)
    cycle = CyclePaths([(TEXT_GIVEN_LATENT, 2), (LATENT_GIVEN_TEXT, 1)])
    given = []
    for step in range(7):
        times = draw_training(cycle, fields, rng_at(slot, step), slot, SLOTS).times
        assert len(set(times["latent"].clean[:, 0].tolist())) == 1
        given.append(bool(times["latent"].clean.all()))
    assert given == [True, True, False, True, True, False, True]


def test_cycle_draws_the_times_of_the_part_of_the_step() -> None:
    fields = make_fields()
    slot = torch.arange(SLOTS)
    mixed = MixedPaths([(TEXT_GIVEN_LATENT, 1.0), (LATENT_GIVEN_TEXT, 1.0)])
    cycle = CyclePaths([(TEXT_GIVEN_LATENT, 1), (mixed, 2), (IndependentTimes(list(fields)), 1)])
    for step, part in enumerate([TEXT_GIVEN_LATENT, mixed, mixed, IndependentTimes(list(fields))]):
        expected = draw_training(part, fields, rng_at(slot, step), slot, SLOTS).times
        few = slot[5:9]
        found = draw_training(cycle, fields, rng_at(few, step), few, SLOTS).times
        for name in fields:
            torch.testing.assert_close(found[name].t, expected[name].t[5:9], rtol=1e-12, atol=0.0)
            assert torch.equal(found[name].clean, expected[name].clean[5:9])


@pytest.mark.parametrize("steps", [None, 0, -1, 1.5])
def test_cycle_refuses_numbers_of_steps_that_are_not_whole_and_positive(steps) -> None:
    parts = [] if steps is None else [(TEXT_GIVEN_LATENT, steps)]
    with pytest.raises(ArgumentError, match="whole numbers of steps above 0"):
        CyclePaths(parts)


def test_independent_times_of_two_fields_are_stratified_and_uncorrelated() -> None:
    fields = make_fields()
    slot = torch.arange(SLOTS)
    independent = IndependentTimes(["text", "latent"])
    correlations = []
    for step in range(40):
        times = draw_training(independent, fields, rng_at(slot, step), slot, SLOTS).times
        both = torch.stack([times[name].t[:, 0].argsort().argsort() for name in times]).double()
        correlations.append(float(torch.corrcoef(both)[0, 1]))
        assert float(times["text"].t.min()) < 0.05
        assert float(times["text"].t.max()) > 0.95
    mean = sum(correlations) / len(correlations)
    assert abs(mean) < 0.06
    assert max(map(abs, correlations)) < 0.6


def test_independent_times_refuse_windows_next_to_other_fields() -> None:
    slot = torch.arange(4)
    fields = make_fields(WindowTimes(2))
    independent = IndependentTimes(list(fields))
    for path in (independent, CyclePaths([(TEXT_GIVEN_LATENT, 1), (independent, 1)])):
        with pytest.raises(ArgumentError, match=r'"text" has a time rule with windows'):
            draw_training(path, fields, rng_at(slot, 1), slot, 4)
    alone = {"text": fields["text"]}
    assert draw_training(IndependentTimes(["text"]), alone, rng_at(slot), slot, 4).times


def test_require_path_refuses_rules_of_training_with_the_reason() -> None:
    path = shared_path(["text", "latent"])
    assert require_path(path, "evaluate") is path
    with pytest.raises(ArgumentError, match=r"evaluate: independent times .* not a bound"):
        require_path(IndependentTimes(["text", "latent"]), "evaluate")
    with pytest.raises(ArgumentError, match="evaluate: a mixture of paths is for training only"):
        require_path(MixedPaths([(path, 1.0)]), "evaluate")
    with pytest.raises(ArgumentError, match="evaluate: a cycle of paths is for training only"):
        require_path(CyclePaths([(path, 1)]), "evaluate")


# ---------------------------------------------------------------------- densities of draws


@pytest.mark.parametrize("tokens", [1, 2, 16, 1024])
def test_least_variance_density_integrates_to_one(tokens: int) -> None:
    density = LeastVariance(tokens)
    # The density is infinite at 0 like 1 / sqrt(p), which p = v^2 removes.
    v = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    total = (density.density(v**2) * 2.0 * v).mean()
    assert float(total) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 16, 1024])
def test_least_variance_quantile_inverts_the_distribution(tokens: int) -> None:
    density = LeastVariance(tokens)
    v = torch.tensor([1e-9, 1e-4, 0.1, 0.5, 0.9, 1.0 - 1e-9], dtype=torch.float64)
    p = density.quantile(v)
    # Integrate the density from 0 to p, with p w^2 in place of p.
    w = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000
    below = [float((density.density(end * w**2) * 2.0 * end * w).mean()) for end in p]
    torch.testing.assert_close(torch.tensor(below).double(), v, rtol=1e-6, atol=1e-12)
    assert float(density.quantile(torch.tensor([0.0]).double())) > 0.0


def test_least_variance_quantile_has_the_slope_of_the_density() -> None:
    density = LeastVariance(8)
    v = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    slope = (density.quantile(v + 1e-6) - density.quantile(v - 1e-6)) / 2e-6
    torch.testing.assert_close(slope * density.density(density.quantile(v)), torch.ones_like(v))


def test_uniform_density_is_one_and_its_own_quantile() -> None:
    v = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    assert torch.equal(UniformDensity().density(v), torch.ones_like(v))
    assert torch.equal(UniformDensity().quantile(v), v)
