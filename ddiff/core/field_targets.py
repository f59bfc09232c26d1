"""Targets: which fields of a sample are drawn, and which fields are given.

    joint           all fields are drawn together
    image | text    the image is drawn given the text
    image           the image is drawn; all other fields are held, by default at their prior
    text through latent
                    the bound of the text by rate plus distortion; only evaluated

A target names evaluations, samples and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ddiff.core.paths import Hold, Leg, LegPath, given_path
from ddiff.errors import ArgumentError, shorten, suggest

JOINT = "joint"
"""Target that draws all fields."""

THROUGH = " through "
"""Word between a text and the vector through which the text is bounded."""


class Target(NamedTuple):
    """Fields that are drawn and fields that are given.

    Attributes:
        drawn: names of the fields that are drawn, at least one.
        given: names of the fields that are clean.
        others: names of all other fields, which are held at their prior or absent.
    """

    drawn: tuple[str, ...]
    given: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def is_joint(self) -> bool:
        """True if all fields are drawn."""
        return not self.given and not self.others

    @property
    def file_name(self) -> str:
        """Name of the target as a part of a file name, such as `image-given-text`."""
        if self.is_joint:
            return JOINT
        name = "-and-".join(self.drawn)
        if self.given:
            name += f"-given-{'-and-'.join(self.given)}"
        return name

    def __str__(self) -> str:
        """Return the text from which `parse_target` makes this target."""
        if self.is_joint:
            return JOINT
        text = ", ".join(self.drawn)
        if self.given:
            text += f" | {', '.join(self.given)}"
        return text

    def path(self, path: LegPath, unnamed: Hold = "prior") -> LegPath:
        """Return the path of this target, on which the given fields are clean.

        Intervals of `path` in which no drawn field moves are cut out.

        Args:
            path: path of all fields, on which at least the drawn fields move.
            unnamed: state of the fields that are neither drawn nor given.
        """
        still = [name for name in self.drawn if not isinstance(path.legs.get(name), Leg)]
        if still:
            raise ArgumentError(
                f'Target.path: path must move the fields that "{self}" draws; got {path}, which '
                f"does not move {', '.join(still)}."
            )
        held: dict[str, Hold] = dict.fromkeys(self.given, "clean")
        held.update(dict.fromkeys(self.others, unnamed))
        return given_path(path, held) if held else path


class ThroughTarget(NamedTuple):
    """Bound of a text through a vector by rate plus distortion (`ddiff.core.rate_distortion`).

    Attributes:
        text: name of the field that is scored.
        latent: name of the field of vectors.
    """

    text: str
    latent: str

    def __str__(self) -> str:
        """Return the text from which `parse_evaluated` makes this target."""
        return f"{self.text}{THROUGH}{self.latent}"


def parse_evaluated(text: str, names: Sequence[str]) -> Target | ThroughTarget:
    """Return the target of an evaluation that a text describes.

    Args:
        text: a text for `parse_target`, or "A through B".
        names: names of all fields.

    Raises ArgumentError for a text that names no target.
    """
    scored, through, latent = text.partition(THROUGH)
    if not through:
        return parse_target(text, names)
    target = ThroughTarget(scored.strip(), latent.strip())
    for name in target:
        if name not in names:
            reason = f'it names "{shorten(name)}", which is not a field.{suggest(name, names)}'
            raise _target_error(text, names, reason.removesuffix("."))
    if target.text == target.latent:
        raise _target_error(text, names, f'it names the field "{target.text}" twice')
    return target


def parse_target(text: str, names: Sequence[str]) -> Target:
    """Return the target that a text describes.

    Args:
        text: "joint", names of drawn fields, or names of drawn and of given fields, such as
            "image, latent | text".
        names: names of all fields.

    Raises ArgumentError for an unknown name, a field that is named twice, and a text without a
    drawn field.
    """
    if text.strip() == JOINT:
        return Target(tuple(names))
    if THROUGH in text:
        raise _target_error(text, names, 'targets with "through" are evaluated and not sampled')
    left, bar, right = text.partition("|")
    drawn = _split_names(text, left, names)
    given = _split_names(text, right, names) if bar else []
    for name in [*drawn, *given]:
        if [*drawn, *given].count(name) > 1:
            raise _target_error(text, names, f'it names the field "{name}" twice')
    others = [name for name in names if name not in drawn and name not in given]
    # In the order of the recipe, so that equal targets have equal names.
    return Target(
        tuple(name for name in names if name in drawn),
        tuple(name for name in names if name in given),
        tuple(others),
    )


def _split_names(text: str, part: str, names: Sequence[str]) -> list[str]:
    """Return the field names of one side of a target. `text` is the whole target."""
    found = [name.strip() for name in part.split(",")]
    for name in found:
        if not name:
            raise _target_error(text, names, "a name is missing")
        if name not in names:
            reason = f'it names "{shorten(name)}", which is not a field.{suggest(name, names)}'
            raise _target_error(text, names, reason.removesuffix("."))
    return found


def _target_error(text: str, names: Sequence[str], reason: str) -> ArgumentError:
    end = "" if reason.endswith("?") else "."
    return ArgumentError(
        f'The target "{shorten(text)}" cannot be read: {reason}{end} A target is "{JOINT}", or '
        'names of the drawn fields, with the given fields after "|": "A, B | C". An evaluation '
        f'also has targets "A through B". Fields: {", ".join(names)}.'
    )
