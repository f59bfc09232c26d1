"""Every formula of docs/theory.md names existing code and an existing test."""

from __future__ import annotations

import re

import pytest
from formulas import to_mathml
from named_code import (
    find_functions,
    find_laws,
    find_tests,
    is_function,
    is_law,
    is_test,
    read_page,
)

PAGE = read_page("theory.md")


@pytest.mark.parametrize("name", find_functions(PAGE))
def test_function_named_by_the_theory_exists(name: str) -> None:
    assert is_function(name)


@pytest.mark.parametrize("name", find_laws(PAGE))
def test_law_named_by_the_theory_is_a_law(name: str) -> None:
    assert is_law(name)


@pytest.mark.parametrize(("file", "name"), find_tests(PAGE))
def test_test_named_by_the_theory_exists(file: str, name: str) -> None:
    assert is_test(file, name)


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
