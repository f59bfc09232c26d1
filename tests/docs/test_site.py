"""The code that turns pages of the repository into the site: lists, formulas and notebooks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from api import TITLES, read_public_names, write_api_pages
from commonmark import to_python_markdown
from formulas import replace_formulas, to_mathml
from notebook_pages import NotebookPage

import ddiff

ROOT = Path(__file__).parents[2]

PIXEL = "iVBORw0KGgo="
"""The first bytes of a PNG file in base64."""


def test_contents_of_lists_are_indented_by_four_columns_per_level() -> None:
    page = "- a\n  b\n\n  | c | d |\n  |---|---|\n  - e\n\n        code\n\nf"
    assert to_python_markdown(page).split("\n") == [
        "- a",
        "    b",
        "",
        "    | c | d |",
        "    |---|---|",
        "    - e",
        "",
        "            code",
        "",
        "f",
    ]


def test_list_after_paragraph_gets_a_blank_line() -> None:
    assert to_python_markdown("a:\n1. b\n2. c") == "a:\n\n1. b\n2. c"


def test_code_that_looks_like_a_list_is_unchanged() -> None:
    page = "```\na:\n- b\n  c\n```\n\n    d:\n    - e\n"
    assert to_python_markdown(page) == page


def test_formulas_become_mathml_and_other_html_is_unchanged() -> None:
    page = '<p>if <span class="arithmatex">\\(a &lt; b\\)</span></p>'
    made = replace_formulas(page)
    assert made.startswith("<p>if <math")
    assert "<mo>&lt;</mo>" in made or "<mo>&#x0003C;</mo>" in made
    assert made.endswith("</math></p>")


def test_displayed_formula_becomes_a_block() -> None:
    page = '<div class="arithmatex">\\[\\frac{1}{t}\\]</div>'
    made = replace_formulas(page)
    assert 'display="block"' in made
    assert "<mfrac>" in made


def test_formula_with_unknown_command_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be written in MathML"):
        to_mathml(r"\definitelyunknown x", display=False)


def test_notebook_page_has_text_code_and_outputs(tmp_path: Path) -> None:
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]},
        {"output_type": "display_data", "data": {"image/png": PIXEL, "text/plain": "<Image>"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title"]},
        {"cell_type": "code", "source": "print(1)", "outputs": outputs},
    ]
    path = tmp_path / "first.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    page = NotebookPage(path)
    assert "```python\nprint(1)\n```" in page.markdown
    assert "```text\none\ntwo\n```" in page.markdown
    assert "](first-1.png)" in page.markdown
    assert page.pictures["first-1.png"].startswith(b"\x89PNG")


def test_api_has_a_page_for_every_package_with_public_names() -> None:
    public = read_public_names(ROOT / "ddiff" / "__init__.pyi")
    assert set(public) == set(TITLES)
    assert sum(map(len, public.values())) == len(ddiff.__all__)


def test_api_pages_document_every_public_name() -> None:
    pages = "".join(write_api_pages(ROOT / "ddiff").values())
    documented = set(re.findall(r"^::: ddiff\.(.+)$", pages, flags=re.MULTILINE))
    for names in read_public_names(ROOT / "ddiff" / "__init__.pyi").values():
        for name in names:
            module = name.rpartition(".")[0]
            assert name in documented or module in documented, name
    assert "core.elbo" in documented
    assert "testing" in documented
