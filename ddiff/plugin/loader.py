"""The gate: plugins are entry points of the group `ddiff`, the engine's own ones included.

A plugin is a module with one function:

    from ddiff import hookimpl

    @hookimpl
    def ddiff_register(registry):
        registry.add("process", "kimura", "ddiff_kimura.process:Kimura")

Only the plugins that are asked for are imported, and their components not before a recipe names them.
"""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pluggy

from ddiff.errors import PluginError, nearest, shortened
from ddiff.plugin.registry import Component, Origin, Registry, describe, reported

GROUP = "ddiff"
CORE = "core"
"""The plugin that holds the engine's own components; every recipe has it without listing it."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class Hooks:
    """Every hook that a plugin may implement."""

    @hookspec
    def ddiff_register(self, registry: Registry) -> None:
        """Call `registry.add(kind, name, "module:object")` for each component of the plugin."""


HOOKS = tuple(name for name in vars(Hooks) if name.startswith("ddiff_"))


@dataclass(frozen=True)
class Plugin:
    """An installed plugin, not imported yet."""

    name: str
    origin: Origin
    entry_point: importlib.metadata.EntryPoint = field(repr=False)

    def __str__(self) -> str:
        return f'"{self.name}" ({self.origin})'

    def registered(self) -> Registry:
        """Import the plugin and let it fill a registry of its own.

        Raises PluginError when it does not import, implements no hook or a hook that does not exist, or its hook fails.
        """
        registry = Registry(self.origin)
        module = self._load()
        with reported(self._fails_to_register):
            self._hooks(module).ddiff_register(registry=registry)
        return registry

    def _load(self) -> Any:
        with reported(self._does_not_load):
            return self.entry_point.load()

    def _does_not_load(self, error: BaseException) -> PluginError:
        return PluginError(
            f'The plugin {self} does not load: importing "{self.entry_point.value}" raised {describe(error)}. '
            "Mend, reinstall or uninstall that distribution, or leave the plugin out; the others are not affected."
        )

    def _fails_to_register(self, error: BaseException) -> PluginError:
        return PluginError(
            f"The plugin {self} fails to register: ddiff_register raised {describe(error)}."
        )

    def _hooks(self, module: Any) -> pluggy.HookRelay:
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(Hooks)
        try:
            manager.register(module, self.name)
        except pluggy.PluginValidationError as error:
            raise self._wrong_arguments(_last_line(error)) from error
        self._check_hook_names(manager, module)
        return manager.hook

    def _check_hook_names(self, manager: pluggy.PluginManager, module: Any) -> None:
        implemented = [caller.name for caller in manager.get_hookcallers(module) or ()]
        for name in implemented:
            if name not in HOOKS:
                raise PluginError(
                    f'The plugin {self} implements a hook "{name}", which does not exist.{nearest(name, HOOKS)} '
                    f"The hooks are: {', '.join(HOOKS)}."
                )
        if any(
            implementation.argnames != ("registry",)
            for implementation in manager.hook.ddiff_register.get_hookimpls()
        ):
            raise self._wrong_arguments("it does not take registry")
        if not implemented:
            raise PluginError(
                f'The plugin {self} implements no hook: "{self.entry_point.value}" must have a function '
                "ddiff_register(registry), marked with @ddiff.hookimpl."
            )

    def _wrong_arguments(self, what: str) -> PluginError:
        return PluginError(
            f"The plugin {self} has a hook with wrong arguments: {what}. The hook is: def ddiff_register(registry)."
        )


class PluginReport(NamedTuple):
    """What became of one installed plugin: its components, or why it offers none."""

    plugin: Plugin
    components: list[Component]
    error: PluginError | None


class Survey(NamedTuple):
    """Everything that is installed: one registry of all that loads, and a report of every plugin."""

    registry: Registry
    reports: list[PluginReport]


def installed_plugins() -> dict[str, list[Plugin]]:
    """The claims on every plugin name, by name; more than one is a conflict. Imports no plugin."""
    claims = defaultdict(list)
    for entry_point in importlib.metadata.entry_points(group=GROUP):
        claims[entry_point.name].append(Plugin(entry_point.name, _origin(entry_point), entry_point))
    return dict(sorted(claims.items()))


def load_plugins(names: Iterable[str]) -> Registry:
    """A registry of the components of `core` and the named plugins; no other plugin is imported.

    Raises PluginError for a name that is not installed or is claimed by two distributions, and for a plugin that fails.
    """
    wanted = list(dict.fromkeys([CORE, *names]))
    registry = Registry(unlisted=lambda: _unlisted(wanted))
    installed = installed_plugins()
    for name in wanted:
        registry.admit(_only_claim(name, installed).registered())
    return registry


def survey_plugins() -> Survey:
    """Load everything that is installed; one broken plugin does not hide the others."""
    registry = Registry()
    reports = []
    for claims in installed_plugins().values():
        for plugin in claims:
            reports.append(_report(plugin, claims, registry))
    return Survey(registry, reports)


def _report(plugin: Plugin, claims: list[Plugin], registry: Registry) -> PluginReport:
    try:
        _check_single(plugin.name, claims)
        registered = plugin.registered()
        registry.admit(registered)
    except PluginError as error:
        return PluginReport(plugin, [], error)
    return PluginReport(plugin, registered.components(), None)


def _unlisted(listed: list[str]) -> list[Component]:
    reports = survey_plugins().reports
    return [
        component
        for report in reports
        if report.plugin.name not in listed
        for component in report.components
    ]


def _only_claim(name: str, installed: Mapping[str, list[Plugin]]) -> Plugin:
    if name not in installed:
        raise PluginError(
            f'There is no plugin "{shortened(name)}".{nearest(name, installed)} '
            f"Installed: {', '.join(installed) or 'none'}. "
            f'A plugin is the name of an entry point in the group "{GROUP}"; `ddiff plugins` lists them.'
        )
    _check_single(name, installed[name])
    return installed[name][0]


def _check_single(name: str, claims: list[Plugin]) -> None:
    if len(claims) > 1:
        owners = " and ".join(str(plugin.origin) for plugin in claims)
        raise PluginError(
            f'{len(claims)} distributions claim the plugin name "{name}": {owners}. Uninstall all but one.'
        )


def _origin(entry_point: importlib.metadata.EntryPoint) -> Origin:
    package = entry_point.value.partition(":")[0].partition(".")[0].strip()
    distribution = entry_point.dist
    if distribution is None:
        return Origin(entry_point.name, package, "no distribution", "0")
    try:
        name, version = distribution.name, distribution.version
    except Exception:  # metadata that are missing or damaged
        name, version = None, None
    return Origin(
        entry_point.name, package, name or "a distribution without metadata", version or "0"
    )


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].rstrip(".")
