"""Resolve recipes: TOML text -> checked settings and components.

    recipe = read_recipe("recipes/mine.toml", settings=["train.steps=200"])
    recipe.process.build(vocabulary=vocabulary)

A recipe is resolved in four steps, which raise RecipeError with the file and the line:

1. `sources.read_tree`, `sources.merge_bases`: read the file and the recipes that it extends.
2. `resolve`: apply `--set` texts, check the names of tables, load the listed plugins.
3. `_TableReader`: for each table of `schema.TABLES`, find its component, split its keys into those
   of the engine and those of the component's `Config`, and validate both.
4. `_check_batch`, `_check_ema`: check values that depend on several tables.

Some keys of a table are defined by the engine. The other keys are defined by the component that the
key `kind` names. A slot is a key that names a further component inside a table, such as
`[train] optimizer`. A string in place of a component's table is a shorthand for a table with only a
kind: `optimizer = "muon"` means `optimizer = {kind = "muon"}`.

Reading a recipe imports its components, because their `Config` classes define their keys. Importing
this module imports no component.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import ValidationError

from ddiff.errors import ArgumentError, PluginError, RecipeError, shorten, suggest
from ddiff.plugin.config import ComponentConfig
from ddiff.plugin.loader import installed_plugins, load_plugins
from ddiff.plugin.registry import Component, Registry
from ddiff.recipe.messages import (
    explain_unknown_key,
    explain_validation,
    first_error,
    format_table,
    format_value,
)
from ddiff.recipe.model import ComponentSpec, Recipe
from ddiff.recipe.schema import (
    SLOTS,
    TABLES,
    TOP_LEVEL,
    TablePath,
    TopLevelKeys,
    component_field,
    keys_field,
)
from ddiff.recipe.sources import expand_shorthand, inherited_keys, merge_bases, read_tree
from ddiff.recipe.toml import (
    KeyPath,
    RecipeTree,
    read_settings,
    read_toml,
    scalars_first,
)

Keys = TypeVar("Keys", bound=ComponentConfig)


def read_recipe(name: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Read and resolve a recipe.

    Args:
        name: path, name of a shipped recipe, or fsspec address.
        settings: "key=value" texts, as for `--set`, which replace values of the recipe.

    Raises RecipeError for an error in the recipe, and PluginError for an error in a plugin.
    """
    tree = read_tree(str(name))
    if "extends" in tree.values:
        # an inherited name would make this run overwrite the run of the base recipe
        tree.values.setdefault("name", PurePosixPath(tree.source).stem)
    return resolve(merge_bases(tree), settings)


def parse_recipe(text: str, source: str = "<text>", settings: Iterable[str] = ()) -> Recipe:
    """Resolve a recipe given as TOML text.

    `source` is the file name in messages. Paths in `extends` may be relative to its folder.
    """
    return resolve(merge_bases(expand_shorthand(read_toml(text, source))), settings)


def resolve(tree: RecipeTree, settings: Iterable[str] = ()) -> Recipe:
    """Check a merged tree of tables and load the components that it names."""
    # a string would be iterated by characters, and a mapping by keys without values
    if isinstance(settings, str | Mapping):
        raise ArgumentError(
            'settings must be a list of "key=value" texts, such as ["train.steps=200"]; got '
            f"{settings!r}. Put each setting into a list as one text."
        )
    overrides = expand_shorthand(read_settings(settings, tree.source))
    tree = overrides.merge_over(tree, inherited_keys)
    _check_tables(tree)
    top = _read_top_level(tree)
    # plugins are loaded before tables are read, because they define components and their keys
    registry = _load_plugins(top, tree)
    reader = _TableReader(tree, registry)

    fields: dict[str, Any] = dict(top)
    for path in SLOTS:
        fields[component_field(path)] = reader.read_slot(path)
    for name, table in TABLES.items():
        if table.keys is not None:
            fields[keys_field(name)] = reader.read_engine_keys(name, table.keys)
    # raises TypeError if the fields of Recipe differ from those of the schema
    recipe = Recipe(registry=registry, source=tree.source, **fields)
    _check_batch(recipe, tree)
    _check_ema(recipe, tree)
    return recipe


