"""Look up samplers for a run with a process of tokens, with a process of vectors, or without one.

A sampler component declares in `states` for which processes it is. The messages of this module name
only samplers for the given run.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from ddiff.errors import PluginError, shorten, suggest
from ddiff.plugin.registry import Component, Members, Registry


def find_sampler(registry: Registry, name: str, states: Set[str]) -> Component:
    """Return the sampler `name` of the listed plugins.

    Args:
        registry: components of the listed plugins.
        name: name of the sampler.
        states: states of the process of the run, "tokens" or "vectors"; empty without a process.

    Raises PluginError for an unknown name, and for a sampler that is for other processes.
    """
    listed = registry.components("sampler")
    unlisted = registry.unlisted_components("sampler") if name not in _names(listed) else []
    for component in (*listed, *unlisted):
        if component.name == name:
            _check_states(component, registry, states)
            return registry.component("sampler", name)  # raises if the plugin is not listed
    known = _list_suitable(listed, states)
    others = _list_suitable(unlisted, states)
    more = ""
    for component in others:
        more += f'; "{component.name}" with plugin "{component.plugin}"'
    raise PluginError(
        f'There is no sampler "{shorten(name)}".{suggest(name, _names([*known, *others]))} '
        f"Available: {', '.join(_names(known)) or 'none in the listed plugins'}{more}."
    )


def _check_states(component: Component, registry: Registry, states: Set[str]) -> None:
    """Raise PluginError if a sampler is for other processes than that of the run.

    The arguments are a sampler and those of `find_sampler`.
    """
    served = _read_states(component)
    # A sampler without a declaration has the default, tokens. It may also be for models without a
    # process, and checks this itself.
    is_default = served == Members.states and not states
    if is_default or _is_suitable(component, states):
        return
    needed = "a model without a process, whose objective predicts the next token"
    if served:
        needed = f"a process of {' or '.join(sorted(served))}"
    has = f"a process of {' or '.join(sorted(states))}" if states else "no process"
    known = ", ".join(_names(_list_suitable(registry.components("sampler"), states)))
    raise PluginError(
        f"The {component} needs {needed}; this run has {has}. "
        f"Available: {known or 'none in the listed plugins'}."
    )


def _is_suitable(component: Component, states: Set[str]) -> bool:
    served = _read_states(component)
    return not served.isdisjoint(states) if states else not served


def _list_suitable(components: Iterable[Component], states: Set[str]) -> list[Component]:
    return [component for component in components if _is_suitable(component, states)]


def _read_states(component: Component) -> Set[str]:
    """Return the states of the processes that a sampler is for; empty: models without a process.

    A sampler that cannot be loaded counts as a sampler of tokens.
    """
    try:
        return component.members().states
    except PluginError:
        return Members.states


def _names(components: Iterable[Component]) -> list[str]:
    return [component.name for component in components]
