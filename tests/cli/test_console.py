"""Tables of results, on a terminal and in a pipe."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from ddiff.console import print_table

LONG = "word " * 40


def print_rows(is_terminal: bool, no_wrap: bool) -> list[str]:
    table = Table("name", "remark", box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = no_wrap
    table.add_row("long", LONG.strip())
    table.add_row("short", "")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=80, color_system=None)
    print_table(table, console)
    return stream.getvalue().splitlines()


def test_table_in_a_pipe_has_one_line_per_row_and_no_spaces_at_its_end() -> None:
    assert print_rows(is_terminal=False, no_wrap=False) == [
        "name   remark",
        f"long   {LONG.strip()}",
        "short",
    ]


def test_table_on_a_terminal_is_wrapped() -> None:
    lines = print_rows(is_terminal=True, no_wrap=False)
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).split() == ["name", "remark", "long", *LONG.split(), "short"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_columns_that_are_not_wrapped_are_not_cut(is_terminal: bool) -> None:
    assert print_rows(is_terminal, no_wrap=True)[1] == f"long   {LONG.strip()}"
