"""Targets: texts that say which fields are drawn and which are given, and their paths."""

from __future__ import annotations

import pytest

from ddiff.core.field_targets import Target, ThroughTarget, parse_evaluated, parse_target
from ddiff.core.paths import Leg, LegPath, first_path, lagged_path, shared_path
from ddiff.errors import ArgumentError

NAMES = ("text", "image", "latent")


@pytest.mark.parametrize(
    ("text", "target", "written", "file_name"),
    [
        ("joint", Target(NAMES), "joint", "joint"),
        ("latent, text,image", Target(NAMES), "joint", "joint"),
        (
            "image | text",
            Target(("image",), ("text",), ("latent",)),
            "image | text",
            "image-given-text",
        ),
        (
            " latent,text|image",
            Target(("text", "latent"), ("image",)),
            "text, latent | image",
            "text-and-latent-given-image",
        ),
        ("image", Target(("image",), (), ("text", "latent")), "image", "image"),
        (
            "text | latent, image",
            Target(("text",), ("image", "latent")),
            "text | image, latent",
            "text-given-image-and-latent",
        ),
    ],
)
def test_parse_target_finds_drawn_and_given_fields_in_recipe_order(
    text: str, target: Target, written: str, file_name: str
) -> None:
    parsed = parse_target(text, NAMES)
    assert parsed == target
    assert str(parsed) == written
    assert parsed.file_name == file_name
    assert parse_target(str(parsed), NAMES) == parsed


def test_target_of_a_single_field_is_joint() -> None:
    assert parse_target("text", ("text",)) == parse_target("joint", ("text",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imgae | text", r'names "imgae", which is not a field\. Did you mean "image"\?'),
        ("image | txt", r'Did you mean "text"\? A target is .* Fields: text, image, latent\.'),
        ("image | image", 'names the field "image" twice'),
        ("image, image", 'names the field "image" twice'),
        ("| text", "a name is missing"),
        ("image |", "a name is missing"),
        ("image,", "a name is missing"),
        ("", "a name is missing"),
        ("image | text | latent", r'names "text \| latent", which is not a field'),
        ("joint | text", 'names "joint", which is not a field'),
    ],
)
def test_parse_target_refuses_a_text_that_names_no_fields(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_target(text, NAMES)


def test_parse_evaluated_finds_a_text_and_the_vector_through_which_it_is_bounded() -> None:
    target = parse_evaluated(" text  through latent", NAMES)
    assert target == ThroughTarget("text", "latent")
    assert str(target) == "text through latent"
    assert parse_evaluated("image | text", NAMES) == parse_target("image | text", NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text through latnet", r'"latnet", which is not a field\. Did you mean "latent"\?'),
        ("text, image through latent", '"text, image", which is not a field'),
        ("text through text", 'names the field "text" twice'),
        ("text through latent | image", "which is not a field"),
    ],
)
def test_parse_evaluated_refuses_a_target_through_no_vector(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_evaluated(text, NAMES)


def test_parse_target_refuses_a_target_that_cannot_be_sampled() -> None:
    with pytest.raises(ArgumentError, match='targets with "through" are evaluated and not sampled'):
        parse_target("text through latent", NAMES)


def test_target_path_holds_given_fields_clean_and_others_at_the_prior() -> None:
    path = parse_target("image | text", NAMES).path(shared_path(NAMES))
    assert path.legs == {"text": "clean", "image": Leg(0.0, 1.0), "latent": "prior"}
    path = parse_target("image", NAMES).path(shared_path(NAMES), unnamed="absent")
    assert path.legs == {"text": "absent", "image": Leg(0.0, 1.0), "latent": "absent"}
    whole = shared_path(NAMES)
    assert parse_target("joint", NAMES).path(whole) is whole


def test_target_path_stretches_the_legs_of_drawn_fields_to_the_whole_interval() -> None:
    path = parse_target("text, latent | image", NAMES).path(first_path(["image", "text", "latent"]))
    assert path.legs == {"latent": Leg(0.0, 0.5), "image": "clean", "text": Leg(0.5, 1.0)}
    path = parse_target("text", ("text", "image")).path(lagged_path("text", "image", 0.5))
    assert path.legs == {"text": Leg(0.0, 1.0), "image": "prior"}


def test_target_path_keeps_the_power_of_drawn_fields() -> None:
    legs = {name: Leg(0.0, 1.0) for name in NAMES}
    path = LegPath(legs, {"text": 2.0, "image": 0.5})
    assert parse_target("image | text", NAMES).path(path).power == {"image": 0.5}


def test_target_path_refuses_a_path_that_holds_a_drawn_field() -> None:
    path = LegPath({"text": "clean", "image": Leg(0.0, 1.0), "latent": "prior"})
    with pytest.raises(ArgumentError, match="does not move text, latent"):
        parse_target("joint", NAMES).path(path)
