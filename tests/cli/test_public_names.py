"""Public names of ddiff: `from ddiff import name` works for every name in the stub file."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import ddiff

STUB = ast.parse(Path(ddiff.__file__).with_suffix(".pyi").read_text())
MODULE_OF = {
    alias.name: f"ddiff.{node.module}"
    for node in STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


@pytest.mark.parametrize("name", sorted(MODULE_OF))
def test_public_name_of_ddiff_is_the_object_that_its_module_defines(name):
    assert getattr(ddiff, name) is getattr(importlib.import_module(MODULE_OF[name]), name)


def test_no_public_name_equals_a_submodule_name():
    submodules = {module.name for module in pkgutil.iter_modules(ddiff.__path__)}
    assert not submodules & set(MODULE_OF)


def test_ddiff_stub_and_package_have_the_same_public_names():
    assert set(ddiff.__all__) == set(MODULE_OF)
    assert set(MODULE_OF) <= set(dir(ddiff))


def test_unknown_attribute_of_ddiff_raises_attribute_error():
    with pytest.raises(AttributeError, match="Vocabulry"):
        _ = ddiff.Vocabulry
