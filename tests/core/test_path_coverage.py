"""Situations of paths, and the refusal of situations that do not occur in training."""

from __future__ import annotations

import random
import re
import tomllib

import pytest
import torch
from ddiff_core.paths import Mixture

from ddiff.core.field_targets import parse_target
from ddiff.core.path_coverage import (
    describe_situation,
    is_trained,
    part_of_recipe,
    require_trained,
    segments,
    situations,
)
from ddiff.core.paths import Hold, Leg, LegPath, first_path, given_path, lagged_path, shared_path
from ddiff.core.times import FlatTimes
from ddiff.core.training_paths import CyclePaths, IndependentTimes, MixedPaths, TrainingPath
from ddiff.errors import ArgumentError
from ddiff.testing.joint_probes import small_fields

PAIR = ("text", "latent")
SHARED = shared_path(PAIR)
LATENT_FIRST = first_path(["latent", "text"])
GIVEN_LATENT = given_path(SHARED, {"latent": "clean"})
GIVEN_TEXT = given_path(SHARED, {"text": "clean"})
PRIOR_LATENT = given_path(SHARED, {"latent": "prior"})
NO_LATENT = given_path(SHARED, {"latent": "absent"})


def random_path(seed: int) -> LegPath:
    """Return a path of three fields with random legs and holds."""
    generator = random.Random(seed)
    legs: dict[str, Leg | Hold] = {"text": Leg(0.0, 1.0)}
    holds: tuple[Hold, ...] = ("clean", "prior", "absent")
    for name in ("image", "latent"):
        if generator.random() < 0.3:
            legs[name] = generator.choice(holds)
        else:
            start, stop = sorted(generator.sample([0.0, 0.25, 0.5, 0.75, 1.0], 2))
            legs[name] = Leg(start, stop)
    if generator.random() < 0.5:
        legs["text"] = Leg(0.0, 0.5)
        legs["image"] = Leg(0.5, 1.0)
    return LegPath(legs)


@pytest.mark.parametrize("seed", range(20))
def test_situations_are_the_states_of_the_fields_along_the_path(seed: int) -> None:
    """Compare with the marks of `at` at values of tau inside all intervals between legs."""
    path = random_path(seed)
    fields = small_fields(path)
    tau = torch.arange(0.005, 1.0, 0.01, dtype=torch.float64)
    times = path.at(fields, tau)
    found = []
    for number in range(len(tau)):
        states = {}
        for name, field in times.items():
            if field.absent is not None and bool(field.absent[number]):
                states[name] = "absent"
            elif bool(field.clean[number].all()):
                states[name] = "clean"
            elif field.at_prior is not None and bool(field.at_prior[number].all()):
                states[name] = "prior"
            else:
                states[name] = "moves"
        if states not in found:
            found.append(states)
    assert situations(path) == found


@pytest.mark.parametrize("seed", range(20))
def test_every_path_is_trained_by_itself_and_by_rules_that_contain_it(seed: int) -> None:
    path = random_path(seed)
    other = random_path(seed + 100)
    for trained in (
        path,
        MixedPaths([(other, 1.0), (path, 0.1)]),
        CyclePaths([(other, 2), (path, 1)]),
    ):
        require_trained(path, trained, "test")


@pytest.mark.parametrize("seed", range(20))
def test_independent_times_train_all_situations_without_absent_fields(seed: int) -> None:
    path = random_path(seed)
    independent = IndependentTimes(["text", "image", "latent"])
    has_absent = "absent" in path.legs.values()
    assert all(is_trained(one, independent) for one in segments(path)) is not has_absent
    # The parts of a cycle may be rules of training.
    cycle = CyclePaths([(independent, 1), (random_path(3), 1)])
    assert all(is_trained(one, cycle) for one in segments(path)) or has_absent


@pytest.mark.parametrize(
    ("path", "trained"),
    [
        (LATENT_FIRST, MixedPaths([(PRIOR_LATENT, 1.0), (GIVEN_LATENT, 1.0)])),
        (LATENT_FIRST, SHARED),
        (SHARED, LATENT_FIRST),
        (lagged_path("latent", "text"), SHARED),
        (GIVEN_LATENT, SHARED),
        (GIVEN_LATENT, MixedPaths([(SHARED, 1.0), (GIVEN_TEXT, 1.0)])),
        (PRIOR_LATENT, MixedPaths([(SHARED, 1.0), (NO_LATENT, 1.0)])),
        (NO_LATENT, IndependentTimes(PAIR)),
    ],
)
def test_require_trained_refuses_a_situation_that_training_lacks(
    path: LegPath, trained: TrainingPath
) -> None:
    with pytest.raises(ArgumentError, match="network was not trained"):
        require_trained(path, trained, "test")


