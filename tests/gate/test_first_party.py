"""Components of the shipped plugins: a valid `build` and `Config`, a registration and a test."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import ddiff_core
import pytest

from ddiff.plugin.loader import survey_plugins
from ddiff.plugin.registry import KINDS, Component

COMPONENTS = survey_plugins().registry.components()
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "component", COMPONENTS, ids=lambda component: f"{component.kind}-{component.name}"
)
def test_every_component_loads_and_its_build_has_valid_parameters(component: Component):
    built = component.load()
    config = component.config_class()
    assert all(field != "kind" for field in config.model_fields)
    signature = inspect.signature(built.build)
    given = re.search(r"build\(config(?:, \*, (.*?))?\)", KINDS[component.kind])
    assert given is not None
    if component.kind != "objective":  # inputs of an objective depend on its slots
        offered = given[1].split(", ") if given[1] else []
        signature.bind("config", **{name: None for name in offered if name in signature.parameters})


def test_every_core_class_with_build_method_is_registered():
    registered = {component.target for component in COMPONENTS if component.plugin == "core"}
    for module in pkgutil.iter_modules(ddiff_core.__path__, "ddiff_core."):
        for name, found in vars(importlib.import_module(module.name)).items():
            if (
                isinstance(found, type)
                and found.__module__ == module.name
                and hasattr(found, "build")
            ):
                assert f"{module.name}:{name}" in registered


def find_tested_names() -> tuple[set[str], set[str]]:
    """Return the objects that tests use, as "module:name", and the names in their strings.

    An object is used as `Name` after `from module import Name`, or as `module.Name`. A name in a
    string is the whole string, or the value of a key `kind` in the text of a recipe.
    """
    objects: set[str] = set()
    names: set[str] = set()
    for path in TESTS.rglob("*.py"):
        imported: dict[str, tuple[str, str]] = {}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    imported[alias.asname or alias.name] = (node.module, alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in imported:
                objects.add(":".join(imported[node.id]))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = ".".join(imported.get(node.value.id, (node.value.id,)))
                objects.add(f"{module}:{node.attr}")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.update([node.value, *re.findall(r'kind *= *"(\w+)"', node.value)])
    return objects, names


def test_every_component_is_used_or_named_in_a_test():
    """A new component needs a test, in any folder. This test only checks that there is one."""
    objects, names = find_tested_names()
    untested = [
        f"{component.kind} {component.name}"
        for component in COMPONENTS
        if component.target not in objects and component.name not in names
    ]
    assert untested == []
