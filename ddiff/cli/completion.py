"""Completion of names and paths on the command line, for bash, zsh and fish.

Each function returns the values that may replace an incomplete word. If it returns none, the shell
completes paths of files. No function imports torch, and none raises an error, because an error
would be printed into the command line of the user.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

CHECKED_KINDS = (
    "process",
    "head",
    "backbone",
    "sampler",
    "time_rule",
    "tokenizer",
    "vocabulary",
    "dataset",
    "fields_dataset",
    "normalizer",
    "encoder",
    "path_rule",
    "judge",
)
"""Kinds of components that `ddiff check` checks. `ddiff.testing`, which has them, imports torch."""

NEW_KINDS = (
    "process",
    "sampler",
    "backbone",
    "tokenizer",
    "vocabulary",
    "dataset",
    "metric",
    "field",
)
"""Kinds of plugins that `ddiff new plugin` writes, by the names that its help shows."""


def complete_recipe(incomplete: str) -> list[str]:
    """Complete the name of a shipped recipe, or the path of a TOML file in up to two folders."""
    from ddiff.recipe.files import find_shipped_recipes

    found = _begin_with(incomplete, find_shipped_recipes())
    return [*found, *_find_paths(incomplete, ("*.toml", "*/*.toml"))]


def complete_run_dir(incomplete: str) -> list[str]:
    """Complete the path of a run directory: a folder that contains recipe.toml."""
    recipes = _find_paths(incomplete, ("*/recipe.toml", "*/*/recipe.toml"))
    return [str(Path(path).parent) for path in recipes]


def complete_checked(incomplete: str) -> list[str]:
    """Complete the argument of `ddiff check`: a component, a plugin, or a recipe file."""
    from ddiff.plugin.loader import survey_plugins

    names: set[str] = set()
    for component in survey_plugins().registry.components():
        if component.kind in CHECKED_KINDS:
            names.update((component.name, component.plugin))
    paths = _find_paths(incomplete, ("*.toml", "*/*.toml"))
    return [*_begin_with(incomplete, sorted(names)), *paths]


def complete_new_kind(incomplete: str) -> list[str]:
    """Complete the kind of a new plugin."""
    return _begin_with(incomplete, NEW_KINDS)


def complete_sampler(incomplete: str) -> list[str]:
    """Complete the kind of a sampler."""
    from ddiff.plugin.loader import survey_plugins

    return _begin_with(incomplete, survey_plugins().registry.names("sampler"))


def complete_plugin(incomplete: str) -> list[str]:
    """Complete the name of an installed plugin."""
    from ddiff.plugin.loader import find_installed_plugins

    return _begin_with(incomplete, sorted(find_installed_plugins()))


def _begin_with(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _find_paths(incomplete: str, endings: Iterable[str]) -> list[str]:
    """Return the paths that begin with `incomplete` and end with one of the patterns.

    `*` at the beginning of a pattern continues the incomplete name. Hidden files are left out.
    """
    found = set()
    for ending in endings:
        try:
            found.update(glob.glob(glob.escape(incomplete) + ending))
        except (OSError, ValueError):  # not a valid path
            continue
    return sorted(found)
