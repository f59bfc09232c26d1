"""Table of filled gaps: the sentence with a blank, the words of the model, the original words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddiff.console import print_table
from ddiff.runs.gaps import FilledGaps
from ddiff.runs.report.gaps import show_gap
from ddiff.runs.terminal_view import make_printable

DISTANCE = 2  # spaces between two columns
WORDS_SHARE = 0.25  # largest share of a terminal's width for the words of the model


def print_gaps(filled: FilledGaps, console: Console) -> None:
    """Print three columns: the sentence before, the words of the model, and the original words.

    On a terminal, long cells are wrapped. In a file or pipe, each gap is one line.
    """
    if filled.remark:
        console.print(f"\n{filled.remark}", markup=False)
    if not filled.lines:
        return
    rows = [tuple(map(make_printable, show_gap(line))) for line in filled.lines]
    equal = sum(model == original for _, model, original in rows)
    count = f"{len(rows)} gaps" if len(rows) > 1 else "1 gap"
    temperature = filled.lines[0]["temperature"]
    how = "" if temperature is None else f" at temperature {temperature:g}"
    console.print(
        f"\n{count} in sentences of held-out text, filled{how}; {equal} with the original words:"
    )
    titles = ("before", "model", filled.title)
    widths = [max(map(cell_len, cells)) for cells in zip(titles, *rows)]
    if console.is_terminal:
        widths = _fit_widths(widths, console.width)
    print_table(_make_table(titles, rows, widths), console)


def _fit_widths(widths: Sequence[int], width: int) -> list[int]:
    """Return the widths of the three columns on a terminal of `width` columns."""
    sentence, *words = widths
    rest = width - 2 * DISTANCE
    if sum(widths) > rest:
        most = int(width * WORDS_SHARE)
        words = [min(each, most) for each in words]
        sentence = rest - sum(words)
    return [sentence, *words]


def _make_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]
) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, DISTANCE, 0, 0), collapse_padding=True)
    for title, width in zip(titles, widths):
        table.add_column(title, width=width, overflow="fold")
    for sentence, model, original in rows:
        style = "bold green" if model == original else "bold"
        # Text, since a sentence may contain what rich takes for markup
        table.add_row(Text(sentence), Text(model, style=style), Text(original))
    return table
