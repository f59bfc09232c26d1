"""Tables of a report, and the labels and numbers in their cells."""

from __future__ import annotations

from collections.abc import Sequence

from ddiff.runs.report.charts import NUM_COLORS
from ddiff.runs.report.markup import Markup, element, escape, join
from ddiff.runs.report.run_files import ReportedRun


def run_label(run: ReportedRun) -> Markup:
    """Return the name of a run with a dot of its colour."""
    dot = element("span", _class=f"dot c{run.number % NUM_COLORS}")
    return element("span", dot, run.name, _class="run")


def make_table(titles: Sequence[object], rows: Sequence[Sequence[object]]) -> Markup:
    """Return a table that scrolls sideways on a narrow screen."""
    head = element("tr", *[element("th", title, scope="col") for title in titles])
    body = []
    for row in rows:
        cells = [element("th", row[0], scope="row")]
        cells += [element("td", cell) for cell in row[1:]]
        body.append(element("tr", *cells))
    table = element("table", element("thead", head), element("tbody", *body))
    return element("div", table, _class="scroll")


def format_value(value: float, interval: Sequence[float] | None) -> Markup:
    """Return a number and, in a second line, its 95 % interval."""
    if interval is None:
        return escape(format_figure(value))
    low, high = map(format_figure, interval)
    return join([format_figure(value), element("div", f"{low} to {high}", _class="note")])


def format_share(share: float, digits: int = 0) -> str:
    """Format a share of 1 in percent."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def format_figure(value: float) -> str:
    """Format a figure with four decimals, without a sign of 0."""
    return f"{round(value, 4) + 0.0:.4f}"
