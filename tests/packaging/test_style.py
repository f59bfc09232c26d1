"""Style limits for the engine and the first-party plugins.

Each limit is the measured value at the time of its last change. Limits may only be tightened: code
that exceeds a limit must be rewritten. `python tests/packaging/code_count.py` prints all
measurements; with the name of a measurement, it prints the lines that count.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from code_count import (
    WORDS,
    Style,
    code_lines,
    code_tokens,
    find_words,
    measure_style,
    pages,
    python_files,
)

TOKENS_PER_LINE = 8.5  # code tokens per code line, because dense lines are hard to read
WIDE_SHARE = 0.5  # % of lines over 100 columns
COMMENTS_PER_THOUSAND = 35.0  # minimum number per 1000 code lines
NINETIETH_LENGTH = 30  # 90th percentile of function lengths, in lines
LONGEST_FUNCTION = 70
PROBES = 15  # calls of getattr and hasattr, which type checkers cannot check

WORD_LIMITS = {
    "What ...": 8,
    "is no": 4,
    "trunk": 0,
    "the law of": 1,
    "waiting": 9,
    "told": 0,
    "beside": 0,
    "anew": 1,
    "whom": 0,
    "nobody": 0,
    "mend": 0,
    "go on": 0,
    "of its own": 5,
    "alone": 1,
}
"""Largest number of occurrences of each discouraged word."""

PLACES = "List the lines with: python tests/packaging/code_count.py"


@pytest.fixture(scope="module")
def style() -> Style:
    return measure_style(python_files())


@pytest.fixture(scope="module")
def words() -> dict[str, list[str]]:
    return find_words([*python_files(), *pages()])


def test_tokens_per_code_line_stay_below_limit(style: Style) -> None:
    assert style.tokens_per_line <= TOKENS_PER_LINE


def test_fraction_of_lines_over_100_columns_stays_below_limit(style: Style) -> None:
    assert style.wide_share <= WIDE_SHARE, f"{PLACES} wide"


def test_number_of_comments_stays_above_limit(style: Style) -> None:
    assert style.comments_per_thousand >= COMMENTS_PER_THOUSAND


def test_function_lengths_stay_below_limits(style: Style) -> None:
    assert style.ninetieth_length <= NINETIETH_LENGTH, f"{PLACES} long"
    assert style.longest_function <= LONGEST_FUNCTION, f"{PLACES} long"


def test_calls_of_getattr_and_hasattr_stay_below_limit(style: Style) -> None:
    assert len(style.probes) <= PROBES, f"{PLACES} probes"


@pytest.mark.parametrize("name", WORDS)
def test_discouraged_words_stay_below_limit(words: dict[str, list[str]], name: str) -> None:
    assert len(words[name]) <= WORD_LIMITS[name], f"{PLACES} {name}"


# ---------------------------------------------------------------------- tests of code_count


def test_code_lines_exclude_comments_and_docstrings() -> None:
    lines = [
        '"""Doc."""',
        "",
        "# why",
        "class A:",
        '    """Doc.',
        "",
        '    More."""',
        "",
        "    x: int = 1",
        '    """Of x."""',
    ]
    assert code_lines("\n".join([*lines, '    y = """a', 'b"""'])) == {4, 9, 11, 12}


@pytest.mark.parametrize(
    ("source", "tokens"),
    [
        ("x = 1  # why\n", 3),
        ('"""Doc."""\nx = 1\n', 3),
        ('x = f"a {b + 1} c"\n', 3),
        ('def f():\n    """Doc."""\n    return 1\n', 7),
    ],
)
def test_code_tokens_exclude_comments_docstrings_and_layout(source: str, tokens: int) -> None:
    assert len(code_tokens(source)) == tokens


SPOKEN = '''
"""How x is made."""

def f():
    """Return x.

    This is no y."""
    raise ValueError(f"{x} was told alone")  # beside the point
    how = "What a string"
'''


def test_find_words_searches_docstrings_comments_and_messages(tmp_path: Path) -> None:
    file = tmp_path / "spoken.py"
    file.write_text(SPOKEN)
    found = {name: places for name, places in find_words([file]).items() if places}
    assert found == {
        "What ...": [f"{file}:2"],
        "is no": [f"{file}:7"],
        "told": [f"{file}:8"],
        "alone": [f"{file}:8"],
        "beside": [f"{file}:8"],
    }


def test_find_words_searches_markdown_pages(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# What to do\n\nA run goes on.\n")
    assert find_words([page])["go on"] == [f"{page}:3"]
    assert find_words([page])["What ..."] == []


def test_measure_style_finds_wide_lines_functions_and_getattr_calls(tmp_path: Path) -> None:
    file = tmp_path / "wide.py"
    file.write_text(f'def f():\n    return getattr(x, "y")\n\n\nlong = "{"a" * 100}"\n')
    style = measure_style([file])
    assert style.wide == [f"{file}:5"]
    assert style.probes == [f"{file}:2"]
    assert style.functions == [(2, f"{file}:1 f")]
