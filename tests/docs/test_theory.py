"""Every formula of docs/theory.md names existing code and an existing test."""

from __future__ import annotations

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest
from formulas import to_mathml

from ddiff.testing.report import Law

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
FUNCTIONS = sorted(set(re.findall(r"`(core\.\w+\.[\w.]+)`", PAGE)))
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
LAW_MODULES = "chain|clock|bound|bound_terms|derived_formulas|draws|information|sampler"
LAWS = sorted(set(re.findall(rf"`((?:{LAW_MODULES}|reverse_process)\.\w+)`", PAGE)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_named_by_the_theory_exists(name: str) -> None:
    module, *attributes = name.removeprefix("core.").split(".")
    found = reduce(getattr, attributes, importlib.import_module(f"ddiff.core.{module}"))
    assert callable(found)


@pytest.mark.parametrize("name", LAWS)
def test_law_named_by_the_theory_is_a_law(name: str) -> None:
    module, attribute = name.split(".")
    assert isinstance(getattr(importlib.import_module(f"ddiff.testing.{module}"), attribute), Law)


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_test_named_by_the_theory_exists(file: str, name: str) -> None:
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_every_displayed_formula_has_code_and_a_comparison() -> None:
    parts = PAGE.split("$$")
    assert len(parts) > 30
    # two formulas may follow each other, with one sentence for both
    for number in range(1, len(parts) - 2, 2):
        text = parts[number + 1]
        after = text if "omputed by" in text else text + parts[number + 3]
        assert re.search(r"omputed by\s`core\.", after), parts[number]
        assert re.search(r"ompared by[\s\w]+`", after), parts[number]


def test_every_formula_can_be_written_in_mathml() -> None:
    displayed = PAGE.split("$$")[1::2]
    without = re.sub(r"\$\$.*?\$\$", "", PAGE, flags=re.DOTALL)
    inline = re.findall(r"\$([^$]+)\$", without)
    assert len(inline) > 30
    for latex in [*displayed, *inline]:
        assert "<mi>" in to_mathml(latex, display=True) or "<mn>" in to_mathml(latex, display=True)
