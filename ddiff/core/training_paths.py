"""Times of several fields in training: one evaluation of the network per sample.

A path (`ddiff.core.paths`) has a bound. Mixtures and cycles of paths, and independent times, are
rules of training only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from ddiff.core.field import Fields, JointTimes, rng_of_field
from ddiff.core.paths import Path
from ddiff.core.rng import CounterRng
from ddiff.core.times import Times
from ddiff.errors import ArgumentError

# Digits in base 3 of the largest slot, 3^21 > 2^33.
DIGITS = 21


class TrainingPart(Protocol):
    """Path or rule whose draws train one sample."""

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """Names of the fields that move in each of the `draws`."""

    def draws(
        self, fields: Fields, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> Sequence[JointTimes]:
        """Draw joint times, one entry per evaluation of the network."""

    def ends(
        self, fields: Fields, name: str, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> tuple[JointTimes, JointTimes]:
        """Return the joint times of the end terms of one field: decoding and prior term.

        The prior term is called closing in code.
        """


@final
class MixedPaths:
    """One path per sample, drawn with given probabilities. For training only.

    The mean of a training loss is the weighted mean of the losses of the paths. The paths may give
    different fields, so the mixture itself has no bound.

    Args:
        parts: pairs (path or independent times, weight). The weights are positive and are divided
            by their sum.
    """

    def __init__(self, parts: Sequence[tuple[Path | IndependentTimes, float]]) -> None:
        if not parts or any(weight <= 0 for _, weight in parts):
            raise ArgumentError(
                "MixedPaths: parts must be pairs (path, weight) with weights above 0; got "
                f"{[weight for _, weight in parts]}."
            )
        total = sum(weight for _, weight in parts)
        self.parts = [(path, weight / total) for path, weight in parts]


@final
class IndependentTimes:
    """Independent times of all fields, as published systems train them. For training only.

    The sum of the terms at independent times does not bound -ln p(x): it can be smaller, so
    evaluation refuses it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        return [self.names]

    def draws(
        self, fields: Fields, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> Sequence[JointTimes]:
        self.check_fields(fields)
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
        return [times]

    def ends(
        self, fields: Fields, name: str, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> tuple[JointTimes, JointTimes]:
        (drawn,) = self.draws(fields, rng, slot, slots)
        others = {}
        for other, times in drawn.items():
            others[other] = times._replace(speed=torch.zeros_like(times.speed))
        field = fields[name]
        clock = field.process.information_time
        own = rng_of_field(rng, fields, name)
        first, last = field.rule.ends(clock, own, slot, slots, field.positions)
        return {**others, name: first}, {**others, name: last}

    def check_fields(self, fields: Fields) -> None:
        """Raise ArgumentError if one of several fields has a time rule with windows."""
        if len(self.names) == 1:
            return
        for name in self.names:
            if not fields[name].rule.has_one_time:
                raise ArgumentError(
                    f'IndependentTimes: the field "{name}" has a time rule with windows. While it '
                    "moves, the other fields do not attend to it, so they would never be trained "
                    "with a clean text, although sampling needs this. Use a rule with one time for "
                    "all positions (flat), or a mixture of paths on which the fields move one "
                    "after the other."
                )


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


TrainingPath = Path | MixedPaths | IndependentTimes | CyclePaths


class TrainingDraw(NamedTuple):
    """Joint times of one evaluation of the network per sample.

    Attributes:
        times: times of every field.
        decodes: bool [B] by field, samples that estimate the decoding term of this field. Their
            speeds are the weights of this term.
    """

    times: JointTimes
    decodes: Mapping[str, Tensor]


class _LegDraw(NamedTuple):
    """Draw of a leg of a part, on which the fields `names` move."""

    part: int
    names: Sequence[str]
    drawn: TrainingDraw


def draw_training(
    path: TrainingPath,
    fields: Fields,
    rng: CounterRng,
    slot: Tensor,
    slots: int | Tensor,
    present: Mapping[str, Tensor] | None = None,
    decoding: Mapping[str, float] | None = None,
) -> TrainingDraw:
    """Draw joint times of one evaluation of the network per sample.

    A sample is evaluated on one leg of one part of the path. It is chosen among those on which a
    field moves that the sample has. Speeds are divided by the probability of the choice. For every
    sample, the mean of (speed * integrand) is then the weighted sum over the parts of their
    diffusion terms, and for fields of `decoding` also of their decoding terms.

    Args:
        path: path or rule of training.
        fields: fields by name.
        rng: random generator of the B samples.
        slot: [B] stratum of each sample among `slots`.
        slots: number of samples of the global batch.
        present: bool [B] by field, samples that have the field; None: every sample has all fields.
        decoding: share of the samples on a leg that estimate the decoding term of a field which
            moves on this leg, by the name of the field.
    """
    if isinstance(path, CyclePaths):
        path = path.path_at(rng.step)
    parts: Sequence[tuple[TrainingPart, float]]
    if isinstance(path, MixedPaths):
        parts = path.parts
        channel = "mode"
    else:
        parts = [(path, 1.0)]
        channel = "leg"
    legs = []
    for number, (part, _) in enumerate(parts):
        drawn = part.draws(fields, rng, slot, slots)
        for names, times in zip(part.groups, drawn, strict=True):
            shares = {name: share for name, share in (decoding or {}).items() if name in names}
            mixed = _mix_decoding(part, times, fields, rng, slot, slots, present, shares)
            legs.append(_LegDraw(number, names, mixed))
    weights = [weight for _, weight in parts]
    return _choose_leg(legs, weights, rng, slot, present, channel)


def _mix_decoding(
    part: TrainingPart,
    times: JointTimes,
    fields: Fields,
    rng: CounterRng,
    slot: Tensor,
    slots: int | Tensor,
    present: Mapping[str, Tensor] | None,
    shares: Mapping[str, float],
) -> TrainingDraw:
    """Replace the times of some samples of a leg by those of decoding terms.

    The samples of a decoding term are consecutive in the batch, from a random first sample. Times
    are stratified by slot, so the times of the other samples remain evenly spread.
    """
    if not shares:
        return TrainingDraw(times, {})
    decodes: dict[str, Tensor] = {}
    place = (slot / slots + rng.uniform_per_group("ends")) % 1.0
    everyone = torch.ones_like(place, dtype=torch.bool)
    start = 0.0
    rest = torch.ones_like(place)
    for name, share in shares.items():
        has_field = everyone if present is None else present[name]
        decodes[name] = has_field & (place >= start) & (place < start + share)
        rest = torch.where(has_field, rest - share, rest)
        start += share
    mixed: JointTimes = _divide_speeds(times, rest)
    for name, chosen in decodes.items():
        first, _ = part.ends(fields, name, rng, slot, slots)
        first = _divide_speeds(first, torch.full_like(place, shares[name]))
        mixed = _merge(chosen, first, mixed)
    return TrainingDraw(mixed, decodes)


def _choose_leg(
    legs: Sequence[_LegDraw],
    weights: Sequence[float],
    rng: CounterRng,
    slot: Tensor,
    present: Mapping[str, Tensor] | None,
    channel: str,
) -> TrainingDraw:
    """Return one of the draws of all legs per sample, with larger speeds.

    Blocks of a field and its clean copy (paired) restrict the attention of all samples of a batch
    or of none. If the draws differ in this, one number of the global batch chooses the same leg for
    all samples. Without this, a field would not attend to a clean text of a sample, although it
    does so in evaluation and sampling.
    """
    if len(legs) == 1:
        return legs[0].drawn
    if len({_attention_kind(leg.drawn.times) for leg in legs}) > 1:
        return _choose_common_leg(legs, weights, rng)
    chance, factor = _leg_chances(legs, weights, len(slot), present)
    choice = _pick(chance.to(slot.device), _place(rng, slot, channel))
    factor = factor.to(slot.device)
    merged = _multiply_speeds(legs[0].drawn.times, factor[:, 0])
    decodes: dict[str, Tensor] = {}
    for number, leg in enumerate(legs):
        chosen = choice == number
        merged = _merge(chosen, _multiply_speeds(leg.drawn.times, factor[:, number]), merged)
        for name, decoded in leg.drawn.decodes.items():
            before = decodes.get(name, torch.zeros_like(decoded))
            decodes[name] = torch.where(chosen, decoded, before)
    return TrainingDraw(merged, decodes)


def _attention_kind(times: JointTimes) -> tuple[tuple[bool, bool], ...]:
    """Return for every field whether it has a clean copy, and whether it has blocks."""
    return tuple((field.paired, field.block is not None) for field in times.values())


def _choose_common_leg(
    legs: Sequence[_LegDraw], weights: Sequence[float], rng: CounterRng
) -> TrainingDraw:
    """Return the draw of one leg for all samples of the global batch, with larger speeds."""
    # The number depends on no sample, so a rank without samples chooses the same leg.
    step = CounterRng(rng.seed, rng.step, torch.zeros(1, dtype=torch.long), 1, rng.purpose)
    chance, factor = _leg_chances(legs, weights, 1, None)
    number = int(_pick(chance, step.uniform_per_group("pairing")))
    times, decodes = legs[number].drawn
    return TrainingDraw(_multiply_speeds(times, factor[:, number].to(rng.index.device)), decodes)


def _pick(chance: Tensor, place: Tensor) -> Tensor:
    """Return the number [B] of the interval that contains place [B]; its length is its chance."""
    stops = chance.cumsum(-1)
    return (place.unsqueeze(-1) >= stops).sum(-1).clamp(max=chance.shape[-1] - 1)


def _leg_chances(
    legs: Sequence[_LegDraw],
    weights: Sequence[float],
    samples: int,
    present: Mapping[str, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return the probability of every leg, and (weight of its part) / probability, [B,legs] both.

    A leg is useful for a sample if a field of the sample moves on it. Other legs have probability
    0. The parts that remain keep the
    ratios of their weights, and the legs of a part have equal probabilities.
    """
    is_useful = torch.ones(samples, len(legs), dtype=torch.bool)
    if present is not None:
        columns = [torch.stack([present[name] for name in leg.names]).any(0) for leg in legs]
        is_useful = torch.stack(columns, -1).cpu()
        # A sample without any field has loss 0 on every leg.
        is_useful = is_useful | ~is_useful.any(-1, keepdim=True)
    part_of_leg = torch.tensor([leg.part for leg in legs])
    in_part = torch.nn.functional.one_hot(part_of_leg, len(weights)).double()
    counts = is_useful.double() @ in_part
    each = torch.tensor(weights, dtype=torch.float64)
    # 1 minus the weights of parts without useful legs: exactly 1 if every part has such a leg.
    total = 1.0 - torch.where(counts > 0, 0.0, each).sum(-1, keepdim=True)
    factor = (counts * total)[:, part_of_leg]
    # A part without useful legs has factor 0. `where` replaces the quotients of its legs by 0.
    chance = torch.where(is_useful, each[part_of_leg] / factor, 0.0)
    return chance, factor


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


def _divide_speeds(times: JointTimes, divisor: Tensor) -> dict[str, Times]:
    """Return the times with all speeds divided by a number per sample [B]."""
    column = divisor.unsqueeze(-1)
    return {name: field._replace(speed=field.speed / column) for name, field in times.items()}


def _multiply_speeds(times: JointTimes, factor: Tensor) -> dict[str, Times]:
    """Return the times with all speeds multiplied by a number per sample [B]."""
    column = factor.unsqueeze(-1)
    return {name: field._replace(speed=field.speed * column) for name, field in times.items()}


def _merge(chosen: Tensor, first: JointTimes, second: JointTimes) -> dict[str, Times]:
    """Return the times `first` of the samples in `chosen` [B], and `second` of the others."""
    return {name: _merge_field(chosen, first[name], second[name]) for name in first}


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
