"""Paths of the bound of a text through a latent vector that is computed from the text.

The latent f(x) of a text x is not part of the data, so -ln p(x | f(x)) is not a likelihood of x.
With q(z|x) = N(f(x), s^2), the text has the bound (arXiv 1711.00464)

    -ln p(x) <= rate + distortion
    rate       = KL( q(z|x) || p(z) ) <= diffusion of the latent from t_s to 1, and closing term
    distortion = E_q[ -ln p(x | z) ]  <= bound of the text, with the latent held at t_s

The time t_s is the time of the Gaussian process at which sigma / a = s, so z = z_{t_s} / a. During
the terms of the rate, the text is at its prior. The bound holds for every vector f that a sample
has, also for one that is not computed from the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from ddiff.core.field import Fields, JointTimes
from ddiff.core.gaussian import GaussianProcess
from ddiff.core.paths import HeldAt, Hold, Leg, LegPath
from ddiff.core.rng import CounterRng
from ddiff.core.times import TimeRule
from ddiff.errors import ArgumentError

# Halvings of [0,1] in the search for the progress of a time.
HALVINGS = 60


@final
class RulePath:
    """Path on which one field follows another time rule than its own.

    Args:
        path: path of all fields.
        name: the field.
        rule: time rule of this field.
    """

    def __init__(self, path: LegPath, name: str, rule: TimeRule) -> None:
        self.path = path
        self.name = name
        self.rule = rule
        self.legs = path.legs
        self.groups = path.groups

    def __repr__(self) -> str:
        return repr(self.path)

    def at(self, fields: Fields, tau: Tensor) -> JointTimes:
        return self.path.at(self._replace_rule(fields), tau)

    def draws(
        self, fields: Fields, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> Sequence[JointTimes]:
        return self.path.draws(self._replace_rule(fields), rng, slot, slots)

    def ends(
        self, fields: Fields, name: str, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> tuple[JointTimes, JointTimes]:
        return self.path.ends(self._replace_rule(fields), name, rng, slot, slots)

    def _replace_rule(self, fields: Fields) -> Fields:
        return {**fields, self.name: fields[self.name]._replace(rule=self.rule)}


class RateDistortionPaths(NamedTuple):
    """Paths of the two parts of the bound of a text through a latent.

    Attributes:
        rate: the latent moves from t_s to 1 while the text is at its prior. Its diffusion and
            closing terms are the rate; its decoding term is not part of it.
        distortion: the text moves while the latent is held with noise of deviation s.
        time: the time t_s.
    """

    rate: RulePath
    distortion: LegPath
    time: float


def rate_distortion_paths(
    fields: Fields, text: str, latent: str, deviation: float, unnamed: Hold = "prior"
) -> RateDistortionPaths:
    """Return the paths of the bound of a text through a latent.

    Args:
        fields: fields by name.
        text: name of the field of tokens that is scored.
        latent: name of the field of vectors that is computed from the text.
        deviation: s, in normalized units of the latent.
        unnamed: state of all other fields, "prior" or "absent".
    """
    caller = "rate_distortion_paths"
    for name in (text, latent):
        if name not in fields:
            raise ArgumentError(
                f'{caller}: "{name}" must be one of the fields {", ".join(fields)}.'
            )
    process = fields[latent].process
    if text == latent or not isinstance(process, GaussianProcess):
        raise ArgumentError(
            f"{caller}: latent must be another field than text, with a Gaussian process; got text "
            f'"{text}" and latent "{latent}".'
        )
    if fields[text].process.states != "tokens":
        raise ArgumentError(f'{caller}: text must be a field of tokens; "{text}" has vectors.')
    rule = fields[latent].rule
    if not rule.has_one_time:
        raise ArgumentError(
            f'{caller}: the time rule of "{latent}" has windows, whose earlier vectors are clean. '
            "The vectors of a rate must all be noisy: use a rule with one time (flat)."
        )
    tokens = rule.tokens or fields[latent].positions
    whole = rule.with_window(0.0, 1.0, tokens)
    try:
        time = process.time_of_deviation(deviation)
    except ArgumentError as error:
        error.args = (f"{caller}: {error}",)
        raise
    start = _find_progress(process, whole, time)
    rate, distortion = rate_distortion_legs(list(fields), text, latent, deviation, unnamed)
    return RateDistortionPaths(
        RulePath(rate, latent, rule.with_window(start, 1.0, tokens)), distortion, time
    )


def rate_distortion_legs(
    names: Sequence[str], text: str, latent: str, deviation: float, unnamed: Hold = "prior"
) -> tuple[LegPath, LegPath]:
    """Return the legs of rate and distortion, without the time at which the rate starts.

    They tell which states the training must contain; see `rate_distortion_paths`.
    """
    held: dict[str, Hold] = dict.fromkeys(names, unnamed)
    moves = Leg(0.0, 1.0)
    rate = LegPath({**held, text: "prior", latent: moves})
    distortion = LegPath({**held, text: moves, latent: HeldAt(deviation)})
    return rate, distortion


def _find_progress(process: GaussianProcess, rule: TimeRule, time: float) -> float:
    """Return the progress at which the times of a rule reach `time`, by bisection."""
    clock = process.information_time
    early = 0.0
    late = 1.0
    for _ in range(HALVINGS):
        middle = (early + late) / 2.0
        tau = torch.tensor([middle], dtype=torch.float64)
        if float(rule.at(clock, tau, 1).t) < time:
            early = middle
        else:
            late = middle
    return late
