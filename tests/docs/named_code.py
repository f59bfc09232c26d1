"""Find names of functions, laws and tests in a page, and check that they exist."""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import reduce
from pathlib import Path

import ddiff.testing
from ddiff.testing.report import Law

ROOT = Path(__file__).parents[2]
LAW_MODULES = "|".join(module.name for module in pkgutil.iter_modules(ddiff.testing.__path__))


def read_page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def find_functions(page: str) -> list[str]:
    """Return the names of functions of `ddiff.core` in a page, such as `core.elbo.nelbo`."""
    return sorted(set(re.findall(r"`(core\.\w+\.[\w.]+)`", page)))


def find_laws(page: str) -> list[str]:
    """Return the names of laws in a page, such as `chain.chapman_kolmogorov`."""
    return sorted(set(re.findall(rf"`((?:{LAW_MODULES})\.\w+)`", page)))


def find_tests(page: str) -> list[tuple[str, str]]:
    """Return file and name of each test that a page names."""
    return sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)))


def is_function(name: str) -> bool:
    package, module, *attributes = name.split(".")
    found = reduce(getattr, attributes, importlib.import_module(f"ddiff.{package}.{module}"))
    return callable(found)


def is_law(name: str) -> bool:
    module, attribute = name.split(".")
    return isinstance(getattr(importlib.import_module(f"ddiff.testing.{module}"), attribute), Law)


def is_test(file: str, name: str) -> bool:
    return f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
