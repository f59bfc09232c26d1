"""Every entry of docs/defects.md says how it was found, and names an existing test."""

from __future__ import annotations

import pytest
from named_code import find_laws, find_tests, is_law, is_test, read_page

PAGE = read_page("defects.md")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.count(" | ") == 3]
ENTRIES = [row for row in ROWS if row[0] != "where"]
WORDS = ("evaluated", "executed", "read", "thread")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry[0][:40])
def test_entry_says_how_it_was_found_and_names_a_test(entry: list[str]) -> None:
    _, _, found, tests = entry
    assert found.startswith(WORDS)
    named = find_laws(tests), find_tests(tests)
    assert any(named)
    assert all(is_law(name) for name in named[0])
    assert all(is_test(*test) for test in named[1])


def test_defects_page_has_its_entries() -> None:
    assert len(ENTRIES) > 20
