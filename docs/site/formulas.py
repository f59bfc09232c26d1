"""Formulas in LaTeX as MathML, which browsers draw without a script or a font of the site."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*'
    r"\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]\s*</(?P=tag)>",
    re.DOTALL,
)
"""A formula as the extension pymdownx.arithmatex marks it."""

UNKNOWN = re.compile(r"<m[a-z]+>\\")
"""A command that the converter does not know, which it copies."""


def to_mathml(latex: str, *, display: bool) -> str:
    """Return a formula as MathML. Commands that would be shown as text are refused."""
    made = convert(latex, display="block" if display else "inline")
    if UNKNOWN.search(made):
        raise ValueError(f"The formula {latex!r} has a command that cannot be written in MathML.")
    return made


def replace_formulas(page: str) -> str:
    """Return the HTML of a page with all marked formulas as MathML."""

    def replace(found: re.Match[str]) -> str:
        return to_mathml(html.unescape(found["latex"]), display=found["open"] == "[")

    return MARKED.sub(replace, page)
