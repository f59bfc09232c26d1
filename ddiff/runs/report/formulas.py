"""Formulas of the components of a run, with Greek letters, subscripts and superscripts.

A component has its formulas as plain text (`ddiff.plugin.registry.Members.formulas`). Reading them
imports the component, and with it torch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddiff.errors import DdiffError
from ddiff.plugin.loader import load_plugins
from ddiff.plugin.registry import Component
from ddiff.runs.report.markup import Markup, element, escape, join
from ddiff.runs.report.run_files import ReportedRun

SHOWN = {
    "process": "process",
    "objective": "objective",
    "objective.loss": "training_loss",
    "objective.times": "time_rule",
    "sample.sampler": "sampler",
}
"""Table of a recipe -> kind of its component; tables whose components a report explains."""


@dataclass(frozen=True)
class Explanation:
    """Summary and formulas of one component.

    Attributes:
        title: table and name, such as "process: NAME".
        summary: first paragraph of its documentation.
        formulas, symbols: pairs (name, text). Both are empty for a component without formulas.
    """

    title: str
    summary: str
    formulas: Sequence[tuple[str, str]]
    symbols: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, table: str, component: Component) -> Explanation:
        """Load a component and read its formulas."""
        documentation = inspect.cleandoc(component.load().__doc__ or "")
        text = inspect.cleandoc(component.members().formulas)
        formulas, _, symbols = text.partition("\n\n")
        return cls(
            title=f"{table}: {component.name}",
            summary=" ".join(documentation.partition("\n\n")[0].replace("`", "").split()),
            formulas=parse_lines(formulas),
            symbols=parse_lines(symbols),
        )


def parse_lines(text: str) -> list[tuple[str, str]]:
    """Return pairs (name, formula) of lines "name  formula". Indented lines continue a formula."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        name, _, formula = line.partition("  ")
        if not name:
            name, before = found.pop()
            formula = f"{before} {line.strip()}"
        found.append((name, formula.strip()))
    return found


def read_explanations(run: ReportedRun) -> list[Explanation]:
    """Load the components of a run, and return their summaries and formulas.

    A component that cannot be loaded here is left out: the plugin of a run may not be installed on
    the machine that writes the report.
    """
    recipe = run.record.recipe
    try:
        registry = load_plugins(recipe.get("plugins", ()))
    except DdiffError:
        return []
    found = []
    for table, kind, name in _list_components(recipe):
        try:
            found.append(Explanation.of(table, registry.component(kind, name)))
        except DdiffError:
            continue
    return found


def _list_components(recipe: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return triples (table, kind, name) of the components that a report explains."""
    found = []
    for name, field in recipe.get("fields", {}).items():
        found.append((f"fields.{name}.process", "process", field["process"]["kind"]))
    for table, kind in SHOWN.items():
        part: Any = recipe
        for key in table.split("."):
            part = part.get(key, {})
        if "kind" in part:
            found.append((table, kind, part["kind"]))
    return found


# ---------------------------------------------------------------------- markup


def make_formulas(explained: Sequence[tuple[Markup, Sequence[Explanation]]]) -> Markup:
    """Return the components of all runs, each once, with the labels of the runs that use them.

    `explained` has pairs (label of a run, its components).
    """
    users: dict[str, list[Markup]] = {}
    shown: dict[str, Explanation] = {}
    for label, components in explained:
        for component in components:
            shown[component.title] = component
            users.setdefault(component.title, []).append(label)
    parts = []
    others = []
    for title, component in shown.items():
        labels = element("span", *users[title], _class="users")
        if component.formulas:
            heading = element("h3", title, " ", labels)
            parts.append(element("div", heading, _draw(component)))
        else:
            others.append(element("dt", title, " ", labels))
            others.append(element("dd", component.summary))
    if others:
        parts.append(element("h3", "Other components"))
        parts.append(element("dl", *others, _class="summaries"))
    return join(parts)


def _draw(component: Explanation) -> Markup:
    parts = [element("p", typeset(component.summary), _class="note")]
    for pairs, name in ((component.formulas, "formulas"), (component.symbols, "symbols")):
        rows = []
        for left, right in pairs:
            rows.append(element("dt", typeset(left)))
            rows.append(element("dd", typeset(right)))
        if rows:
            parts.append(element("dl", *rows, _class=name))
    return join(parts)


GREEK = {
    "alpha": "α",
    "beta": "β",
    "gamma": "γ",
    "delta": "δ",
    "epsilon": "ε",
    "eps": "ε",
    "theta": "θ",
    "pi": "π",
    "rho": "ρ",
    "sigma": "σ",
    "tau": "τ",
    "omega": "ω",
}
SIGNS = {
    "->": "→",
    "!=": "≠",
    ">=": "≥",
    "<=": "≤",
    "||": "‖",
    "'": "′",
    "*": "·",
    "-": "−",
    "~": "∼",
    "...": "…",
}
PIECES = re.compile(
    r"(?P<accent>-bar|_hat)(?![A-Za-z])"
    r"|(?P<script>[_^])(?:\{(?P<group>[^{}]*)\}|(?P<word>[-<]?[A-Za-z0-9]+))"
    r"|(?P<sum>sum(?=_))"
    r"|(?P<hyphen>(?<=[a-z]{2})-(?=[a-z]))"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<sign>->|!=|>=|<=|\|\||\.\.\.|['*~-])"
)
ACCENTS = {"-bar": "\N{COMBINING MACRON}", "_hat": "\N{COMBINING CIRCUMFLEX ACCENT}"}


def typeset(text: str) -> Markup:
    """Return a formula in plain text as HTML.

    Greek letters are named by words, `_` and `^` begin a subscript or superscript of one word or of
    a group in braces, and `-bar` and `_hat` are accents of the letter before them.

    >>> typeset("q_t-bar(z) = e^{-2 sigma}")
    'q̄<sub>t</sub>(z) = e<sup>−2 σ</sup>'
    """
    # an accent belongs to the letter, not to its subscript
    text = re.sub(r"([A-Za-z]+)(_\w+?)?(-bar|_hat)(?![A-Za-z])", r"\1\3\2", text)
    parts: list[object] = []
    end = 0
    for piece in PIECES.finditer(text):
        parts.append(text[end : piece.start()])
        parts.append(_set_piece(piece))
        end = piece.end()
    parts.append(text[end:])
    return join(parts)


def _set_piece(piece: re.Match[str]) -> Markup:
    whole = piece.group()
    if piece["script"]:
        name = "sub" if piece["script"] == "_" else "sup"
        return element(name, typeset(piece["group"] or piece["word"] or ""))
    if piece["accent"]:
        return escape(ACCENTS[whole])
    if piece["sum"]:
        return escape("Σ")
    if piece["letters"]:
        return escape(GREEK.get(whole, whole))
    return escape(whole if piece["hyphen"] else SIGNS[whole])
