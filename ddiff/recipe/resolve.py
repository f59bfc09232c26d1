"""Resolve recipes: TOML text -> checked settings and components.

    recipe = read_recipe("recipes/mine.toml", settings=["train.steps=200"])
    recipe.process.build(vocabulary=vocabulary)

A recipe is resolved in three steps, which raise RecipeError with the file and the line:

1. `files.read_file`: find the file of the recipe and read its text.
2. `sources.read_sources`: parse the text, and merge the recipes that it extends and `--set` texts.
3. `tables.read_tables`: check names, load the listed plugins, and validate the keys of each table.

Reading a recipe imports its components, because their `Config` classes define their keys. Importing
this module imports no component.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from pathlib import Path, PurePosixPath
from typing import Any

from ddiff.errors import ArgumentError, RecipeError, suggest
from ddiff.plugin.registry import Component, Registry
from ddiff.plugin.sampler_lookup import find_sampler
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.recipe.files import RecipeFile, read_file
from ddiff.recipe.model import Recipe
from ddiff.recipe.schema import FIELDS, TEXT
from ddiff.recipe.settings import read_settings
from ddiff.recipe.sources import read_sources
from ddiff.recipe.tables import read_tables, validate_table
from ddiff.recipe.tree import RecipeTree


def read_recipe(name: str | Path, settings: Iterable[str] = ()) -> Recipe | FieldsRecipe:
    """Read and resolve a recipe. A recipe with tables [fields.NAME] gives a `FieldsRecipe`.

    Args:
        name: path, name of a shipped recipe, or fsspec address.
        settings: "key=value" texts, as for `--set`, which replace values of the recipe.

    Raises RecipeError for an error in the recipe, and PluginError for an error in a plugin.
    """
    file = read_file(str(name))
    # an inherited name would make this run overwrite the run of the base recipe
    tree = read_sources(file, settings, default_name=PurePosixPath(file.source).stem)
    return read_tables(tree)


def parse_recipe(
    text: str, source: str = "<text>", settings: Iterable[str] = ()
) -> Recipe | FieldsRecipe:
    """Resolve a recipe given as TOML text.

    `source` is the file name in messages. Paths in `extends` may be relative to the folder of this
    file. `settings` are "key=value" texts that replace values of the recipe.
    """
    tree = read_sources(RecipeFile(text, source), settings)
    return read_tables(tree)


def configure_component(
    component: Component,
    settings: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> ComponentSpec:
    """Configure a component without a recipe.

    Used for the settings of `ddiff check NAME --set` and `ddiff sample --set`.

    Args:
        component: the registered component.
        settings: "key=value" texts with keys of the component's `Config`.
        defaults: values of keys that `settings` does not set; by default those of `Config`.
    """
    base = RecipeTree(dict(defaults or {}), "--set")
    tree = read_settings(settings, "--set").merge_over(base, _inherit_all)
    config = component.config_class()
    for name in tree.values:
        if name in {**TEXT.tables, **FIELDS.tables} and name not in config.model_fields:
            raise RecipeError(
                f"{tree.locate((name,))}: outside a recipe there are no tables, so the keys of the "
                f"{component} have no prefix. Remove {name} and the dot. Valid keys: "
                f"{', '.join(config.model_fields) or 'none'}."
            )
    checked = validate_table(
        config, tree.values, tree, (), known=config.model_fields, whole=f"the {component}"
    )
    return ComponentSpec(component, checked)


def configure_sampler(
    recipe: Recipe, kind: str | None = None, settings: Iterable[str] = ()
) -> ComponentSpec:
    """Configure the sampler of a recipe, or a sampler of another kind, with changed settings.

    Args:
        recipe: recipe whose sampler and sampler settings are the defaults.
        kind: kind of the sampler; None for the sampler of the recipe.
        settings: "key=value" texts, which replace settings of the sampler.
    """
    states = {"tokens"} if recipe.process else set()
    return _change_sampler(recipe.sampler, recipe.registry, states, kind, settings)


def configure_field_sampler(
    recipe: FieldsRecipe, name: str, kind: str | None = None, settings: Iterable[str] = ()
) -> ComponentSpec:
    """Configure the sampler of a field, or a sampler of another kind, with changed settings.

    Args:
        recipe: recipe whose sampler and sampler settings of the field are the defaults.
        name: name of the field. Raises ArgumentError for an unknown name.
        kind: kind of the sampler; None for the sampler of the field in the recipe.
        settings: "key=value" texts, which replace settings of the sampler.
    """
    if name not in recipe.fields:
        raise ArgumentError(
            f"name must be the name of a field of the recipe: {', '.join(recipe.fields)}; got "
            f"{name!r}.{suggest(name, recipe.fields)}"
        )
    field = recipe.fields[name]
    states = field.process.members.states
    return _change_sampler(field.sampler, recipe.registry, states, kind, settings)


def _change_sampler(
    sampler: ComponentSpec,
    registry: Registry,
    states: Set[str],
    kind: str | None,
    settings: Iterable[str],
) -> ComponentSpec:
    """Return a sampler with changed settings, or a sampler of another kind.

    Args:
        sampler: sampler of a recipe.
        registry: components of the recipe.
        states: states of the process of the sampler; empty without a process.
        kind: kind of the returned sampler; None for the kind of `sampler`.
        settings: "key=value" texts, which replace settings of the sampler.
    """
    settings = tuple(settings)
    if kind is None and not settings:
        return sampler
    # the settings in the recipe are those of its own sampler; another kind has its own defaults
    if kind in (None, sampler.component.name):
        defaults = sampler.config.model_dump(mode="json")
        return configure_component(sampler.component, settings, defaults)
    return configure_component(find_sampler(registry, kind, states), settings)


def _inherit_all(path: tuple[str, ...], base: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Return None for every table, so that each table inherits every key of its base table.

    The arguments are those of `Layout.find_inherited_keys`, and are not used.
    """
