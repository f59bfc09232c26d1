"""Findings of the judge of a recipe: written as plain values, and printed as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddiff.console import make_console, print_table
from ddiff.evaluation.intervals import FEWEST_SAMPLES
from ddiff.evaluation.judges import Finding


def describe_findings(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return findings as plain values."""
    found = []
    for finding in findings:
        interval = None if finding.interval is None else list(finding.interval)
        found.append({**vars(finding), "interval": interval})
    return found


def print_findings(judged: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the findings of the judge by target, with intervals and the value by chance."""
    console = console or make_console()
    if not judged:
        return
    table = make_table("samples", "value", "95 % interval", "count", "chance")
    for name, findings in judged["targets"].items():
        table.add_row(Text(name, "bold"), "", "", "", "")
        for finding in findings:
            interval = ""
            if finding["interval"] is not None:
                low, high = finding["interval"]
                interval = f"[{low:.3f}, {high:.3f}]"
            chance = "" if finding["chance"] is None else f"{finding['chance']:.3f}"
            row = (f"{finding['value']:.3f}", interval, str(finding["count"]), chance)
            table.add_row(f"  {finding['name']}", *row)
    console.print()
    print_table(table, console)
    counts = [found["count"] for findings in judged["targets"].values() for found in findings]
    warn_of_few(counts, console)


def make_table(*titles: str) -> Table:
    """Return a table whose cells are not broken into lines."""
    table = Table(*titles, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    table.columns[1].justify = "right"
    return table


def warn_of_few(counts: Sequence[int], console: Console) -> None:
    """Print that intervals may be too narrow if one of the numbers of samples is small."""
    if counts and min(counts) < FEWEST_SAMPLES:
        console.print(f"Intervals of fewer than {FEWEST_SAMPLES} samples may be too narrow.")
