"""Bounds of the validation samples of several fields by target, with controls and exact limits.

Every target with given fields may have two controls. A control replaces the given fields, by those
of another sample ("shuffled") or by noise ("noise"). If the network uses the given fields, the
bounds of the controls are larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from ddiff.core.field_targets import Target, ThroughTarget, parse_evaluated
from ddiff.core.paths import LegPath, given_path
from ddiff.data.fields_batch import FieldsBatch
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, DataError
from ddiff.evaluation.fields import (
    FieldFigures,
    JointEvaluation,
    RateDistortion,
    evaluate_fields,
    evaluate_rate_distortion,
)
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.runs.fields.batches import (
    find_present,
    move_batch,
    replace_fields,
    spread_evenly,
)
from ddiff.runs.fields.build import FieldsModel
from ddiff.runs.fields.checks import (
    check_through,
    evaluation_path,
    find_deviation,
    require,
)
from ddiff.runs.fields.data import RunFields
from ddiff.runs.fields.own_vectors import describe_own_vectors
from ddiff.runs.fields.rate import ThroughEvaluation, describe_mean

DATA_UNITS = "data units"
"""Name of the term of a bound that converts normalized vectors to units of the data."""


@dataclass(frozen=True, repr=False)
class TargetEvaluation:
    """Bound of one target.

    Attributes:
        bound: bound of the validation samples.
        entropy: true entropy in nats per sample, a lower limit for every model; None: unknown.
        left_out: number of validation samples that lack a field of the target.
        controls: bounds with replaced given fields, by name.
        untrained: name of a control that the training does not cover -> reason.
        own_vectors: given fields that are computed from a drawn text. The bound is then no
            likelihood of this text, since the given vector contains the text.
        notes: note on the part of a field, by name (`describe_own_vectors`).
    """

    bound: JointEvaluation
    entropy: float | None = None
    left_out: int = 0
    controls: Mapping[str, JointEvaluation] = field(default_factory=dict)
    untrained: Mapping[str, str] = field(default_factory=dict)
    own_vectors: Sequence[str] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        text = describe_mean(self.bound)
        for name, found in self.controls.items():
            text += f"; {name} {found.nats_per_sample:.4f}"
        return f"TargetEvaluation({text})"

    @property
    def is_below_entropy(self) -> bool:
        """True if the whole interval of the bound lies below the true entropy.

        A bound cannot be smaller than the entropy, so the model or the entropy is then wrong.
        """
        if self.entropy is None or self.bound.interval is None:
            return False
        return self.bound.interval[1] < self.entropy

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        written = describe_bound(self.bound)
        written["entropy_nats_per_sample"] = self.entropy
        written["is_below_entropy"] = self.is_below_entropy
        written["left_out"] = self.left_out
        written["own_vectors"] = list(self.own_vectors)
        written["notes"] = dict(self.notes)
        controls = {}
        for name, found in self.controls.items():
            mean, interval = self.bound.subtract_from(found)
            controls[name] = {
                **describe_bound(found),
                "excess_nats_per_sample": mean,
                "excess_interval": _plain(interval),
            }
        written["controls"] = controls
        written["untrained_controls"] = dict(self.untrained)
        return written


def describe_bound(found: JointEvaluation) -> dict[str, Any]:
    """Return the figures of a bound as plain values."""
    fields = {name: _describe_field(figures) for name, figures in found.fields.items()}
    return {
        "path": found.path,
        "nats_per_sample": found.nats_per_sample,
        "interval": _plain(found.interval),
        "monte_carlo_interval": _plain(found.monte_carlo_interval),
        "samples": found.samples,
        "fields": fields,
    }


def _describe_field(figures: FieldFigures) -> dict[str, Any]:
    return {
        "nats_per_item": figures.nats_per_item,
        "interval": _plain(figures.interval),
        "items": figures.items,
        "terms": dict(figures.terms),
    }


def _plain(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


class Bounds:
    """Evaluation of the validation samples of a run.

    Args:
        recipe: recipe of the run.
        model: denoiser with the processes of its fields and its objective.
        data: samples of the run.
        draws: number of draws per sample; None: as in the recipe.
        console: console for the progress bar.
        ranks: processes that divide the batches; None: only this process.
    """

    def __init__(
        self,
        recipe: FieldsRecipe,
        model: FieldsModel,
        data: RunFields,
        draws: int | None = None,
        console: Console | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.recipe = recipe
        self.model = model
        self.data = data
        self.draws = recipe.evaluate.draws if draws is None else draws
        self.console = console
        self.path = evaluation_path(recipe)

    def evaluate(self, targets: Sequence[str]) -> dict[str, TargetEvaluation | ThroughEvaluation]:
        """Compute the bounds of targets, with their controls."""
        found: dict[str, TargetEvaluation | ThroughEvaluation] = {}
        for text in targets:
            target = parse_evaluated(text, list(self.model.fields))
            if isinstance(target, ThroughTarget):
                found[str(target)] = self._evaluate_through(target)
                continue
            bound = self._score_target(target)
            controls, untrained = self._controls(target)
            present = find_present(self.data, [*target.drawn, *target.given])
            found[str(target)] = TargetEvaluation(
                bound,
                self.data.documents.entropies.get(str(target)),
                self.data.num_validation - len(present),
                controls,
                untrained,
                self._own_vectors(target),
                self._describe_parts(target),
            )
        return found

    def score(self, text: str) -> JointEvaluation | RateDistortion:
        """Compute the bound of one target, without controls."""
        target = parse_evaluated(text, list(self.model.fields))
        if isinstance(target, ThroughTarget):
            return self._score_through(target)
        return self._score_target(target)

    def _score_target(self, target: Target) -> JointEvaluation:
        path = target.path(self.path, self.recipe.evaluate.unnamed)
        self._require(path, f'evaluate: target "{target}"')
        return self._score_path(target, path)

    def _require(self, path: LegPath, caller: str) -> None:
        trained = self.model.objective.path
        require(path, trained, caller, lacking=self.data.lacking, fields=self.model.fields)

    def _own_vectors(self, target: Target) -> list[str]:
        """Return the given fields that are computed from a drawn text."""
        own = []
        for name in target.given:
            if self.data.fields[name].computed_from in target.drawn:
                own.append(name)
        return own

    def _describe_parts(self, target: Target) -> dict[str, str]:
        """Return the notes on texts with their own vectors along the path of a target."""
        path = target.path(self.path, self.recipe.evaluate.unnamed)
        sources = {}
        for name, values in self.data.fields.items():
            if values.computed_from in self.data.fields:
                sources[name] = values.computed_from
        return describe_own_vectors(path, sources)

    # ------------------------------------------------------------------ rate plus distortion

    def _evaluate_through(self, target: ThroughTarget) -> ThroughEvaluation:
        bound = self._score_through(target)
        entropy = self.data.documents.entropies.get(target.text)
        present = find_present(self.data, target)
        return ThroughEvaluation(target, bound, entropy, self.data.num_validation - len(present))

    def _score_through(self, target: ThroughTarget) -> RateDistortion:
        """Compute the bound of a text through a vector, of the samples that have both fields."""
        lacking = self.data.lacking
        check_through(self.recipe, self.model, target, lacking)
        keys = self.recipe.evaluate
        numbers = self._numbers(target, target)
        self.model.objective.module.eval()  # no dropout; the trainer switches back
        return evaluate_rate_distortion(
            self.model.objective,
            self._batches(numbers, ()),
            len(numbers),
            target.text,
            target.latent,
            find_deviation(self.recipe, target),
            draws=self.draws,
            batch=keys.batch,
            seed=keys.seed,
            unnamed=keys.unnamed,
            # The samples are only read if the state of a field may be absent.
            lacking=lacking() if keys.unnamed == "absent" else (),
            device=self.model.device,
            console=self.console,
            ranks=self.ranks,
        )

    # ------------------------------------------------------------------ controls

    def _controls(self, target: Target) -> tuple[dict[str, JointEvaluation], dict[str, str]]:
        """Return the bounds of the controls, and the reasons for controls that are left out."""
        found: dict[str, JointEvaluation] = {}
        untrained: dict[str, str] = {}
        if not target.given or not self.recipe.evaluate.controls:
            return found, untrained
        path = target.path(self.path, self.recipe.evaluate.unnamed)
        found["shuffled"] = self._score_path(target, path, "shuffled")
        noise = given_path(path, dict.fromkeys(target.given, "prior"))
        try:
            self._require(noise, "the control with noise")
        except ArgumentError as error:
            untrained["noise"] = str(error)
        else:
            found["noise"] = self._score_path(target, noise, "noise")
        return found, untrained

    # ------------------------------------------------------------------ one path

    def _score_path(self, target: Target, path: LegPath, control: str = "") -> JointEvaluation:
        """Compute the bound of the samples that have all fields of a target along a path.

        `control`: name of the control, or "" for the bound of the target.
        """
        title = f"evaluating {target}" + (f", {control}" if control else "")
        numbers = self._numbers([*target.drawn, *target.given], target)
        keys = self.recipe.evaluate
        self.model.objective.module.eval()  # no dropout; the trainer switches back
        found = evaluate_fields(
            self.model.objective,
            self._batches(numbers, target.given if control == "shuffled" else ()),
            len(numbers),
            path,
            draws=self.draws,
            batch=keys.batch,
            seed=keys.seed,
            volumes=self._volumes(target.drawn),
            device=self.model.device,
            console=self.console,
            ranks=self.ranks,
            title=title,
        )
        if control == "shuffled":
            return replace(found, partners=pair_samples(len(numbers), keys.seed))
        return found

    def _numbers(self, names: Sequence[str], target: Target | ThroughTarget) -> NDArray[np.int64]:
        """Return the numbers of the evaluated samples, which have all fields `names`."""
        present = find_present(self.data, names)
        if not len(present):
            raise DataError(
                f'evaluate: no validation sample has all fields of the target "{target}". Remove '
                "the target from [evaluate] targets, or add such samples."
            )
        return present[spread_evenly(len(present), self.recipe.evaluate.samples)]

    def _batches(
        self, numbers: NDArray[np.int64], replaced: Sequence[str]
    ) -> Callable[[NDArray[np.int64]], FieldsBatch]:
        """Return the function that reads batches, with `replaced` fields of another sample."""
        partners = pair_samples(len(numbers), self.recipe.evaluate.seed)

        def batch_of(places: NDArray[np.int64]) -> FieldsBatch:
            batch = self.data.validation_batch(numbers[places])
            if replaced:
                others = self.data.validation_batch(numbers[partners[places]])
                batch = replace_fields(batch, {name: others.fields[name] for name in replaced})
            return move_batch(batch, self.model.device)

        return batch_of

    def _volumes(self, names: Sequence[str]) -> dict[str, float]:
        """Return the logarithm of the volume of every normalizer that can be inverted."""
        volumes = {}
        for name in names:
            normalizer = self.data.fields[name].normalizer
            if normalizer is not None and normalizer.log_volume is not None:
                volumes[name] = normalizer.log_volume
        return volumes


def pair_samples(count: int, seed: int) -> NDArray[np.int64]:
    """Return the number of another sample for each of `count` samples (one sample: itself)."""
    order = np.random.default_rng(seed).permutation(count)
    partners = np.empty(count, np.int64)
    partners[order] = np.roll(order, 1)
    return partners
