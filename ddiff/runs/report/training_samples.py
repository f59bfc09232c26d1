"""Section of a report with the samples that were drawn during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddiff.runs.report.markup import EMPTY, Markup, element, join
from ddiff.runs.report.run_files import ReportedRun
from ddiff.runs.report.tables import run_label

MOST_LINES = 12  # samples of a run on the page

NOTE = (
    "One sample of each run after some training steps, always from the same random numbers. Few "
    "sampling steps were used, so the samples at the end of the run are better."
)


def make_training_samples(runs: Sequence[ReportedRun]) -> Markup:
    """Return a table of training steps and texts for each run with such samples."""
    parts = []
    for run in runs:
        if run.training_samples:
            parts += [element("h3", run_label(run)), _make_table(run.training_samples)]
    return join([element("p", NOTE, _class="note"), *parts]) if parts else EMPTY


def _make_table(samples: Sequence[Mapping[str, Any]]) -> Markup:
    rows = []
    for sample in choose_evenly(samples, MOST_LINES):
        texts = [element("div", text) for text in sample["texts"].values()]
        step = element("th", f"step {sample['step']:,}", scope="row")
        rows.append(element("tr", step, element("td", *texts)))
    table = element("table", element("tbody", *rows))
    return element("div", table, _class="scroll")


def choose_evenly(samples: Sequence[Mapping[str, Any]], most: int) -> Sequence[Mapping[str, Any]]:
    """Return at most `most` samples at about equal distances, the first and the last included."""
    if len(samples) <= most:
        return samples
    last = len(samples) - 1
    return [samples[round(k * last / (most - 1))] for k in range(most)]
