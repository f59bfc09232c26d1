"""Objects of a recipe that `ddiff check RECIPE.toml` checks.

These are the components with conformance checks, built in small with the settings of the recipe,
and in a recipe of several fields every path of training, evaluation and sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ddiff.core.field_targets import ThroughTarget, parse_evaluated
from ddiff.core.paths import HeldAt, LegPath, Path
from ddiff.core.training_paths import (
    CyclePaths,
    IndependentTimes,
    MixedPaths,
    TrainingPath,
    require_path,
)
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.recipe.model import BaseRecipe

ENDING = ".toml"
"""End of the name of a recipe file, which distinguishes it from components and plugins."""

# A backbone of a recipe may be too large for a check.
KINDS = ("process", "head", "time_rule", "sampler")


def is_recipe_name(name: str) -> bool:
    """Return whether a name is that of a recipe file."""
    return name.endswith(ENDING)


def list_specs(recipe: BaseRecipe) -> list[ComponentSpec]:
    """Return the components of a recipe that have conformance checks, each once."""
    found: list[ComponentSpec] = []
    for spec in recipe.components().values():
        # Heads of vectors are linear, and have no conformance checks.
        has_laws = spec.component.kind != "head" or "tokens" in spec.members.states
        is_known = any(
            (spec.component, spec.config) == (other.component, other.config) for other in found
        )
        if spec.component.kind in KINDS and has_laws and not is_known:
            found.append(spec)
    return found


def list_paths(recipe: BaseRecipe) -> dict[str, Path]:
    """Return every path of a recipe of several fields, by the key that it comes from.

    Equal paths are listed once. Independent times have no path. Paths that hold a field with noise
    are left out, since the true value of their bounds is not known.
    """
    if not isinstance(recipe, FieldsRecipe):
        return {}
    names = list(recipe.fields)
    found: dict[str, Path] = {}
    for number, path in enumerate(_parts(recipe.times.build(names=names)), start=1):
        found[f"[objective] times, path {number}"] = path
    used = (
        ("evaluate", recipe.evaluate_path, recipe.evaluate.targets),
        ("sample", recipe.sample_path, recipe.sample.targets),
    )
    for table, spec, targets in used:
        for path, target in _target_paths(table, spec, targets, names):
            found[f"[{table}] {target}"] = path
    distinct: dict[str, Path] = {}
    for label, path in found.items():
        if any(isinstance(leg, HeldAt) for leg in path.legs.values()):
            continue
        if not any(_is_same_path(path, other) for other in distinct.values()):
            distinct[label] = path
    return distinct


def _is_same_path(first: Path, second: Path) -> bool:
    if not (isinstance(first, LegPath) and isinstance(second, LegPath)):
        return first is second
    return (first.legs, first.power) == (second.legs, second.power)


def _parts(path: TrainingPath) -> Iterator[Path]:
    if isinstance(path, CyclePaths | MixedPaths):
        for part, _ in path.parts:
            yield from _parts(part)
    elif not isinstance(path, IndependentTimes):
        yield path


def _target_paths(
    table: str, spec: ComponentSpec, targets: Sequence[str], names: Sequence[str]
) -> Iterator[tuple[Path, str]]:
    path = require_path(spec.build(names=names), f"[{table}] path")
    for text in targets:
        target = parse_evaluated(text, names)
        if isinstance(target, ThroughTarget):
            continue
        # Only a `LegPath` can be restricted to the fields of a target.
        yield (target.path(path) if isinstance(path, LegPath) else path), str(target)
