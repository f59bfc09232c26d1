"""Validate the tables of a recipe, after the sources of the recipe are merged.

ddiff itself defines some keys of a table. The other keys are defined by the component that the key
`kind` names. A slot is a key that names a further component inside a table, such as
`[train] optimizer`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from ddiff.errors import PluginError, RecipeError, shorten, suggest
from ddiff.plugin.config import ComponentConfig
from ddiff.plugin.registry import Component, NoKeys
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.fields_checks import check_field_references, check_field_tables
from ddiff.recipe.fields_recipe import FieldsRecipe, FieldTables
from ddiff.recipe.keys import TopLevelKeys
from ddiff.recipe.lookup import find_components, load_listed_plugins
from ddiff.recipe.messages import (
    explain_unknown_key,
    explain_validation,
    format_table,
    format_value,
    select_error,
)
from ddiff.recipe.model import Recipe
from ddiff.recipe.schema import (
    FIELDS,
    GROUP,
    TEXT,
    Layout,
    Slot,
    Table,
    TablePath,
    component_field,
    find_layout,
    keys_field,
)
from ddiff.recipe.toml import scalars_first
from ddiff.recipe.tree import KeyPath, RecipeTree

Keys = TypeVar("Keys", bound=ComponentConfig)


def read_tables(tree: RecipeTree) -> Recipe | FieldsRecipe:
    """Validate all tables of a recipe, and load the plugins and components that they name.

    Raises RecipeError for the first wrong name or value, and PluginError for a defect of a plugin.
    """
    layout = find_layout(tree.values)
    _check_tables(tree, layout)
    top = _read_top_level(tree)
    # plugins are loaded before tables are read, because they define components and their keys
    registry = load_listed_plugins(top.plugins, tree)
    components = find_components(tree, layout, registry)

    attributes: dict[str, Any] = dict(top)
    attributes["registry"] = registry
    attributes["source"] = tree.source
    fields: dict[str, FieldTables] = {}
    for path, table in layout.list_tables(tree.values).items():
        read = _read_table(path, table, tree, components)
        if table.is_group:
            fields[path[-1]] = FieldTables(**read)
        else:
            attributes |= read
    recipe: Recipe | FieldsRecipe
    # raises TypeError if the attributes of the class differ from those of the layout
    if layout is FIELDS:
        recipe = FieldsRecipe(fields=fields, **attributes)
        check_field_references(recipe, tree)
    else:
        recipe = Recipe(**attributes)
    _check_batch(recipe, tree)
    _check_ema(recipe, tree)
    return recipe


# ---------------------------------------------------------------------- top level


def _check_tables(tree: RecipeTree, layout: Layout) -> None:
    """Raise RecipeError for an unknown name, a value in place of a table, or a missing table."""
    names = layout.top_level()
    for name in tree.values:
        if name not in names:
            raise RecipeError(
                f'{tree.locate((name,))}: {layout.title} has no key or table "{shorten(name)}".'
                f"{_suggest_name(name, layout)}{_explain_layout(name, tree)} Valid names: "
                f"{', '.join(names)}."
            )
    if "extends" in tree.values:
        place = tree.locate(("extends",))
        raise RecipeError(
            f"{place}: extends is only valid in a recipe file and cannot be given by --set."
        )
    for name, table in layout.tables.items():
        if not table.is_group:
            _check_is_table((name,), table.component, tree)
    if layout is FIELDS:
        check_field_tables(tree)
    for path, slot in layout.list_slots(tree.values).items():
        _check_is_table(path, slot, tree)
    required = [name for name, table in layout.tables.items() if not table.has_default()]
    missing = [name for name in required if name not in tree.values]
    if missing:
        raise RecipeError(
            f"{tree.source}: there is no [{missing[0]}] table. {layout.title.capitalize()} needs "
            f'the tables {", ".join(required)}, or extends = "<recipe>" to inherit them from '
            "another recipe."
        )


def _suggest_name(name: str, layout: Layout) -> str:
    """Suggest a correction for an unknown key or table at the top level of a recipe.

    The suggestion is the table to which the key belongs, or a similar name.
    """
    # a field may have keys with the names of keys of other tables, which are the likelier ones
    for table, entry in sorted(layout.tables.items(), key=lambda item: item[1].is_group):
        if name in entry.engine_keys():
            return f' Did you mean "{table}.{"NAME." if entry.is_group else ""}{name}"?'
    return suggest(name, [*layout.top_level(), GROUP])


def _explain_layout(name: str, tree: RecipeTree) -> str:
    """Return a sentence that says why a table of a text recipe is refused.

    Returns "" for other names, and for a text recipe.
    """
    if GROUP not in tree.values or name not in TEXT.tables:
        return ""
    fields = tree.values[GROUP]
    # the line of the first field, because a table [fields] has no header of its own
    path = (GROUP, next(iter(fields))) if isinstance(fields, dict) and fields else (GROUP,)
    return f" The recipe has fields because of {tree.locate(path)}."


def _check_is_table(path: TablePath, slot: Slot | None, tree: RecipeTree) -> None:
    """Raise RecipeError if the value at a path is not a table.

    `slot`: description of the component at the path, or None.
    """
    value: Any = tree.values
    for key in path:
        value = value.get(key, {})
    if isinstance(value, dict):
        return
    alternative = f", or the name of the {slot.kind} in quotes" if slot else ""
    raise RecipeError(
        f"{tree.locate(path)}: {'.'.join(path)} must be a table{alternative}; got "
        f"{format_value(value)}."
    )


def _read_top_level(tree: RecipeTree) -> TopLevelKeys:
    """Validate the top-level keys and fill in the run directory."""
    values = {key: tree.values[key] for key in TopLevelKeys.model_fields if key in tree.values}
    top = validate_table(TopLevelKeys, values, tree, ())
    filled = {
        "run_dir": top.run_dir or f"runs/{top.name}",
        "plugins": tuple(dict.fromkeys(top.plugins)),  # without duplicates, in order
    }
    return top.model_copy(update=filled)


# ---------------------------------------------------------------------- keys of a table


def _read_table(
    path: TablePath,
    table: Table,
    tree: RecipeTree,
    components: Mapping[TablePath, Component],
) -> dict[str, Any]:
    """Validate a table, and return the recipe attributes that the table determines.

    Args:
        path: path of the table.
        table: description of the table.
        tree: all tables of the recipe.
        components: all components of the recipe by path.
    """
    read: dict[str, Any] = {}
    if table.component is not None:
        read[component_field(path)] = None
        if path in components:
            read[component_field(path)] = _read_component(path, table, tree, components)
    for slot in table.slots:
        slot_path = (*path, slot)
        read[component_field(slot_path)] = None
        if slot_path in components:
            # the table of a slot has neither slots nor keys of the engine
            spec = _read_component(slot_path, Table(), tree, components)
            read[component_field(slot_path)] = spec
    keys = _read_engine_keys(path, table, tree)
    if table.keys is not None:
        read[keys_field(path, table)] = keys
    return read


def _read_component(
    path: TablePath,
    table: Table,
    tree: RecipeTree,
    components: Mapping[TablePath, Component],
) -> ComponentSpec:
    """Validate the keys of a component's table.

    Args:
        path: path of the table.
        table: description of the table.
        tree: all tables of the recipe.
        components: all components of the recipe by path.
    """
    component = components[path]
    config = component.config_class()
    slots = [slot for slot in table.slots if (*path, slot) in components]
    engine_keys = list(table.keys.model_fields) if table.keys else []
    known = list(dict.fromkeys([*config.model_fields, *slots, *engine_keys]))
    _check_reserved_keys(component, config, slots)
    values = {}
    for key, value in tree.read_table(path).items():
        if key not in ("kind", *known):
            raise _unknown_key_error(path, key, known, tree, component)
        if key in config.model_fields:
            values[key] = value
    if table.keys is not None:
        # a key of Config with the name of a key of the engine gets the same value
        shared = _read_engine_keys(path, table, tree).model_dump(mode="json")
        values |= {key: value for key, value in shared.items() if key in config.model_fields}
    checked = validate_table(config, values, tree, path, component, known)
    spec = ComponentSpec(component, checked, format_table(path))
    _check_round_trip(spec)
    return spec


def _read_engine_keys(path: TablePath, table: Table, tree: RecipeTree) -> ComponentConfig:
    """Validate those keys of a table that ddiff defines, and not the component of the table."""
    model = table.keys or NoKeys
    known = table.engine_keys()
    values = {}
    for key, value in tree.read_table(path).items():
        # in a table with a component, all other keys are checked against the keys of the component
        if table.component is None and key not in known:
            raise _unknown_key_error(path, key, known, tree)
        if key in model.model_fields:
            values[key] = value
    return validate_table(model, values, tree, path, known=known)


def _unknown_key_error(
    path: TablePath,
    key: str,
    known: Sequence[str],
    tree: RecipeTree,
    component: Component | None = None,
) -> RecipeError:
    """Return the error for a key that a table does not have.

    Args:
        path: path of the table.
        key: the unknown key.
        known: valid keys of the table.
        tree: all tables of the recipe.
        component: owner of the table, for the message.
    """
    message = explain_unknown_key(format_table(path), key, _owner(component), known)
    remark = _explain_other_layout(path, key, find_layout(tree.values))
    return RecipeError(f"{tree.locate((*path, key))}: {message}{remark}")


def _explain_other_layout(path: TablePath, key: str, layout: Layout) -> str:
    """Return a sentence about a key that the table at a path has only in the other layout.

    Returns "" for other keys. `layout`: layout of the recipe.
    """
    other = TEXT if layout is FIELDS else FIELDS
    if len(path) > 1 or path[0] not in other.tables:
        return ""
    if key not in other.tables[path[0]].engine_keys():
        return ""
    if layout is TEXT:
        return f" Only a recipe with tables [{GROUP}.NAME] has this key."
    if key in FIELDS.tables[GROUP].engine_keys():
        return f" In a recipe with fields, this key belongs to the tables [{GROUP}.NAME]."
    return f" Only a recipe without tables [{GROUP}.NAME] has this key."


def validate_table(
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
        model: pydantic model that validates the values.
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
        first = select_error(error.errors(include_url=False), model)
        place = tree.locate((*path, *first["loc"]))
        owner = _owner(component)
        raise RecipeError(
            f"{place}: {explain_validation(first, model, path, owner, list(known), whole)}"
        ) from error


def _owner(component: Component | None) -> str:
    return f' for kind "{component.name}" (from {component.origin})' if component else ""


def _check_reserved_keys(
    component: Component, config: type[ComponentConfig], slots: Iterable[str]
) -> None:
    """Check that no key of `config` has the name `kind` or the name of a slot of its table."""
    for key in ("kind", *slots):
        if key in config.model_fields:
            raise PluginError(
                f'The Config of the {component} has the reserved key "{key}". In the table of '
                f'this component, a recipe uses "{key}" to choose a component. '
                "Rename the key of the Config."
            )


def _check_round_trip(spec: ComponentSpec) -> None:
    """Check that a component's table can be written with all defaults and read again unchanged.

    A run writes its recipe with all defaults to recipe.toml. A recipe that could not be read again
    must be refused before training.
    """
    # as `Recipe.to_toml` writes it and `validate_table` reads it again
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


# ---------------------------------------------------------------------- checks of several tables


def _check_batch(recipe: Recipe | FieldsRecipe, tree: RecipeTree) -> None:
    batch = recipe.train.batch
    accumulate = recipe.train.accumulate
    processes = recipe.backend_keys.processes
    if batch % (accumulate * processes):
        raise RecipeError(
            f"{tree.locate(('train', 'batch'))}: [train] batch must be a multiple of accumulate "
            "* [backend] processes, so that all processes have equally many rows; got "
            f"batch = {batch}, accumulate = {accumulate}, processes = {processes}."
        )


def _check_ema(recipe: Recipe | FieldsRecipe, tree: RecipeTree) -> None:
    if recipe.evaluate.weights == "ema" and not recipe.train.ema:
        raise RecipeError(
            f'{tree.locate(("evaluate", "weights"))}: [evaluate] weights = "ema" needs a moving '
            "average of the weights, but [train] ema is 0. Set [train] ema, such as 0.9999, or set "
            'weights to "auto".'
        )
