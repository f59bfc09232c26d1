"""Look up the components that a recipe names in the plugins that the recipe lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ddiff.errors import PluginError, RecipeError, shorten
from ddiff.plugin.loader import find_installed_plugins, load_plugins
from ddiff.plugin.registry import Component, Registry
from ddiff.plugin.sampler_lookup import find_sampler
from ddiff.recipe.messages import format_table, format_value
from ddiff.recipe.schema import Layout, Slot, TablePath
from ddiff.recipe.tree import RecipeTree

TOKENS = frozenset({"tokens"})
"""States of a field whose process is not found yet, or has no states of its own."""


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


def find_components(
    tree: RecipeTree, layout: Layout, registry: Registry
) -> dict[TablePath, Component]:
    """Return the components of a recipe by path, in the order of the tables.

    An optional table or key that the recipe omits has no component. A slot is a key that names a
    further component inside a table, such as `[train] optimizer`. A slot has no component if the
    component of its table does not use the slot. The defaults of a field follow its process, which
    is for tokens or for vectors.
    """
    found: dict[TablePath, Component] = {}
    for path, table in layout.list_tables(tree.values).items():
        if table.is_optional and path[0] not in tree.values:
            continue
        used: tuple[str, ...] | None = None
        if table.component is not None:
            default = table.component.default
            found[path] = _find_component(path, table.component, default, tree, registry, found)
            used = found[path].members().slots
        states = TOKENS
        # the process of a field is found before its other components, as slots have this order
        for key, slot in table.slots.items():
            is_omitted = slot.is_optional and key not in tree.read_table(path)
            if is_omitted or (used is not None and key not in used):
                continue
            default = slot.select_default(states)
            component = _find_component((*path, key), slot, default, tree, registry, found)
            found[*path, key] = component
            if slot.kind == "process":
                states = component.members().states
    return found


def _find_component(
    path: TablePath,
    slot: Slot,
    default: str | None,
    tree: RecipeTree,
    registry: Registry,
    found: Mapping[TablePath, Component],
) -> Component:
    """Return the component that the key `kind` of the table at a path names.

    Without the key `kind`, the component with the name `default` is returned. `found` are the
    components before this one.
    """
    table = tree.read_table(path)
    name = table.get("kind", default)
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
        if slot.kind == "sampler":
            return _find_sampler(path, name, registry, found)
        return registry.component(slot.kind, name)
    except PluginError as error:
        place = tree.locate((*path, "kind"))
        raise RecipeError(f'{place}: {label} kind = "{shorten(name)}": {error}') from error


def _find_sampler(
    path: TablePath, name: str, registry: Registry, found: Mapping[TablePath, Component]
) -> Component:
    """Return the sampler `name` for the table at a path.

    `found` are the components before the sampler.
    """
    if path == ("sample", "sampler"):
        has_process = ("process",) in found
        return find_sampler(registry, name, TOKENS if has_process else frozenset())
    if name in registry.names("sampler"):
        # `fields_checks` compares every listed component of a field with its process
        return registry.component("sampler", name)
    return find_sampler(registry, name, found[*path[:-1], "process"].members().states)
