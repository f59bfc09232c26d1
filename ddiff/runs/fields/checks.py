"""Checks of the evaluation and the samples of a run of several fields, before training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from typing import TYPE_CHECKING

from ddiff.core.field import Fields
from ddiff.core.field_targets import Target, ThroughTarget, parse_evaluated, parse_target
from ddiff.core.path_coverage import require_trained
from ddiff.core.paths import Hold, LegPath
from ddiff.core.rate_distortion import rate_distortion_legs, rate_distortion_paths
from ddiff.core.training_paths import TrainingPath, require_path
from ddiff.errors import ArgumentError
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.runs.fields.build import FieldsModel, check_path
from ddiff.sampling.fields import JointSampler
from ddiff.sampling.joint_network import Guidance
from ddiff.sampling.loop import Sampler

if TYPE_CHECKING:
    from ddiff.runs.fields.values import FieldShape

Lacking = Callable[[], Collection[Set[str]]]
"""Function that returns the combinations of fields that some training samples lack."""


def check_stages(
    recipe: FieldsRecipe,
    model: FieldsModel,
    shapes: Mapping[str, FieldShape],
    lacking: Lacking = tuple,
) -> None:
    """Raise ArgumentError if a target of [evaluate] or [sample] cannot be computed.

    A target must name fields of the recipe, and the training must cover it. `lacking` returns
    the combinations of fields that some training samples lack.
    """
    names = list(recipe.fields)
    path = evaluation_path(recipe)
    for text in recipe.evaluate.targets:
        target = parse_evaluated(text, names)
        if isinstance(target, ThroughTarget):
            check_through(recipe, model, target, lacking)
            continue
        along = target.path(path, recipe.evaluate.unnamed)
        check_path(along, model.fields)
        caller = f'[evaluate] targets, "{target}"'
        require(along, model.objective.path, caller, lacking=lacking, fields=model.fields)
    for text in recipe.sample.targets:
        target = parse_target(text, names)
        sampler = build_joint_sampler(recipe, shapes, target)
        check_target(model, sampler, target, lacking)
    check_preview(recipe)


def find_text_target(recipe: FieldsRecipe) -> Target | None:
    """Return the first target of [sample] targets that draws a text, or None."""
    for text in recipe.sample.targets:
        target = parse_target(text, list(recipe.fields))
        if any(recipe.fields[name].tokenizer is not None for name in target.drawn):
            return target
    return None


def check_preview(recipe: FieldsRecipe) -> None:
    """Raise ArgumentError if [sample] every is set and no target draws a text."""
    every = recipe.sample.every
    if every is not None and find_text_target(recipe) is None:
        raise ArgumentError(
            f"[sample] every = {every} shows texts during training, but no target of [sample] "
            f"targets ({', '.join(recipe.sample.targets)}) draws a field of texts. Leave the key "
            "out, or add such a target."
        )


def check_targets(recipe: FieldsRecipe) -> None:
    """Raise ArgumentError if the training does not cover a target of [evaluate] or [sample].

    Needs neither the data nor the network, so that a dry run can check every recipe.
    """
    names = list(recipe.fields)
    trained = recipe.times.build(names=names)
    path = evaluation_path(recipe)
    for text in recipe.evaluate.targets:
        evaluated = parse_evaluated(text, names)
        if isinstance(evaluated, ThroughTarget):
            _require_through(recipe, evaluated, trained)
        else:
            along = evaluated.path(path, recipe.evaluate.unnamed)
            require(along, trained, f'[evaluate] targets, "{evaluated}"')
    path = sampling_path(recipe)
    for text in recipe.sample.targets:
        target = parse_target(text, names)
        along = target.path(path, recipe.sample.unnamed)
        require(along, trained, f'[sample] targets, "{target}"')
    check_preview(recipe)


def check_through(
    recipe: FieldsRecipe, model: FieldsModel, target: ThroughTarget, lacking: Lacking
) -> None:
    """Raise ArgumentError if the bound of a text through a vector cannot be computed.

    The fields must be tokens and vectors with the noise of the recipe, and the training must cover
    rate and distortion. `lacking` returns the combinations of fields that training samples lack.
    """
    deviation = find_deviation(recipe, target)
    try:
        rate_distortion_paths(model.fields, *target, deviation, recipe.evaluate.unnamed)
    except ArgumentError as error:
        error.args = (f'[evaluate] targets, "{target}": {error}',)
        raise
    _require_through(recipe, target, model.objective.path, lacking)


def _require_through(
    recipe: FieldsRecipe, target: ThroughTarget, trained: TrainingPath, lacking: Lacking = tuple
) -> None:
    """Raise ArgumentError if the training does not cover rate and distortion of a target."""
    deviation = find_deviation(recipe, target)
    unnamed = recipe.evaluate.unnamed
    rate, distortion = rate_distortion_legs(list(recipe.fields), *target, deviation, unnamed)
    caller = f'[evaluate] targets, "{target}"'
    require(rate, trained, f"{caller}, rate", lacking=lacking)
    require(distortion, trained, f"{caller}, distortion", lacking=lacking)


def find_deviation(recipe: FieldsRecipe, target: ThroughTarget) -> float:
    """Return the deviation of the noise of the vector of a target.

    Raises ArgumentError if the recipe has no deviation for this field.
    """
    deviation = recipe.evaluate.deviation
    if isinstance(deviation, Mapping):
        for name in deviation:
            if name not in recipe.fields:
                raise ArgumentError(
                    f'[evaluate] deviation: the keys must be fields; got "{name}". Fields: '
                    f"{', '.join(recipe.fields)}."
                )
        deviation = deviation.get(target.latent)
    if deviation is None:
        raise ArgumentError(
            f'[evaluate] targets, "{target}" needs [evaluate] deviation, the standard deviation of '
            f'the noise of "{target.latent}" in normalized units. For example, write deviation = '
            "0.3."
        )
    return deviation


def evaluation_path(recipe: FieldsRecipe) -> LegPath:
    """Return the path of the moving fields in an evaluation.

    Raises ArgumentError for a rule of training, which has no bound.
    """
    return _build_leg_path(recipe, "evaluate")


def sampling_path(recipe: FieldsRecipe) -> LegPath:
    """Return the path of the moving fields in sampling.

    Raises ArgumentError for a rule of training, which cannot be followed.
    """
    return _build_leg_path(recipe, "sample")


def _build_leg_path(recipe: FieldsRecipe, table: str) -> LegPath:
    spec = recipe.evaluate_path if table == "evaluate" else recipe.sample_path
    path = spec.build(names=list(recipe.fields))
    with spec.prefix_errors():
        found = require_path(path, table)
        if not isinstance(found, LegPath):
            raise ArgumentError(
                f"{table}: on the path, each field must be noised in one interval of tau, or keep "
                f"one time; got {type(found).__name__}, a rule for training, which has no bound "
                'and which samplers cannot follow. Use "shared", "first" or "lagged".'
            )
    return found


def build_joint_sampler(
    recipe: FieldsRecipe,
    shapes: Mapping[str, FieldShape],
    target: Target,
    steps: int | None = None,
) -> JointSampler:
    """Build the sampler of a target.

    `steps`: number of steps; None: those of the recipe. The key `steps` of a field is used on legs
    on which no other field moves.
    """
    keys = recipe.sample
    samplers: dict[str, Sampler] = {}
    for name in target.drawn:
        tables = recipe.fields[name]
        own = steps or tables.keys.steps or keys.steps
        samplers[name] = tables.sampler.build(steps=own, vocabulary=shapes[name].vocabulary)
    guidance = {}
    for name, given in keys.guidance.items():
        if name not in recipe.fields:
            raise ArgumentError(
                f"[sample] guidance: the guided fields must be fields of the recipe "
                f'({", ".join(recipe.fields)}); got "{name}".'
            )
        without: dict[str, Hold] = dict(given.without)
        if name in target.drawn and set(without) <= {*target.drawn, *target.given}:
            guidance[name] = Guidance(given.weight, without)
    path = target.path(sampling_path(recipe), keys.unnamed)
    return JointSampler(samplers, path, steps or keys.steps, keys.update, guidance)


def check_target(
    model: FieldsModel, sampler: JointSampler, target: Target, lacking: Lacking
) -> None:
    """Raise ArgumentError if samples of a target are not possible.

    The samplers must support the processes, and the training must cover the target and its
    guidance. `lacking` returns the combinations of fields that some training samples lack.
    """
    parameterizations = model.denoiser.parameterizations
    predicts = {name: parameterizations[name].predicts for name in model.fields}
    caller = f'[sample] targets, "{target}"'
    given: dict[str, Hold] = dict.fromkeys(target.given, "clean")
    try:
        path = sampler.check_supported(model.fields, predicts, given)
    except ArgumentError as error:
        error.args = (f"{caller}: {error}",)
        raise
    guidance = {name: each.without for name, each in sampler.guidance.items()}
    require(path, model.objective.path, caller, guidance, lacking, model.fields)


def require(
    path: LegPath,
    trained: TrainingPath,
    caller: str,
    guidance: Mapping[str, Mapping[str, Hold]] | None = None,
    lacking: Lacking = tuple,
    fields: Fields | None = None,
) -> None:
    """Raise ArgumentError if the training does not cover a path; see `require_trained`."""
    try:
        require_trained(path, trained, caller, guidance, fields=fields)
    except ArgumentError:
        # Asked only now, because the samples must be read to find the fields that they lack.
        require_trained(path, trained, caller, guidance, lacking(), fields)
