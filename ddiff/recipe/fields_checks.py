"""Checks of the tables [fields.NAME], and of keys that name a field."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress

from ddiff.errors import PluginError, RecipeError, shorten, suggest
from ddiff.plugin.registry import Registry
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.recipe.messages import explain_unknown_key, format_table, format_value
from ddiff.recipe.schema import FIELDS, GROUP
from ddiff.recipe.tree import KeyPath, RecipeTree

JOINT = "joint"
"""Name of the target that consists of all fields. No field may have this name."""

# names are parts of file names and of targets such as "image | text"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def check_field_tables(tree: RecipeTree) -> None:
    """Check that [fields] has a table for each field, with a valid name and known keys.

    Raises RecipeError for the first fault. `tree`: all tables of the recipe.
    """
    tables = tree.values[GROUP]
    place = tree.locate((GROUP,))
    if not isinstance(tables, dict):
        raise RecipeError(
            f"{place}: {GROUP} must be a table that contains a table [{GROUP}.NAME] for each "
            f"field; got {format_value(tables)}."
        )
    if not tables:
        raise RecipeError(
            f"{place}: [{GROUP}] has no field. Write a table [{GROUP}.NAME] for each field, such "
            f"as [{GROUP}.text]."
        )
    for name, table in tables.items():
        _check_field_table(name, table, tree)


def _check_field_table(name: str, table: object, tree: RecipeTree) -> None:
    path = (GROUP, name)
    place = tree.locate(path)
    keys = FIELDS.tables[GROUP].engine_keys()
    if name in keys:
        raise RecipeError(
            f'{place}: "{name}" is a key of a field, and cannot be the name of a field. Write the '
            f"name of a field before the key, as in {GROUP}.text.{name}."
        )
    if name == JOINT or not _NAME.fullmatch(name):
        raise RecipeError(
            f"{place}: the name of a field must be 1 to 64 letters, digits and _, must not begin "
            f'with a digit, and must not be "{JOINT}", which means all fields; got '
            f"{format_value(name)}. Rename the field."
        )
    if not isinstance(table, dict):
        raise RecipeError(
            f"{place}: {GROUP}.{name} must be a table with the keys of a field; got "
            f"{format_value(table)}. Valid keys: {', '.join(keys)}."
        )
    # checked before the components, because a missing component is often a misspelt key
    for key in table:
        if key not in keys:
            message = explain_unknown_key(format_table(path), key, "", keys)
            raise RecipeError(f"{tree.locate((*path, key))}: {message}")
    # a table without process that has nearly the name of a field is a misspelt field
    others = [other for other in _list_processes(tree) if other != name]
    suggestion = suggest(name, others)
    if suggestion and name not in _list_processes(tree):
        raise RecipeError(
            f"{place}: [{GROUP}.{name}] has no process."
            f"{suggestion} Fields with a process: {', '.join(others)}. "
            "A new field needs the key process."
        )


def _list_processes(tree: RecipeTree) -> list[str]:
    """Return the names of the fields that have a process."""
    found = []
    for name, table in tree.values[GROUP].items():
        if isinstance(table, dict) and "process" in table:
            found.append(name)
    return found


def check_field_references(recipe: FieldsRecipe, tree: RecipeTree) -> None:
    """Check the components of each field, the keys that name a field, and the weights.

    Raises RecipeError for the first fault. `tree`: all tables of the recipe.
    """
    for name in recipe.fields:
        _check_states(name, recipe, tree)
        _check_encode(name, recipe, tree)
    for name, guidance in recipe.sample.guidance.items():
        path = ("sample", "guidance", name)
        _check_name(name, recipe.fields, path, "[sample] guidance", tree)
        for other in guidance.without:
            subject = f"[sample.guidance.{name}] without"
            _check_name(other, recipe.fields, (*path, "without", other), subject, tree)
            if other == name:
                raise RecipeError(
                    f"{tree.locate((*path, 'without'))}: {subject} must name other fields than "
                    f'"{name}", which is the field that the guidance changes.'
                )
    if not any(tables.keys.weight for tables in recipe.fields.values()):
        raise RecipeError(
            f"{tree.locate((GROUP, next(iter(recipe.fields)), 'weight'))}: the weights of all "
            f"fields are 0, so no field would be trained. Set [{GROUP}.NAME] weight of one field "
            "to a number above 0."
        )


def _check_states(name: str, recipe: FieldsRecipe, tree: RecipeTree) -> None:
    """Check that the components of a field serve the states of its process: tokens or vectors."""
    tables = recipe.fields[name]
    states = tables.process.members.states
    for spec in (tables.head, tables.loss, tables.sampler):
        if spec.members.states & states:
            continue
        kind = spec.component.kind
        key = {"training_loss": "loss"}.get(kind, kind)
        served = _list_serving(kind, states, recipe.registry)
        raise RecipeError(
            f"{tree.locate((GROUP, name, key))}: {spec.table}: the {spec.component} is for "
            f"{' or '.join(sorted(spec.members.states))}, but the process "
            f'"{tables.process.component.name}" of this field is for '
            f"{' or '.join(sorted(states))}. Available: "
            f"{', '.join(served) or 'none in the listed plugins'}."
        )
    if "tokens" in states:
        unused = [("normalizer", "vectors", tables.normalizer.component.name != "none")]
    else:
        unused = [
            ("tokenizer", "texts", tables.tokenizer is not None),
            ("vocabulary", "tokens", tables.vocabulary.component.name != "flat"),
            ("length", "texts", tables.keys.length is not None),
        ]
    for key, owner, is_given in unused:
        if is_given:
            raise RecipeError(
                f"{tree.locate((GROUP, name, key))}: [{GROUP}.{name}] {key} is only for a field of "
                f'{owner}, but the process "{tables.process.component.name}" of this field is for '
                f"{' or '.join(sorted(states))}. Remove {key}, or choose another process."
            )


def _list_serving(kind: str, states: frozenset[str], registry: Registry) -> list[str]:
    """List the components of a kind that serve one of the states."""
    served = []
    for component in registry.components(kind):
        # a component that cannot be loaded has no states, and is not offered
        with suppress(PluginError):
            if component.members().states & states:
                served.append(component.name)
    return served


def _check_encode(name: str, recipe: FieldsRecipe, tree: RecipeTree) -> None:
    """Check that the key `encode` of a field names a field of texts, and that an encoder exists."""
    source = recipe.fields[name].keys.encode
    if source is None:
        return
    path = (GROUP, name, "encode")
    subject = f"[{GROUP}.{name}] encode"
    _check_name(source, recipe.fields, path, subject, tree)
    if recipe.fields[source].keys.encode is not None:
        what = "itself" if source == name else f'"{source}", which holds vectors of a text itself'
        raise RecipeError(f"{tree.locate(path)}: {subject} must name a field of texts; got {what}.")
    if recipe.encoder is None:
        raise RecipeError(
            f'{tree.locate(path)}: {subject} = "{source}" needs an encoder. Add a table [encoder].'
        )


def _check_name(
    name: str, fields: Iterable[str], path: KeyPath, subject: str, tree: RecipeTree
) -> None:
    """Raise RecipeError if a name is not the name of a field.

    Args:
        name: name to check.
        fields: names of all fields.
        path: path of the key that contains the name, to find its line.
        subject: name of the key in the message, such as "[sample] guidance".
        tree: all tables of the recipe.
    """
    if name not in fields:
        raise RecipeError(
            f'{tree.locate(path)}: {subject}: there is no field "{shorten(name)}".'
            f"{suggest(name, fields)} Fields: {', '.join(fields)}."
        )
