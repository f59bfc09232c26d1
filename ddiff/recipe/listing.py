"""List the components of a plugin with their tables and keys, for `ddiff plugins NAME`."""

from __future__ import annotations

import inspect
import textwrap
from typing import NamedTuple

from pydantic import BaseModel

from ddiff.errors import PluginError
from ddiff.plugin.loader import CORE, load_plugins
from ddiff.plugin.registry import KINDS, Component
from ddiff.recipe.keys import TopLevelKeys
from ddiff.recipe.messages import describe_keys
from ddiff.recipe.schema import FIELDS, TEXT, Layout

FORMULA_INDENT = 4 * " "


class PluginListing(NamedTuple):
    """Description of a plugin.

    Args:
        paragraphs: one paragraph of text for each component.
        errors: error messages about components that cannot be loaded.
    """

    paragraphs: list[str]
    errors: list[PluginError]


def list_plugin(name: str) -> PluginListing:
    """List the components of a plugin.

    The listing of the plugin `core` begins with the keys of ddiff itself, not of a component.
    """
    registry = load_plugins([name])
    listing = PluginListing([], [])
    if name == CORE:
        listing.paragraphs.append(_list_keys("top level:", TopLevelKeys))
        listing.paragraphs.extend(_list_engine_keys(TEXT, ""))
        listing.paragraphs.extend(_list_engine_keys(FIELDS, " of a recipe with fields"))
    for component in registry.components():
        if component.plugin != name:
            continue
        try:
            listing.paragraphs.append(_list_component(component))
        except PluginError as error:
            listing.errors.append(error)
    return listing


def _list_engine_keys(layout: Layout, remark: str) -> list[str]:
    """List the keys of ddiff itself in each table of a layout.

    `remark`: text after the name of a table, which tells the layouts apart.
    """
    paragraphs = []
    for name, table in layout.tables.items():
        # a table with the same keys in both layouts is listed once
        is_repeated = layout is FIELDS and name in TEXT.tables
        if table.keys is None or (is_repeated and TEXT.tables[name].keys is table.keys):
            continue
        label = f"[{name}.NAME]" if table.is_group else f"[{name}]"
        title = f"{label}{'' if table.is_group else remark}, keys of the engine:"
        paragraphs.append(_list_keys(title, table.keys))
    return paragraphs


def _list_component(component: Component) -> str:
    documentation = component.load().__doc__ or ""
    summary = " ".join(documentation.partition("\n\n")[0].split())
    place = KINDS[component.kind].partition(":")[0]
    members = component.members()
    # a layout is chosen by an option of the command line, and not by a table of a recipe
    name = f'kind = "{component.name}"' if place.startswith("[") else component.name
    text = _list_keys(f"{place} {name}: {summary}", members.Config)
    formulas = inspect.cleandoc(members.formulas)
    for title, block in zip(("formulas", "symbols"), formulas.split("\n\n")):
        if block:
            indented = textwrap.indent(block, FORMULA_INDENT)
            text += f'\n{title} of {component.kind} "{component.name}":\n{indented}\n'
    return text


def _list_keys(title: str, model: type[BaseModel]) -> str:
    keys = describe_keys(model)
    width = max((len(key.key) for key in keys), default=0)
    lines = [title]
    for key in keys:
        lines.append(f"    {key.key:{width}}  {key.type}. {key.description}".rstrip())
    return "\n".join(lines) + "\n"
