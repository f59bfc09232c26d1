"""Times of several fields in training: one evaluation of the network per sample.

A path (`ddiff.core.paths`) has a bound. Mixtures and cycles of paths, and independent times, are
rules of training only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ddiff.core.field import Fields, JointTimes, rng_of_field
from ddiff.core.paths import Path
from ddiff.core.rng import CounterRng
from ddiff.core.times import Times
from ddiff.errors import ArgumentError

# Digits in base 3 of the largest slot, 3^21 > 2^33.
DIGITS = 21


@final
class MixedPaths:
    """One path per sample, drawn with given probabilities. For training only.

    The mean of a training loss is the weighted mean of the losses of the paths. The paths may give
    different fields, so the mixture itself has no bound.

    Args:
        parts: pairs (path, weight). The weights are positive and are divided by their sum.
    """

    def __init__(self, parts: Sequence[tuple[Path, float]]) -> None:
        if not parts or any(weight <= 0 for _, weight in parts):
            raise ArgumentError(
                "MixedPaths: parts must be pairs (path, weight) with weights above 0; got "
                f"{[weight for _, weight in parts]}."
            )
        total = sum(weight for _, weight in parts)
        self.parts = [(path, weight / total) for path, weight in parts]

    def draw_training(
        self, fields: Fields, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> JointTimes:
        """Draw the joint times of a training step."""
        place = _place(rng, slot, "mode")
        weights = [weight for _, weight in self.parts]
        choice, inside = _choose_part(place, weights)
        drawn = []
        for path, _ in self.parts:
            drawn.append(_draw_leg(path.draws(fields, rng, slot, slots), inside, rng))
        return _merge(choice, drawn, rng, weights, "pairing of parts")


@final
class IndependentTimes:
    """Independent times of all fields, as published systems train them. For training only.

    The sum of the terms at independent times does not bound -ln p(x): it can be smaller, so
    evaluation refuses it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def draw_training(
        self, fields: Fields, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> JointTimes:
        """Draw the joint times of a training step."""
        times = {}
        for name in self.names:
            field = fields[name]
            clock = field.process.information_time
            own = rng_of_field(rng, fields, name)
            # Every field has its own random order of the strata of the global batch. With the same
            # order the times of two fields would be almost equal.
            everyone = CounterRng(own.seed, own.step, torch.arange(int(slots)), 1, own.purpose)
            order = everyone.uniform("order")[:, 0].argsort().to(slot.device)
            times[name] = field.rule.draw(clock, own, order[slot], slots, field.positions)
        return times


@final
class CyclePaths:
    """One path for all samples of a step, which changes from step to step. For training only.

    Every cycle trains the first path for the first steps, then the second path, and so on. The path
    is a function of the training step, so ranks, micro-batches and resumed runs agree.

        CyclePaths([(text_given_latent, 3), (latent_given_text, 1)])    # 3 steps, then 1 step

    Args:
        parts: pairs (path or rule of training, number of steps per cycle).
    """

    def __init__(self, parts: Sequence[tuple[Path | MixedPaths | IndependentTimes, int]]) -> None:
        is_whole = all(isinstance(steps, int) and steps > 0 for _, steps in parts)
        if not parts or not is_whole:
            raise ArgumentError(
                "CyclePaths: parts must be pairs (path, steps) with whole numbers of steps above "
                f"0; got {[steps for _, steps in parts]}."
            )
        self.parts = list(parts)
        self.steps = sum(steps for _, steps in parts)
        """Number of training steps of a cycle."""

    def path_at(self, step: int) -> Path | MixedPaths | IndependentTimes:
        """Return the path or rule of a training step, counted from 0."""
        rest = step % self.steps
        for path, steps in self.parts:
            if rest < steps:
                return path
            rest -= steps
        raise AssertionError("the steps of the parts add up to a cycle")

    def draw_training(
        self, fields: Fields, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> JointTimes:
        """Draw the joint times of the training step `rng.step`."""
        return draw_training(self.path_at(rng.step), fields, rng, slot, slots)


TrainingPath = Path | MixedPaths | IndependentTimes | CyclePaths


def draw_training(
    path: TrainingPath, fields: Fields, rng: CounterRng, slot: Tensor, slots: int | Tensor
) -> JointTimes:
    """Draw joint times of one evaluation of the network per sample.

    For a path the diffusion terms at these times estimate the integral over the whole path. If the
    path has several draws, each sample gets one of them, and its speeds are multiplied by their
    number.
    """
    if isinstance(path, MixedPaths | IndependentTimes | CyclePaths):
        return path.draw_training(fields, rng, slot, slots)
    drawn = path.draws(fields, rng, slot, slots)
    return _draw_leg(drawn, _place(rng, slot, "leg"), rng)


def _draw_leg(drawn: Sequence[JointTimes], place: Tensor, rng: CounterRng) -> JointTimes:
    """Return one of several draws per sample, by its place [B] in [0,1), with larger speeds."""
    count = len(drawn)
    if count == 1:
        return drawn[0]
    weights = [1.0 / count] * count
    choice, _ = _choose_part(place, weights)
    scaled = []
    for times in drawn:
        faster = {name: field._replace(speed=field.speed * count) for name, field in times.items()}
        scaled.append(faster)
    return _merge(choice, scaled, rng, weights, "pairing of legs")


def require_path(path: TrainingPath, caller: str) -> Path:
    """Return the path if it has a bound. Raises ArgumentError for a rule of training only."""
    if isinstance(path, IndependentTimes):
        raise ArgumentError(
            f"{caller}: independent times of the fields are for training only. The sum of the "
            "terms at independent times is not a bound: it can be smaller than the true negative "
            "log-likelihood. Evaluate along a path: shared, first, or lagged."
        )
    if isinstance(path, MixedPaths | CyclePaths):
        kind = "mixture" if isinstance(path, MixedPaths) else "cycle"
        raise ArgumentError(
            f"{caller}: a {kind} of paths is for training only, since its parts give different "
            "fields. Evaluate along one path: shared, first, or lagged."
        )
    return path


def _place(rng: CounterRng, slot: Tensor, channel: str) -> Tensor:
    """Return a number in [0,1) per sample [B] that is spread evenly over every range of slots.

    The digits of the slot in base 3 are reversed, as those in base 2 are for the times. Points of
    two such sequences fill the square evenly (Halton 1960). Ranks and micro-batches therefore get
    all parts, and every part gets times from the whole interval. The start is random.
    """
    place = torch.zeros(slot.shape, dtype=torch.float64, device=slot.device)
    rest = slot
    digit_value = 1.0
    for _ in range(DIGITS):
        digit_value = digit_value / 3.0
        place = place + (rest % 3) * digit_value
        rest = rest // 3
    return (place + rng.uniform_per_group(channel)) % 1.0


def _choose_part(place: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the number [B] of the part that contains each place, and the place inside the part.

    The parts are adjacent intervals of [0,1) with the given lengths.
    """
    lengths = torch.tensor(weights, dtype=torch.float64, device=place.device)
    stops = lengths.cumsum(0)
    number = torch.searchsorted(stops, place, right=True).clamp(max=len(weights) - 1)
    inside = (place - (stops - lengths)[number]) / lengths[number]
    return number, inside.clamp(0.0, 1.0 - 2.0**-53)


def _merge(
    choice: Tensor,
    drawn: Sequence[JointTimes],
    rng: CounterRng,
    weights: Sequence[float],
    channel: str,
) -> JointTimes:
    """Return the times of draw number choice[b] for every sample b.

    A pass with a clean copy of a field (paired) serves all samples of a batch or none. If the draws
    differ in this, one number of the global batch chooses the same draw for all samples, with the
    probabilities `weights`. Legs and parts have different channels of the generator, so that their
    choices are independent.
    """
    pairings = {tuple(field.paired for field in times.values()) for times in drawn}
    if len(pairings) > 1:
        common = CounterRng(rng.seed, rng.step, torch.zeros(1, dtype=torch.long), 1, rng.purpose)
        chosen, _ = _choose_part(common.uniform(channel)[0], weights)
        return drawn[int(chosen)]
    merged: dict[str, Times] = {}
    for name in drawn[0]:
        result = drawn[0][name]
        for number, times in enumerate(drawn[1:], start=1):
            result = _merge_field(choice == number, times[name], result)
        merged[name] = result
    return merged


def _merge_field(chosen: Tensor, first: Times, second: Times) -> Times:
    column = chosen.unsqueeze(-1)

    def choose(one: Tensor | None, other: Tensor | None, mask: Tensor) -> Tensor | None:
        if one is None and other is None:
            return None
        template = one if one is not None else other
        assert template is not None
        nothing = torch.zeros_like(template)
        return torch.where(
            mask, nothing if one is None else one, nothing if other is None else other
        )

    return Times(
        torch.where(column, first.t, second.t),
        torch.where(column, first.speed, second.speed),
        torch.where(column, first.clean, second.clean),
        choose(first.at_prior, second.at_prior, column),
        choose(first.block, second.block, column),
        first.paired,
        choose(first.absent, second.absent, chosen),
    )
