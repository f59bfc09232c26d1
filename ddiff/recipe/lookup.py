"""Look up the components that a recipe names in the plugins that the recipe lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ddiff.errors import PluginError, RecipeError, shorten
from ddiff.plugin.loader import find_installed_plugins, load_plugins
from ddiff.plugin.registry import Component, Registry
from ddiff.recipe.messages import format_table, format_value
from ddiff.recipe.schema import SLOTS, TABLES, TablePath
from ddiff.recipe.tree import RecipeTree


def load_listed_plugins(plugins: Sequence[str], tree: RecipeTree) -> Registry:
    """Load the plugins that a recipe lists. Raises RecipeError if a plugin cannot be loaded."""
    try:
        return load_plugins(plugins)
    except PluginError as error:
        remedy = ""
        if not set(plugins) <= set(find_installed_plugins()):
            remedy = " Install the distribution of the plugin: pip install -e path/to/plugin."
        raise RecipeError(
            f"{tree.locate(('plugins',))}: plugins = {format_value(list(plugins))}: {error}{remedy}"
        ) from error


def find_components(tree: RecipeTree, registry: Registry) -> dict[TablePath, Component]:
    """Return the components of a recipe by path, in the order of the tables.

    An optional table that the recipe omits has no component. A slot is a key that names a further
    component inside a table, such as `[train] optimizer`. A slot has no component if the component
    of its table does not use the slot.
    """
    found: dict[TablePath, Component] = {}
    # a table is found before its slots, because SLOTS has this order
    for path in SLOTS:
        if _is_used(path, tree, found):
            found[path] = _find_component(path, tree, registry)
    return found


def _is_used(path: TablePath, tree: RecipeTree, found: Mapping[TablePath, Component]) -> bool:
    """Return whether the recipe `tree` uses the component at a path.

    A path is (table,) or (table, slot), where a slot is a key that names a further component.
    `found` contains the components that were found before. For a slot, it must contain the
    component of the table.
    """
    name, *slot = path
    if TABLES[name].is_optional and name not in tree.values:
        return False
    if not slot or TABLES[name].component is None:
        return True
    used = found[name,].members().slots
    return used is None or slot[0] in used


def _find_component(path: TablePath, tree: RecipeTree, registry: Registry) -> Component:
    """Return the component that the key `kind` of the table at a path names.

    Without the key `kind`, the default component of the table is returned.
    """
    slot = SLOTS[path]
    table = tree.read_table(path)
    name = table.get("kind", slot.default)
    label = format_table(path)
    if not isinstance(name, str):
        place = tree.locate((*path, "kind") if "kind" in table else path)
        came = f"; got {format_value(name)}" if "kind" in table else ""
        names = ", ".join(registry.names(slot.kind))
        raise RecipeError(
            f"{place}: {label} needs a kind, the name of the {slot.kind} in quotes{came}. "
            f"Available: {names or 'none in the listed plugins'}."
        )
    try:
        return registry.component(slot.kind, name)
    except PluginError as error:
        place = tree.locate((*path, "kind"))
        raise RecipeError(f'{place}: {label} kind = "{shorten(name)}": {error}') from error
