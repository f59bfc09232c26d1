"""Section of a report with gaps in held-out sentences, filled by the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddiff.runs.report.markup import EMPTY, Markup, element, join
from ddiff.runs.report.run_files import ReportedRun
from ddiff.runs.report.tables import make_table, run_label

BLANK = "____"

NOTE = (
    "Gaps in real sentences of the validation documents. The tokens around a gap are given. Runs "
    "with the same documents and tokenizer have the same gaps."
)


def show_gap(line: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the sentence with a blank, the words of the model, and the original words.

    `line` is a line of gaps.jsonl. White space is shown as single spaces.
    """
    # punctuation follows the blank without a space
    sentence = f"{line['before']} {BLANK}{line['after']}"
    sentence, model, original = (
        " ".join(text.split()) for text in (sentence, line["model"], line["original"])
    )
    return sentence, model, original


def make_gaps(runs: Sequence[ReportedRun]) -> Markup:
    """Return a table with a row for each gap and a column for each run that filled gaps."""
    shown = [run for run in runs if run.gaps]
    fills: dict[tuple[str, str], dict[int, str]] = {}
    for run in shown:
        for line in run.gaps:
            sentence, model, original = show_gap(line)
            fills.setdefault((sentence, original), {})[run.number] = model
    if not fills:
        return EMPTY
    rows = []
    for (sentence, original), words in fills.items():
        rows.append([sentence, *[words.get(run.number, "–") for run in shown], original])
    titles = ["before", *[run_label(run) for run in shown], "original"]
    return join([element("p", NOTE, _class="note"), make_table(titles, rows)])
