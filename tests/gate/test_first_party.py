"""Components of the shipped plugins can be imported and have a valid `build` and `Config`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import ddiff_core
import pytest

from ddiff.plugin.loader import survey_plugins
from ddiff.plugin.registry import KINDS, Component

COMPONENTS = survey_plugins().registry.components()


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
