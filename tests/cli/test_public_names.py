"""`from ddiff import name` works for every public name, and `ddiff.run` stays a function."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import ddiff


@pytest.mark.parametrize("name", sorted(ddiff._MODULE_OF))
def test_every_public_name_is_what_its_module_holds(name):
    assert getattr(ddiff, name) is getattr(importlib.import_module(ddiff._MODULE_OF[name]), name)


def test_no_public_name_is_a_submodule_that_importing_would_put_in_its_place():
    submodules = {module.name for module in pkgutil.iter_modules(ddiff.__path__)}
    assert not submodules & set(ddiff._MODULE_OF)


def test_type_checkers_see_the_same_names_from_the_same_modules():
    tree = ast.parse(Path(ddiff.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == ddiff._MODULE_OF


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match='has no attribute "Vocabulry"'):
        _ = ddiff.Vocabulry
    assert set(ddiff._MODULE_OF) <= set(dir(ddiff))