def configure_component(
    component: Component,
    settings: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> ComponentSpec:
    """Configure a component without a recipe, from "key=value" texts over `defaults`.

    Used for the settings of `ddiff check NAME --set` and `ddiff sample --set`.
    """
    base = RecipeTree(dict(defaults or {}), "--set")
    tree = read_settings(settings, "--set").merge_over(base, _inherit_all)
    config = component.config_class()
    for name in tree.values:
        if name in TABLES and name not in config.model_fields:
            raise RecipeError(
                f"{tree.locate((name,))}: outside a recipe there are no tables, so the keys of the "
                f"{component} have no prefix. Remove {name} and the dot. Valid keys: "
                f"{', '.join(config.model_fields) or 'none'}."
            )
    checked = _validate(
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
    settings = tuple(settings)
    if kind is None and not settings:
        return recipe.sampler
    # the settings in the recipe are those of its own sampler; another kind has its own defaults
    if kind in (None, recipe.sampler.component.name):
        defaults = recipe.sampler.config.model_dump(mode="json")
        return configure_component(recipe.sampler.component, settings, defaults)
    return configure_component(recipe.registry.component("sampler", kind), settings)


def _inherit_all(path: tuple[str, ...], base: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Return None, so that a table inherits every key of its base table."""


# ---------------------------------------------------------------------- tables


class _TableReader:
    """Reader of the components and the keys of the engine in one tree."""

    def __init__(self, tree: RecipeTree, registry: Registry) -> None:
        self.tree = tree
        self.registry = registry

    def read_slot(self, path: TablePath) -> ComponentSpec | None:
        """Read the component at a path.

        Returns None if the recipe omits an optional table, or if the path is a slot that the
        component of the table does not use.
        """
        table, *rest = path
        if TABLES[table].is_optional and table not in self.tree.values:
            return None
        if rest and rest[0] not in self._used_slots((table,)):
            return None
        return self._read_component(path)

    def read_engine_keys(self, name: str, model: type[Keys]) -> Keys:
        """Validate those keys of a table that the engine defines."""
        table = TABLES[name]
        values = {}
        for key, value in self._values((name,)).items():
            # in a table without a component, all keys are checked against the keys of the engine
            is_own = key in model.model_fields or table.component is None
            if is_own and key not in table.slots:
                values[key] = value
        return _validate(model, values, self.tree, (name,), known=table.engine_keys())

    def _read_component(self, path: TablePath) -> ComponentSpec:
        component = self._find_component(path)
        config = component.config_class()
        slots = self._used_slots(path)
        engine_model = TABLES[path[0]].keys if len(path) == 1 else None
        engine_keys = list(engine_model.model_fields) if engine_model else []
        known = list(dict.fromkeys([*config.model_fields, *slots, *engine_keys]))
        _check_reserved_keys(component, config, slots)
        values = {}
        for key, value in self._values(path).items():
            if key not in ("kind", *known):
                message = explain_unknown_key(format_table(path), key, _owner(component), known)
                raise RecipeError(f"{self.tree.locate((*path, key))}: {message}")
            if key in config.model_fields:
                values[key] = value
        if engine_model is not None:
            # a key of Config with the name of a key of the engine gets the same value
            shared = self.read_engine_keys(path[0], engine_model).model_dump(mode="json")
            values |= {key: value for key, value in shared.items() if key in config.model_fields}
        checked = _validate(config, values, self.tree, path, component, known)
        spec = ComponentSpec(component, checked, format_table(path))
        _check_round_trip(spec)
        return spec

    def _find_component(self, path: TablePath) -> Component:
        slot = SLOTS[path]
        table = self._values(path)
        name = table.get("kind", slot.default)
        label = format_table(path)
        if not isinstance(name, str):
            place = self.tree.locate((*path, "kind") if "kind" in table else path)
            came = f"; got {format_value(name)}" if "kind" in table else ""
            names = ", ".join(self.registry.names(slot.kind))
            raise RecipeError(
                f"{place}: {label} needs a kind, the name of the {slot.kind} in quotes{came}. "
                f"Available: {names or 'none in the listed plugins'}."
            )
        try:
            return self.registry.component(slot.kind, name)
        except PluginError as error:
            place = self.tree.locate((*path, "kind"))
            raise RecipeError(f'{place}: {label} kind = "{shorten(name)}": {error}') from error

    def _used_slots(self, path: TablePath) -> list[str]:
        """List those slots of a table that the component of the table uses."""
        if len(path) > 1:
            return []
        offered = TABLES[path[0]].slots
        if not offered or TABLES[path[0]].component is None:
            return list(offered)
        used = self._find_component(path).members().slots
        return [slot for slot in offered if used is None or slot in used]

    def _values(self, path: TablePath) -> dict[str, Any]:
        values = self.tree.values
        for key in path:
            values = values.get(key, {})
        return values


def _read_top_level(tree: RecipeTree) -> TopLevelKeys:
    """Validate the top-level keys and fill in the run directory."""
    values = {key: tree.values[key] for key in TopLevelKeys.model_fields if key in tree.values}
    top = _validate(TopLevelKeys, values, tree, ())
    filled = {
        "run_dir": top.run_dir or f"runs/{top.name}",
        "plugins": tuple(dict.fromkeys(top.plugins)),  # without duplicates, in order
    }
    return top.model_copy(update=filled)


def _load_plugins(top: TopLevelKeys, tree: RecipeTree) -> Registry:
    try:
        return load_plugins(top.plugins)
    except PluginError as error:
        remedy = ""
        if not set(top.plugins) <= set(installed_plugins()):
            remedy = " Install the distribution of the plugin: pip install -e path/to/plugin."
        raise RecipeError(
            f"{tree.locate(('plugins',))}: plugins = {format_value(list(top.plugins))}: "
            f"{error}{remedy}"
        ) from error


def _validate(
    model: type[Keys],
    values: Mapping[str, Any],
    tree: RecipeTree,
    path: KeyPath,
    component: Component | None = None,
    known: Iterable[str] = (),
    whole: str = "the recipe",
) -> Keys:
    """Validate the values of a table. Raises RecipeError for the first wrong value.

    Args:
        model: model of the table.
        values: values of the table.
        tree: tree that contains the table, for file and line in messages.
        path: path of the table in the recipe.
        component: owner of the table, for messages.
        known: valid keys of the table.
        whole: name of the object that has the keys if the path is empty.
    """
    # Strict validation of JSON accepts an array as a tuple and 1 as 1.0, but not "3" as a number.
    # Strict validation of Python values would refuse a list for a tuple.
    text = json.dumps(values, default=str)
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = first_error(error.errors(include_url=False), model)
        message = explain_validation(first, model, path, _owner(component), list(known), whole)
        raise RecipeError(f"{tree.locate((*path, *first['loc']))}: {message}") from error


def _owner(component: Component | None) -> str:
    return f' for kind "{component.name}" (from {component.origin})' if component else ""


# ---------------------------------------------------------------------- checks


def _check_tables(tree: RecipeTree) -> None:
    """Raise RecipeError for an unknown name, a value in place of a table, or a missing table."""
    for name in tree.values:
        if name not in TOP_LEVEL:
            raise RecipeError(_explain_unknown_name(name, tree))
    if "extends" in tree.values:
        place = tree.locate(("extends",))
        raise RecipeError(
            f"{place}: extends is only valid in a recipe file and cannot be given by --set."
        )
    paths: list[TablePath] = [(name,) for name in TABLES]
    for path in [*paths, *SLOTS]:
        _check_is_table(tree, path)
    required = [name for name, table in TABLES.items() if not table.has_default()]
    missing = [name for name in required if name not in tree.values]
    if missing:
        raise RecipeError(
            f"{tree.source}: there is no [{missing[0]}] table. A recipe needs the tables "
            f'{", ".join(required)}, or extends = "<recipe>" to inherit them from another recipe.'
        )


def _explain_unknown_name(name: str, tree: RecipeTree) -> str:
    suggestion = suggest(name, TOP_LEVEL)
    for table, entry in TABLES.items():
        if name in entry.engine_keys():
            suggestion = f' Did you mean "{table}.{name}"?'
            break
    return (
        f'{tree.locate((name,))}: a recipe has no key or table "{shorten(name)}".{suggestion} '
        f"Valid names: {', '.join(TOP_LEVEL)}."
    )


def _check_is_table(tree: RecipeTree, path: TablePath) -> None:
    value: Any = tree.values
    for key in path:
        value = value.get(key, {})
    if isinstance(value, dict):
        return
    kind = SLOTS[path].kind if path in SLOTS else None
    alternative = f", or the name of the {kind} in quotes" if kind else ""
    raise RecipeError(
        f"{tree.locate(path)}: {'.'.join(path)} must be a table{alternative}; got "
        f"{format_value(value)}."
    )


def _check_reserved_keys(
    component: Component, config: type[ComponentConfig], slots: Iterable[str]
) -> None:
    """Check that a Config has no key named `kind` or like a slot of its table."""
    for key in ("kind", *slots):
        if key in config.model_fields:
            raise PluginError(
                f'The Config of the {component} has the reserved key "{key}", which names a '
                "component in that table of a recipe. Rename the key of the Config."
            )


def _check_round_trip(spec: ComponentSpec) -> None:
    """Check that the written table of a component, with all defaults, is read back as equal.

    A run writes its recipe with all defaults to recipe.toml. A recipe that could not be read back
    must be refused before training.
    """
    # as `Recipe.to_toml` writes it and `_validate` reads it again
    written = json.dumps(scalars_first(spec.config.model_dump(mode="json")))
    try:
        again = type(spec.config).model_validate_json(written, strict=True)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise _round_trip_error(spec, f"is refused: {reason}") from error
    if again != spec.config:
        raise _round_trip_error(spec, "is read back with other values")


def _round_trip_error(spec: ComponentSpec, what: str) -> PluginError:
    return PluginError(
        f"The Config of the {spec.component} {what} once every default is written out, as in the "
        "recipe.toml of a run. In the plugin, give keys that exclude each other the default None, "
        "and write validators that do not change values."
    )


def _check_batch(recipe: Recipe, tree: RecipeTree) -> None:
    batch = recipe.train.batch
    accumulate = recipe.train.accumulate
    processes = recipe.backend_keys.processes
    if batch % (accumulate * processes):
        raise RecipeError(
            f"{tree.locate(('train', 'batch'))}: [train] batch must be a multiple of accumulate "
            "* [backend] processes, so that all processes have equally many rows; got "
            f"batch = {batch}, accumulate = {accumulate}, processes = {processes}."
        )


def _check_ema(recipe: Recipe, tree: RecipeTree) -> None:
    if recipe.evaluate.weights == "ema" and not recipe.train.ema:
        raise RecipeError(
            f'{tree.locate(("evaluate", "weights"))}: [evaluate] weights = "ema" needs a moving '
            "average of the weights, but [train] ema is 0. Set [train] ema, such as 0.9999, or set "
            'weights to "auto".'
        )
