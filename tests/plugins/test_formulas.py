"""Formulas of components: they are complete, agree with the documentation, and are well typeset."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from ddiff.errors import PluginError
from ddiff.plugin.loader import find_installed_plugins, load_plugins
from ddiff.plugin.registry import Component, Registry
from ddiff.recipe.listing import list_plugin
from ddiff.runs.report.formulas import Explanation, parse_lines, typeset

PLUGINS = Path(__file__).parents[2] / "plugins"


def list_components() -> list[Component]:
    """Return the processes of the plugins in this repository, and the objective of `ar`."""
    registry = load_plugins(find_installed_plugins())
    own = [each for each in registry.components() if each.target.startswith("ddiff_")]
    return [each for each in own if each.kind == "process" or each.name == "ar"]


@pytest.mark.parametrize("component", list_components(), ids=lambda component: component.name)
def test_formulas_of_a_component_are_those_of_its_readme(component: Component) -> None:
    found = Explanation.of(component.kind, component)
    assert len(found.formulas) >= 3
    assert len(found.symbols) >= 2
    readme = (PLUGINS / component.target.partition(".")[0] / "README.md").read_text()
    written = _squeeze(readme)
    for name, formula in found.formulas:
        assert _squeeze(name + formula) in written, f"{name}: {formula}"


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_plugin_listing_shows_the_formulas_of_a_process() -> None:
    text = "\n".join(list_plugin("mdlm").paragraphs)
    assert "    marginal    q_t(.|x) = alpha_t delta_x + (1 - alpha_t) delta_mask\n" in text


def test_formula_lines_are_names_with_continued_formulas() -> None:
    text = "rate        a -> b\n            at c\nlong name   d  at e"
    assert parse_lines(text) == [("rate", "a -> b at c"), ("long name", "d  at e")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha_t delta_x", "α<sub>t</sub> δ<sub>x</sub>"),
        ("e^{-(1-g) sigma}", "e<sup>−(1−g) σ</sup>"),
        ("q_t-bar(z)", "q̄<sub>t</sub>(z)"),
        ("eps_hat", "ε̂"),
        ("sum_{y != z} Q", "Σ<sub>y ≠ z</sub> Q"),
        ("x_<i", "x<sub>&lt;i</sub>"),
        ("KL( a || b ) <= -ln p", "KL( a ‖ b ) ≤ −ln p"),
        ("a signal-to-noise ratio", "a signal-to-noise ratio"),
        ("<b>", "&lt;b&gt;"),
    ],
)
def test_formulas_are_typeset_with_signs_and_scripts(text: str, expected: str) -> None:
    assert typeset(text) == expected


class WrongFormulas:
    """Component whose formulas are not a text."""

    formulas = ("a", "b")

    @staticmethod
    def build() -> None:
        """Return nothing."""


def test_component_with_formulas_that_are_no_text_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = inspect.getmodule(WrongFormulas)
    assert module is not None
    monkeypatch.setitem(__import__("sys").modules, "wrong_formulas", module)
    registry = Registry()
    registry.add("process", "wrong", "wrong_formulas:WrongFormulas")
    with pytest.raises(PluginError, match="formulas that are not a text"):
        registry.component("process", "wrong").load()