@pytest.mark.parametrize(
    ("path", "trained"),
    [
        (GIVEN_LATENT, MixedPaths([(SHARED, 1.0), (GIVEN_LATENT, 0.1)])),
        (GIVEN_LATENT, LATENT_FIRST),
        (given_path(SHARED, {"text": "prior"}), LATENT_FIRST),
        (LATENT_FIRST, IndependentTimes(PAIR)),
        (LegPath(SHARED.legs, {"latent": 0.2}), IndependentTimes(PAIR)),
        # A common power only changes tau, and the power of a field that moves alone too.
        (LegPath(SHARED.legs, {"text": 0.5, "latent": 0.5}), SHARED),
        (LegPath(LATENT_FIRST.legs, {"latent": 0.2}), LATENT_FIRST),
        (lagged_path("latent", "text", 0.4), CyclePaths([(lagged_path("latent", "text", 0.4), 1)])),
    ],
)
def test_require_trained_accepts_situations_of_another_path(
    path: LegPath, trained: TrainingPath
) -> None:
    require_trained(path, trained, "test")


MIXTURE = MixedPaths([(SHARED, 1.0), (LATENT_FIRST, 1.0), (GIVEN_TEXT, 1.0)])


@pytest.mark.parametrize(
    ("path", "trained"),
    [
        (LegPath(SHARED.legs, {"latent": 0.2}), MIXTURE),
        (SHARED, MixedPaths([(LegPath(SHARED.legs, {"text": 1.1}), 1.0), (LATENT_FIRST, 1.0)])),
        (lagged_path("latent", "text"), MIXTURE),
        (lagged_path("latent", "text", 0.3), lagged_path("latent", "text", 0.25)),
        # The latent moves while the text is at its prior, but only from the noisiest quarter on.
        (given_path(SHARED, {"text": "prior"}), lagged_path("latent", "text")),
    ],
)
def test_require_trained_refuses_progress_that_training_lacks(
    path: LegPath, trained: TrainingPath
) -> None:
    with pytest.raises(ArgumentError, match="at other progress of these fields than in training"):
        require_trained(path, trained, "test")


def test_require_trained_needs_the_whole_progress_of_a_field() -> None:
    given = given_path(shared_path(PAIR), {"latent": "clean"})
    # The latent is clean only while the text has progress below 0.6 or 0.3.
    early = LegPath({"text": Leg(0.0, 1.0), "latent": Leg(0.6, 1.0)})
    late = LegPath({"text": Leg(0.0, 1.0), "latent": Leg(0.3, 0.7)})
    with pytest.raises(ArgumentError, match="other progress"):
        require_trained(given, MixedPaths([(early, 1.0), (late, 1.0)]), "test")
    require_trained(given, MixedPaths([(early, 1.0), (LATENT_FIRST, 1.0)]), "test")


def test_require_trained_joins_the_parts_of_several_paths() -> None:
    """Each of two paths has a part of the progress of the text while the others are clean."""
    asked = LegPath({"text": Leg(0.0, 1.0), "image": "clean", "latent": "prior"})
    low = LegPath({"text": Leg(0.0, 1.0), "image": Leg(0.7, 1.0), "latent": "prior"})
    high = LegPath({"text": Leg(0.0, 1.0), "image": "clean", "latent": Leg(0.0, 0.5)})
    for alone in (low, high):
        with pytest.raises(ArgumentError, match="other progress"):
            require_trained(asked, alone, "test")
    require_trained(asked, MixedPaths([(low, 1.0), (high, 1.0)]), "test")


def test_guidance_asks_for_the_situation_without_the_field() -> None:
    trained = MixedPaths([(SHARED, 1.0), (GIVEN_LATENT, 1.0)])
    without_latent: dict[str, dict[str, Hold]] = {"text": {"latent": "prior"}}
    with pytest.raises(ArgumentError, match=r"guidance of text needs .* latent is at the prior"):
        require_trained(GIVEN_LATENT, trained, "test", without_latent)
    dropped = MixedPaths([(SHARED, 1.0), (GIVEN_LATENT, 1.0), (PRIOR_LATENT, 0.1)])
    require_trained(GIVEN_LATENT, dropped, "test", without_latent)
    with pytest.raises(ArgumentError, match="latent is absent"):
        require_trained(GIVEN_LATENT, dropped, "test", {"text": {"latent": "absent"}})


def test_guidance_of_a_field_counts_only_where_the_field_moves() -> None:
    guidance: dict[str, dict[str, Hold]] = {"latent": {"text": "absent"}}
    require_trained(GIVEN_LATENT, GIVEN_LATENT, "test", guidance)
    with pytest.raises(ArgumentError, match="the guidance of latent"):
        require_trained(LATENT_FIRST, LATENT_FIRST, "test", guidance)


