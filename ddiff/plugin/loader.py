"""Discovery and loading of plugins, which are entry points of the group `ddiff`.

A plugin is a module with one function:

    from ddiff import hookimpl

    @hookimpl
    def ddiff_register(registry):
        registry.add("process", "kimura", "ddiff_kimura.process:Kimura")

A recipe imports only the plugins that it lists, and only the components that it names.

The module may define `DDIFF_API = 1`, the version of the plugin interface for which the plugin was
written. A plugin for a version that this ddiff does not support is refused with one sentence.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pluggy

from ddiff.errors import PluginError, shorten, suggest
from ddiff.plugin.registry import Component, Origin, Registry, convert_errors, describe_error

GROUP = "ddiff"
CORE = "core"
"""Name of the plugin with the components of ddiff, which every recipe loads without listing it."""

API_VERSION = 1
"""Version of the interface between ddiff and plugins. It is raised if plugins must be changed."""

OLDEST_API = 1
"""Oldest version of the interface for which plugins still work."""

DECLARATION = "DDIFF_API"
"""Name of the constant of a plugin module with the version for which it was written."""

_DECLARED = re.compile(rf"^{DECLARATION}(?:\s*:\s*int)?\s*=\s*(\d+)\s*(?:#.*)?$", re.MULTILINE)

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class Hooks:
    """Hooks that a plugin may implement."""

    @hookspec
    def ddiff_register(self, registry: Registry) -> None:
        """Call `registry.add(kind, name, "module:object")` for each component of the plugin."""


HOOKS = tuple(name for name in vars(Hooks) if name.startswith("ddiff_"))


@dataclass(frozen=True)
class Plugin:
    """Installed plugin. The method `register_components` imports its module."""

    name: str
    origin: Origin
    entry_point: importlib.metadata.EntryPoint = field(repr=False)

    def __str__(self) -> str:
        return f'"{self.name}" ({self.origin})'

    def register_components(self) -> Registry:
        """Import the plugin and register its components in a new registry.

        A plugin registers its components in the function (hook) `ddiff_register`. Raises
        PluginError if the import or the hook fails, if the hook is missing, if the plugin
        implements an unknown hook, or if it was written for a version of the interface that this
        ddiff does not support.
        """
        registry = Registry(self.origin)
        with convert_errors(self._import_error):
            module = self.entry_point.load()
        if isinstance(module, ModuleType):
            self._check_version(vars(module).get(DECLARATION))
        hooks = self._find_hooks(module)
        with convert_errors(self._register_error):
            hooks.ddiff_register(registry=registry)
        return registry

    def _check_version(self, declared: Any) -> None:
        """Raise PluginError for an unsupported version of the interface, or for an invalid one.

        `declared` is the value of DDIFF_API, or None if the plugin does not define it.
        """
        if declared is None:
            return
        if not isinstance(declared, int) or isinstance(declared, bool):
            raise PluginError(
                f"The plugin {self} has an invalid {DECLARATION}: it must be a whole number, the "
                f"version of the plugin interface (ddiff.API_VERSION, now {API_VERSION}); got "
                f"{declared!r}. Correct the line in {self.entry_point.value}."
            )
        written_for = (
            f"The plugin {self} was written for version {declared} of the plugin interface"
        )
        if declared > API_VERSION:
            raise PluginError(
                f"{written_for}, but this ddiff has version {API_VERSION}: upgrade ddiff, or "
                f"install an older version of {self.origin.distribution}."
            )
        if declared < OLDEST_API:
            raise PluginError(
                f"{written_for}, but this ddiff needs version {OLDEST_API} or newer: upgrade "
                f"{self.origin.distribution}, or install an older version of ddiff."
            )

    def _declared_in_source(self) -> int | None:
        """Read DDIFF_API from the source of the plugin's module, without running the module.

        Returns None if the module does not define it, or if its source cannot be found.
        """
        name = self.entry_point.value.partition(":")[0].strip()
        # `find_spec` imports the parent of a submodule, which must not happen here
        if "." in name:
            return None
        with suppress(OSError, ValueError, ImportError):
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.origin is not None:
                found = _DECLARED.search(Path(spec.origin).read_text(encoding="utf-8"))
                return int(found[1]) if found else None
        return None

    def _import_error(self, error: BaseException) -> PluginError:
        # A plugin for a newer ddiff often fails at an import of a name that does not exist yet. The
        # version explains the error better than the missing name.
        try:
            self._check_version(self._declared_in_source())
        except PluginError as unsupported:
            return unsupported
        return PluginError(
            f'The plugin {self} cannot be loaded: importing "{self.entry_point.value}" raised '
            f"{describe_error(error)}. Fix, reinstall or uninstall the distribution, or remove the "
            "plugin from the recipe."
        )

    def _register_error(self, error: BaseException) -> PluginError:
        return PluginError(
            f"The plugin {self} cannot register its components: ddiff_register raised "
            f"{describe_error(error)}. Fix or uninstall the distribution."
        )

    def _arguments_error(self, reason: str) -> PluginError:
        return PluginError(
            f"The plugin {self} has a hook with wrong arguments: {reason}. Define the hook as "
            "def ddiff_register(registry)."
        )

    def _find_hooks(self, module: Any) -> pluggy.HookRelay:
        """Collect the hooks of the module. Raises PluginError for an invalid or missing hook."""
        # one manager per plugin, so that only the hook of this plugin is called
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(Hooks)
        try:
            manager.register(module, self.name)
        except pluggy.PluginValidationError as error:
            reason = str(error).strip().splitlines()[-1].rstrip(".")
            raise self._arguments_error(reason) from error
        implemented = [caller.name for caller in manager.get_hookcallers(module) or ()]
        for name in implemented:
            if name not in HOOKS:
                raise PluginError(
                    f'The plugin {self} implements a hook "{name}", which does not exist.'
                    f"{suggest(name, HOOKS)} Valid hooks: {', '.join(HOOKS)}."
                )
        # pluggy accepts a hook that takes fewer arguments than its specification
        for implementation in manager.hook.ddiff_register.get_hookimpls():
            if implementation.argnames != ("registry",):
                raise self._arguments_error("the parameter registry is missing")
        if not implemented:
            raise PluginError(
                f'The plugin {self} implements no hook: "{self.entry_point.value}" must have a '
                "function ddiff_register(registry), marked with @ddiff.hookimpl."
            )
        return manager.hook


class PluginReport(NamedTuple):
    """Result of loading one installed plugin.

    Args:
        plugin: the plugin.
        components: its components; empty if the plugin cannot be loaded.
        error: error of loading the plugin, or None.
    """

    plugin: Plugin
    components: list[Component]
    error: PluginError | None


class Survey(NamedTuple):
    """Registry of the components of all working plugins, and a report about every plugin."""

    registry: Registry
    reports: list[PluginReport]


def find_installed_plugins() -> dict[str, list[Plugin]]:
    """Return the installed plugins by name, without importing them.

    Each list contains one plugin, unless several distributions provide plugins with the same name.
    """
    claims = defaultdict(list)
    for entry_point in importlib.metadata.entry_points(group=GROUP):
        plugin = Plugin(entry_point.name, _find_origin(entry_point), entry_point)
        claims[plugin.name].append(plugin)
    return dict(sorted(claims.items()))


def load_plugins(names: Iterable[str]) -> Registry:
    """Load `core` and the named plugins into one registry.

    Raises PluginError for a plugin that is not installed, is provided by two distributions, or
    cannot be loaded.
    """
    # core is first, so that in a conflict with core the other plugin is reported
    wanted = list(dict.fromkeys([CORE, *names]))
    registry = Registry(unlisted=lambda: _find_unlisted_components(wanted))
    installed = find_installed_plugins()
    for name in wanted:
        registry.merge(_select_plugin(name, installed).register_components())
    return registry


def survey_plugins() -> Survey:
    """Load every installed plugin. The report of a plugin that cannot be loaded has an error."""
    registry = Registry()
    reports = []
    for claims in find_installed_plugins().values():
        # several plugins with the same name have one report each
        for plugin in claims:
            reports.append(_load_into(registry, plugin, claims))
    return Survey(registry, reports)


def _load_into(registry: Registry, plugin: Plugin, claims: list[Plugin]) -> PluginReport:
    """Load a plugin and add its components to a registry. An error is returned in the report.

    `claims`: all installed plugins that have the name of this plugin; more than one is an error.
    """
    try:
        _check_single(plugin.name, claims)
        registered = plugin.register_components()
        registry.merge(registered)
    except PluginError as error:
        return PluginReport(plugin, [], error)
    return PluginReport(plugin, registered.components(), None)


def _find_unlisted_components(listed: list[str]) -> list[Component]:
    """Return the components of all installed plugins except the plugins named in `listed`."""
    found: list[Component] = []
    for report in survey_plugins().reports:
        if report.plugin.name not in listed:
            found += report.components
    return found


def _select_plugin(name: str, installed: Mapping[str, list[Plugin]]) -> Plugin:
    """Return the installed plugin `name`. Raises PluginError unless exactly one is installed."""
    if name not in installed:
        raise PluginError(
            f'There is no plugin "{shorten(name)}".{suggest(name, installed)} '
            f"Installed plugins: {', '.join(installed) or 'none'}. Install the distribution of the "
            f'plugin, which must have an entry point in the group "{GROUP}".'
        )
    _check_single(name, installed[name])
    return installed[name][0]


def _check_single(name: str, claims: list[Plugin]) -> None:
    """Raise PluginError if several installed packages provide a plugin with the name `name`.

    `claims`: the installed plugins with this name.
    """
    if len(claims) > 1:
        owners = " and ".join(str(plugin.origin) for plugin in claims)
        raise PluginError(
            f'{len(claims)} distributions claim the plugin name "{name}": {owners}. Uninstall all '
            "distributions but one."
        )


def _find_origin(entry_point: importlib.metadata.EntryPoint) -> Origin:
    """Return the package, distribution and version of a plugin's entry point."""
    # "package.module:object" -> "package"
    package = entry_point.value.partition(":")[0].partition(".")[0].strip()
    distribution = entry_point.dist
    if distribution is None:
        return Origin(entry_point.name, package, "no distribution", "0")
    try:
        name, version = distribution.name, distribution.version
    except Exception:  # missing or damaged metadata raises errors of many types
        name, version = None, None
    return Origin(
        entry_point.name, package, name or "a distribution without metadata", version or "0"
    )
