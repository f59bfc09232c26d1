"""Descriptions of the keys of a table, and messages about validation errors in a table."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from ddiff.errors import shorten, suggest
from ddiff.plugin.config import COUNTS, LARGEST

# ---------------------------------------------------------------------- keys of a table


class KeyDescription(NamedTuple):
    """Key of a table with its type, default and description."""

    key: str
    type: str
    description: str


def describe_keys(model: type[BaseModel]) -> list[KeyDescription]:
    """Describe every key of a table, given the pydantic model of the table.

    The description of a key is the docstring below its field.
    """
    schema = model.model_json_schema()
    required = schema.get("required", ())
    rows = []
    for key, value in schema.get("properties", {}).items():
        if key in required:
            ending = ", required"
        elif value.get("default") is None:
            ending = ", optional"
        else:
            ending = f"; default {json.dumps(value['default'])}"
        description = " ".join((model.model_fields[key].description or "").split())
        rows.append(KeyDescription(key, _format_type(value) + ending, description))
    return rows


_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_TYPE_NAMES = {"object": "table", "boolean": "true or false"}


def _format_type(schema: Mapping[str, Any]) -> str:
    """Format the JSON schema of a key as text, such as `number > 0 or list of number > 0`."""
    if "anyOf" in schema:
        branches = [branch for branch in schema["anyOf"] if branch.get("type") != "null"]
        return " or ".join(map(_format_type, branches))
    if "enum" in schema:
        return " or ".join(map(json.dumps, schema["enum"]))
    kind = schema.get("type", "object")
    if kind == "array":
        items = schema.get("prefixItems", [])
        if not items and "items" in schema:
            items = [schema["items"]]
        distinct = dict.fromkeys(map(_format_type, items))
        return "list of " + " and ".join(distinct)
    bounds = []
    for bound, sign in _BOUNDS.items():
        # the technical limits that all counts and floats share are not shown
        if bound in schema and schema[bound] not in (COUNTS, LARGEST):
            bounds.append(f"{sign} {schema[bound]:g}")
    return f"{_TYPE_NAMES.get(kind, kind)} {' and '.join(bounds)}".rstrip()


# ---------------------------------------------------------------------- validation errors


def select_error(errors: Sequence[Mapping[str, Any]], model: type[BaseModel]) -> Mapping[str, Any]:
    """Return the entry of `ValidationError.errors()` that is reported to the user.

    `model` is the pydantic model that was validated. The `loc` of the returned entry is the key as
    written in the recipe. If a key has a union type, pydantic reports one error for each branch of
    the union. These errors are merged to one error of type "union", with the expected types in
    `ctx`.
    """
    # An unknown key comes first: a missing key is often misspelt, and then unknown too.
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    if not _is_in_union(model, first["loc"]):
        return first
    branches = [_drop_branch(error) for error in errors if error["loc"][0] == first["loc"][0]]
    for branch in branches:
        # If a branch accepts the type but refuses the value, its error is the most specific one.
        if not branch["type"].endswith("_type"):
            return branch
    expected = dict.fromkeys(_expectation(branch).removeprefix("must be ") for branch in branches)
    return {**branches[0], "type": "union", "ctx": {"expected": " or ".join(expected)}}


def explain_validation(
    error: Mapping[str, Any],
    model: type[BaseModel],
    path: Sequence[str | int],
    owner: str,
    known: Sequence[str],
    whole: str = "the recipe",
) -> str:
    """Return a one-paragraph message about the validation error that `select_error` returned.

    Args:
        error: entry of `ValidationError.errors()`.
        model: model of the table.
        path: path of the table in the recipe.
        owner: component that owns the table, as ` for kind "..." (from ...)`, or empty.
        known: valid keys of the table.
        whole: name of the object that has the keys if the path is empty.
    """
    location = error["loc"]
    kind = error["type"]
    if kind in ("extra_forbidden", "missing"):
        table = format_table((*path, *location[:-1]), whole)
        key = str(location[-1])
        if kind == "missing":
            return f'{table} needs the key "{key}"{owner}: {_describe_type(model, location)}.'
        takes = known if len(location) == 1 else _nested_keys(model, location[:-1])
        return explain_unknown_key(table, key, owner, takes)
    subject = f"{format_table(path, whole)}{_format_location(location)}"
    if kind == "value_error":
        return f"{subject}: {str(error['ctx']['error']).rstrip('.')}."
    came = error["input"]
    suggestion = _suggest_choice(model, location, came)
    return f"{subject} {_expectation(error)}; got {format_value(came)}.{suggestion}"


def explain_unknown_key(table: str, key: str, owner: str, takes: Sequence[str]) -> str:
    """Return a one-paragraph message about a key that a table does not have.

    Args:
        table: name of the table, such as "[train.optimizer]".
        key: the unknown key.
        owner: component that owns the table, as ` for kind "..." (from ...)`, or empty.
        takes: valid keys of the table.
    """
    return (
        f'{table} has no key "{shorten(key)}"{owner}.{suggest(key, takes)} '
        f"Valid keys: {', '.join(takes) or 'none'}."
    )


def format_value(value: Any) -> str:
    """Format a value as in TOML. After a string, add "(a string)" to point out the quotes."""
    # `ensure_ascii` is False, so that text in all scripts stays readable
    text = shorten(json.dumps(value, default=str, ensure_ascii=False))
    return f"{text} (a string)" if isinstance(value, str) else text


def format_table(path: Sequence[str | int], whole: str = "the recipe") -> str:
    """Format the path of a table as `[train.optimizer]`; return `whole` for an empty path."""
    return f"[{'.'.join(map(str, path))}]" if path else whole


_EXPECTATIONS = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string in quotes",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dataclass_type": "a table",
    "union": "{expected}",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "greater than or equal to {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "less than or equal to {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}",
}
"""Type of a pydantic error -> description of the expected value, a template for its `ctx`."""


def _expectation(error: Mapping[str, Any]) -> str:
    """Format the requirement that a value violates, such as `must be greater than 0`.

    `error`: entry of `ValidationError.errors()`.
    """
    context = {key: _format_limit(value) for key, value in error.get("ctx", {}).items()}
    kind = error["type"]
    if kind in _EXPECTATIONS:
        return f"must be {_EXPECTATIONS[kind].format_map(context)}"
    if kind in ("too_short", "string_too_short"):
        return f"must have at least {_count(error, 'min_length')}"
    if kind in ("too_long", "string_too_long"):
        return f"must have at most {_count(error, 'max_length')}"
    if kind == "string_pattern_mismatch":
        return f"must match the pattern {context['pattern']}"
    # plugins may use other types; their message is the text of pydantic
    text = error["msg"].replace("Input should be", "must be").replace("'", '"')
    return text if text.startswith("must") else f"is not valid: {text[:1].lower()}{text[1:]}"


def _format_limit(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST:
        return str(int(value))
    # pydantic uses single quotes for choices; the messages use double quotes, as TOML
    return str(value).replace("'", '"')


def _count(error: Mapping[str, Any], limit: str) -> str:
    """Format a limit on the length of a value, such as `1 character` or `2 items`.

    `error`: entry of `ValidationError.errors()`. `limit`: "min_length" or "max_length".
    """
    number = error["ctx"][limit]
    unit = "character" if error["type"].startswith("string") else "item"
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _format_location(location: Sequence[str | int]) -> str:
    """Format the location of a key in a table, as ` sizes[0]` or ` clock.rates`."""
    text = ""
    for key in location:
        text += f"[{key}]" if isinstance(key, int) else f".{key}"
    return text.replace(".", " ", 1)  # the first key follows the table after a space


# ---------------------------------------------------------------------- fields of models


def _is_in_union(model: type[BaseModel], location: Sequence[str | int]) -> bool:
    """Return whether location[1] names a branch of a union type.

    `location` is the location of a validation error in the pydantic model `model`.
    """
    field = model.model_fields.get(str(location[0])) if len(location) > 1 else None
    if field is None or get_origin(field.annotation) not in (Union, UnionType):
        return False
    branches = [branch for branch in get_args(field.annotation) if branch is not NoneType]
    return len(branches) > 1


def _drop_branch(error: Mapping[str, Any]) -> dict[str, Any]:
    # ("xi", "float") -> ("xi",), because a recipe does not name branches
    return {**error, "loc": (error["loc"][0], *error["loc"][2:])}


def _suggest_choice(model: type[BaseModel], location: Sequence[str | int], came: Any) -> str:
    """Suggest the allowed string that is most similar to the refused string `came`.

    Returns "" if the key at `location` has no fixed choices, or if `came` is not a string.
    """
    field = model.model_fields.get(str(location[0])) if len(location) == 1 else None
    if field is None or not isinstance(came, str):
        return ""
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    return suggest(came, choices)


def _describe_type(model: type[BaseModel], location: Sequence[str | int]) -> str:
    annotation = model.model_fields[str(location[0])].annotation if len(location) == 1 else None
    if annotation is None:
        return "the key has no default"
    return f"a value of type {inspect.formatannotation(annotation)}"


def _nested_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """List the keys of the nested table at `location` in a component's table.

    `model` is the pydantic model of the component's table.
    """
    for key in location:
        if isinstance(key, int) or key not in model.model_fields:
            continue
        annotation = model.model_fields[key].annotation
        for kind in (annotation, *get_args(annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
                break
    return list(model.model_fields)
