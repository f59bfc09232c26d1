"""A table in the words of a recipe: its keys, and what pydantic found wrong with it."""

from __future__ import annotations

import ast
import inspect
import json
import linecache
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from ddiff.errors import shorten, suggest
from ddiff.plugin.config import COUNTS, LARGEST

_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def described(model: type[BaseModel]) -> list[tuple[str, str, str]]:
    """(key, type and default, meaning) of every key of a table; the meaning is the docstring under the key."""
    schema, meanings = model.model_json_schema(), _meanings(model)
    rows = []
    for key, value in schema.get("properties", {}).items():
        ending = (
            ", required"
            if key in schema.get("required", ())
            else f"; default {json.dumps(value.get('default'))}"
        )
        rows.append(
            (
                key,
                _type_of(value) + ending.replace("; default null", ", optional"),
                meanings.get(key, ""),
            )
        )
    return rows


def first_error(errors: Sequence[Mapping[str, Any]], model: type[BaseModel]) -> Mapping[str, Any]:
    """The entry of `ValidationError.errors()` to tell: `loc` as the recipe writes it, a union's branches as one.

    An unknown key goes first, for it is often the misspelt one that is missing.
    """
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    if not _is_union(model, first["loc"]):
        return first
    branches = [_unbranched(error) for error in errors if error["loc"][0] == first["loc"][0]]
    fitting = [branch for branch in branches if not branch["type"].endswith("_type")]
    if fitting:  # one branch took the type and refused the value: that is what to say
        return fitting[0]
    types = [_due(branch["msg"]).removeprefix("must be ") for branch in branches]
    return {**branches[0], "msg": f"must be {' or '.join(dict.fromkeys(types))}"}


def explain(
    error: Mapping[str, Any],
    model: type[BaseModel],
    path: Sequence[str | int],
    owner: str,
    known: Sequence[str],
    whole: str = "the recipe",
) -> str:
    """One paragraph for a `first_error`.

    `path` is the table's place in the recipe, `owner` says whose table it is, `known` are the keys that it takes; `whole`
    is what has the keys where the path is empty.
    """
    inside = error["loc"]
    subject = f"{table_label(path, whole)}{_dotted(inside)}"
    if error["type"] in ("extra_forbidden", "missing"):
        table, key = table_label((*path, *inside[:-1]), whole), str(inside[-1])
        if error["type"] == "missing":
            return f'{table} needs the key "{key}"{owner}: {_meaning(model, inside)}.'
        takes = known if len(inside) == 1 else _nested_keys(model, inside[:-1])
        return unknown_key(table, key, owner, takes)
    if error["type"] == "value_error":
        return f"{subject}: {error['msg'].removeprefix('Value error, ').rstrip('.')}."
    came = error["input"]
    return (
        f"{subject} {_due(error['msg'])}; got {shown(came)}.{_nearest_choice(model, inside, came)}"
    )


def unknown_key(table: str, key: str, owner: str, takes: Sequence[str]) -> str:
    """The paragraph for a key that a table does not take."""
    return f'{table} has no key "{shorten(key)}"{owner}.{suggest(key, takes)} It takes: {", ".join(takes) or "no keys"}.'


def shown(value: Any) -> str:
    """A value as TOML would write it; a string is called one, because the quotes may be the mistake."""
    text = shorten(json.dumps(value, default=str, ensure_ascii=False))
    return f"{text} (a string)" if isinstance(value, str) else text


def table_label(path: Sequence[str | int], whole: str = "the recipe") -> str:
    """`[train.optimizer]`, or `whole` for what stands above all tables."""
    return f"[{'.'.join(map(str, path))}]" if path else whole