def test_samples_without_a_field_train_situations_in_which_it_is_absent() -> None:
    absent_text = given_path(SHARED, {"text": "absent"})
    for trained in (SHARED, IndependentTimes(PAIR)):
        require_trained(absent_text, trained, "test", lacking=[{"text"}])
        with pytest.raises(ArgumentError, match="text is absent"):
            require_trained(absent_text, trained, "test", lacking=[{"latent"}])
    # If the latent is never given in training, it is not given in samples without text either.
    both = LegPath({"text": "absent", "image": Leg(0.0, 1.0), "latent": "clean"})
    three = shared_path(["text", "image", "latent"])
    with pytest.raises(ArgumentError, match="not trained"):
        require_trained(both, three, "test", lacking=[{"text"}])


@pytest.mark.parametrize(
    "trained",
    [
        shared_path(["text", "image", "latent"]),
        IndependentTimes(["text", "image", "latent"]),
    ],
)
def test_fields_must_be_absent_in_the_same_training_sample(trained: TrainingPath) -> None:
    asked = LegPath({"text": Leg(0.0, 1.0), "image": "absent", "latent": "absent"})
    require_trained(asked, trained, "test", lacking=[{"image", "latent"}])
    with pytest.raises(ArgumentError, match="image and latent are absent"):
        require_trained(asked, trained, "test", lacking=[{"image"}, {"latent"}])


def test_fields_that_are_always_absent_together_are_not_absent_alone() -> None:
    three = shared_path(["text", "image", "latent"])
    given = given_path(three, {"latent": "clean"})
    trained = MixedPaths([(three, 1.0), (given, 1.0)])
    asked = given_path(three, {"image": "absent", "latent": "clean"})
    require_trained(asked, trained, "test", lacking=[{"image"}])
    with pytest.raises(ArgumentError, match="image is absent"):
        require_trained(asked, trained, "test", lacking=[{"image", "latent"}])


@pytest.mark.parametrize(("hold", "start", "stop"), [("clean", 0.2, 1.0), ("prior", 0.0, 0.8)])
def test_independent_times_train_holds_only_if_the_time_rule_reaches_them(
    hold: Hold, start: float, stop: float
) -> None:
    path = given_path(SHARED, {"latent": hold})
    independent = IndependentTimes(PAIR)
    fields = small_fields(SHARED)
    require_trained(path, independent, "test", fields=fields)
    limited = {**fields, "latent": fields["latent"]._replace(rule=FlatTimes(start, stop))}
    with pytest.raises(ArgumentError, match="not trained"):
        require_trained(path, independent, "test", fields=limited)
    require_trained(SHARED, independent, "test", fields=limited)


@pytest.mark.parametrize("power", [0.005, 0.2, 3.0, 200.0, 1e8])
def test_paths_with_any_power_are_trained_by_themselves(power: float) -> None:
    one = LegPath(SHARED.legs, {"text": power})
    require_trained(one, one, "test")
    # Equal powers of both fields only change tau.
    if power <= 200.0:
        require_trained(LegPath(SHARED.legs, {"text": power, "latent": power}), SHARED, "test")
    with pytest.raises(ArgumentError, match="other progress"):
        require_trained(one, SHARED, "test")


def test_error_names_the_situations_and_a_recipe_that_trains_them() -> None:
    names = ("text", "image", "latent")
    target = parse_target("image | text", names).path(shared_path(names))
    trained = shared_path(names)
    with pytest.raises(ArgumentError) as caught:
        require_trained(target, trained, '[sample] targets, "image | text"')
    message = str(caught.value)
    assert message.startswith('[sample] targets, "image | text": the path needs predictions')
    assert "where image moves, text is clean, latent is at the prior." in message
    assert "Trained: text, image and latent move." in message
    # The advice is TOML, and the rule that it describes trains the situation.
    table = re.search(r"times = (\{.*\]\})", message)
    assert table is not None
    times = tomllib.loads(f"times = {table[1]}")["times"]
    assert times.pop("kind") == "mixture"
    config = Mixture.Config.model_validate(times, strict=False)
    require_trained(target, Mixture.build(config, names=names), "test")
    require_trained(trained, Mixture.build(config, names=names), "test")


def test_descriptions_of_situations_name_all_fields() -> None:
    situation = {"text": "moves", "image": "absent", "latent": "clean", "label": "clean"}
    assert describe_situation(situation) == (  # type: ignore[arg-type]
        "text moves, latent and label are clean, image is absent"
    )
    assert part_of_recipe(situation) == (  # type: ignore[arg-type]
        '{path = "shared", clean = ["latent", "label"], absent = ["image"]}'
    )
