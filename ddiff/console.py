"""Print results: lines and tables, on a terminal, in a file or in a pipe."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED = 100_000  # columns: wider than any table


def make_console(stderr: bool = False) -> Console:
    """Return a console on which lines that are longer than the terminal are not cut.

    The console prints on standard output or, with `stderr`, on standard error.
    """
    return Console(stderr=stderr, soft_wrap=True, highlight=False)


def print_table(table: Table, console: Console) -> None:
    """Print a table.

    On a terminal, cells that do not fit are wrapped. A row is one line in a file or pipe, where
    rich would assume 80 columns, and in a table whose columns all have `no_wrap`. Lines have no
    spaces at their end.
    """
    options = console.options
    is_wrapped = console.is_terminal and not all(column.no_wrap for column in table.columns)
    if not is_wrapped:
        # measured without a limit, so that the table is as wide as its content
        unlimited = options.update(width=_UNLIMITED)
        options = options.update(width=console.measure(table, options=unlimited).maximum)
    for segments in console.render_lines(table, options):
        line = Text.assemble(*[(each.text, each.style or "") for each in segments])
        line.rstrip()
        console.print(line, soft_wrap=True)