def _type_of(schema: Mapping[str, Any]) -> str:
    """`number > 0 or list of number > 0`, of a key's JSON schema."""
    if "anyOf" in schema:
        return " or ".join(
            _type_of(branch) for branch in schema["anyOf"] if branch.get("type") != "null"
        )
    if "enum" in schema:
        return " or ".join(json.dumps(choice) for choice in schema["enum"])
    kind = schema.get("type", "object")
    if kind == "array":
        items = schema.get("prefixItems", [schema["items"]] if "items" in schema else [])
        return "list of " + " and ".join(dict.fromkeys(_type_of(item) for item in items))
    names = {"object": "table", "boolean": "true or false"}
    # the limits that every count and number has would be noise in a list of keys
    stated = {
        bound: schema[bound]
        for bound in _BOUNDS
        if bound in schema and schema[bound] not in (COUNTS, LARGEST)
    }
    bounds = [f"{_BOUNDS[bound]} {value:g}" for bound, value in stated.items()]
    return f"{names.get(kind, kind)} {' and '.join(bounds)}".rstrip()


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """The docstring under each key in the source of a model and of those that it extends, where there is source."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, BaseModel):
            found |= _meanings_in(owner)
    return found


def _meanings_in(model: type[BaseModel]) -> Mapping[str, str]:
    """The docstrings under the keys of this class itself; none for pydantic's own classes."""
    if model.__module__.partition(".")[0] == "pydantic":
        return {}
    try:
        file = inspect.getsourcefile(model)
    except (TypeError, OSError):  # a class made at a prompt
        return {}
    return _meanings_of_file(file).get(model.__qualname__, {}) if file else {}


@cache
def _meanings_of_file(file: str) -> dict[str, dict[str, str]]:
    """Class name -> key -> docstring. One parse per file: inspect.getsource parses it again for every class."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return {}
    found: dict[str, dict[str, str]] = {}
    pending: list[tuple[str, ast.AST]] = [("", tree)]
    while pending:
        prefix, parent = pending.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = _documented(node.body)
                pending.append((f"{prefix}{node.name}.", node))
            elif isinstance(node, ast.FunctionDef):
                pending.append((f"{prefix}{node.name}.<locals>.", node))
    return found


def _documented(body: Sequence[ast.stmt]) -> dict[str, str]:
    """The string after each annotated name of a class body, in one line."""
    return {
        key.target.id: " ".join(str(text.value.value).split())
        for key, text in pairwise(body)
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _is_union(model: type[BaseModel], inside: Sequence[str | int]) -> bool:
    """pydantic puts the name of the branch behind the key of a union."""
    known = model.model_fields.get(str(inside[0])) if len(inside) > 1 else None
    if known is None or get_origin(known.annotation) not in (Union, UnionType):
        return False
    return len([branch for branch in get_args(known.annotation) if branch is not NoneType]) > 1


def _unbranched(error: Mapping[str, Any]) -> dict[str, Any]:
    return {**error, "loc": (error["loc"][0], *error["loc"][2:])}


def _due(message: str) -> str:
    """`Input should be a valid integer` -> `must be an integer`."""
    text = (
        message.replace("Input should be", "must be")
        .replace("Input should have", "must have")
        .replace("'", '"')
    )
    for valid, plain in {
        "a valid integer": "an integer", "a valid number": "a number", "a valid string": "a string in quotes",
        "a valid boolean": "true or false", "a finite number": "a finite number", "a valid array": "a list",
        "a valid tuple": "a list", "a valid list": "a list", "an object": "a table",
        "String must": "must", "Tuple must": "must", "List must": "must", "String should": "must",
        "List should": "must", "Tuple should": "must",
    }.items():  # fmt: skip
        text = text.replace(valid, plain)
    return text if text.startswith("must") else f"is not valid: {text[:1].lower()}{text[1:]}"


def _nearest_choice(model: type[BaseModel], inside: Sequence[str | int], came: Any) -> str:
    """The nearest of the words that a key may be, when it is a choice among words."""
    known = model.model_fields.get(str(inside[0])) if len(inside) == 1 else None
    choices = (
        [choice for choice in get_args(known.annotation) if isinstance(choice, str)]
        if known
        else []
    )
    return suggest(came, choices) if isinstance(came, str) else ""


def _meaning(model: type[BaseModel], inside: Sequence[str | int]) -> str:
    annotation = model.model_fields[str(inside[0])].annotation if len(inside) == 1 else None
    return (
        f"a value of type {inspect.formatannotation(annotation)}"
        if annotation
        else "it has no default"
    )


def _nested_keys(model: type[BaseModel], inside: Sequence[str | int]) -> list[str]:
    """The keys of the table inside a component's table where pydantic met an unknown one."""
    for key in inside:
        if isinstance(key, int) or key not in model.model_fields:
            continue
        annotation = model.model_fields[key].annotation
        models = [
            kind
            for kind in (annotation, *get_args(annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        model = models[0] if models else model
    return list(model.model_fields)


def _dotted(inside: Sequence[str | int]) -> str:
    """` sizes[0]`, ` clock.rates`: a key inside a table; nothing for the table itself."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in inside).replace(
        ".", " ", 1
    )
