"""List the components of a plugin with their tables and keys, for `ddiff plugins NAME`."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import BaseModel

from ddiff.errors import PluginError
from ddiff.plugin.loader import CORE, load_plugins
from ddiff.plugin.registry import KINDS, Component
from ddiff.recipe.messages import describe_keys
from ddiff.recipe.schema import TABLES, TopLevelKeys


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
        for table, entry in TABLES.items():
            if entry.keys is not None:
                title = f"[{table}], keys of the engine:"
                listing.paragraphs.append(_list_keys(title, entry.keys))
    for component in registry.components():
        if component.plugin != name:
            continue
        try:
            listing.paragraphs.append(_list_component(component))
        except PluginError as error:
            listing.errors.append(error)
    return listing


def _list_component(component: Component) -> str:
    documentation = component.load().__doc__ or ""
    summary = " ".join(documentation.partition("\n\n")[0].split())
    place = KINDS[component.kind].partition(":")[0]
    return _list_keys(f'{place} kind = "{component.name}": {summary}', component.config_class())


def _list_keys(title: str, model: type[BaseModel]) -> str:
    keys = describe_keys(model)
    width = max((len(key.key) for key in keys), default=0)
    lines = [title]
    for key in keys:
        lines.append(f"    {key.key:{width}}  {key.type}. {key.description}".rstrip())
    return "\n".join(lines) + "\n"
