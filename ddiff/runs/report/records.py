"""Figures of other evaluations of a run: on other texts, and by the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddiff.runs.report.markup import EMPTY, Markup, element, join
from ddiff.runs.report.run_files import ReportedRun
from ddiff.runs.report.tables import format_value, make_table, run_label


def make_records(runs: Sequence[ReportedRun]) -> Markup:
    """Return a table of the figures of all other records, one row per file, figure and protocol.

    Figures of different protocols are in different rows, because they are not comparable.
    """
    columns = [run for run in runs if run.records]
    cells: dict[tuple[str, str, str], dict[int, Markup]] = {}
    for run in columns:
        for name, record in run.records.items():
            for figure, found in record["figures"].items():
                key = (name, figure, _describe_protocol(record, found))
                cells.setdefault(key, {})[run.number] = _format_figure(found)
    if not cells:
        return EMPTY
    rows = []
    for (name, figure, protocol), values in cells.items():
        title = join([f"{name}: {figure}", element("div", protocol, _class="note")])
        rows.append([title, *[values.get(run.number, "–") for run in columns]])
    table = make_table(["", *map(run_label, columns)], rows)
    return join([element("h3", "Other evaluations, with 95 % intervals"), table])


def _describe_protocol(record: Mapping[str, Any], figure: Mapping[str, Any]) -> str:
    """Return the protocol and the unit of a figure, and the draws of the evaluation."""
    parts = [figure["protocol"], figure["unit"]]
    draws = record.get("protocol", {}).get("draws")
    if draws is not None and "draw" not in figure["protocol"]:
        parts.append(f"{draws} draws")
    return ", ".join(parts)


def _format_figure(found: Mapping[str, Any]) -> Markup:
    return format_value(found["value"], found.get("interval"))
