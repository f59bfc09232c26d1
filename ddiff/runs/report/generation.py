"""Figures of generated samples in a report, from generation.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddiff.runs.report.markup import EMPTY, Markup, element, escape, join
from ddiff.runs.report.run_files import ReportedRun
from ddiff.runs.report.tables import format_value, make_table, run_label

Part = Mapping[str, Any]
Column = tuple[Markup, Part, Part | None]
"""Title, figures of samples or rows, and their figures under the judge or None."""
HELD_OUT = Markup("held-out text")


def make_generation(runs: Sequence[ReportedRun]) -> Markup:
    """Return the figures of the samples of all runs, with those of held-out text.

    If all runs have the same held-out text, it has one column. A perplexity is shown only together
    with the entropy of the same samples.
    """
    chosen = [run for run in runs if run.generation]
    if not chosen:
        return EMPTY
    columns = _list_columns(chosen)
    rows: list[list[object]] = []
    for title, figure in FIGURES.items():
        cells = [figure(found) for _, found, _ in columns]
        if any(cells):
            rows.append([title, *[cell or "–" for cell in cells]])
    perplexities = [_describe_perplexity(judged) for _, _, judged in columns]
    rows.append(["perplexity at entropy", *perplexities])
    table = make_table(["", *[title for title, _, _ in columns]], rows)
    parts = [element("h3", "Generated samples"), table]
    for run in chosen:
        settings = _describe_settings(run.generation)
        parts.append(element("p", run_label(run), f": {settings}.", _class="note"))
    return join(parts)


def _list_columns(runs: Sequence[ReportedRun]) -> list[Column]:
    """Return the columns of the table: samples of the runs, and their held-out texts."""
    columns: list[Column] = []
    references: list[Column] = []
    for run in runs:
        found = run.generation
        judge = found.get("judge") or {}
        columns.append((run_label(run), found["samples"], judge.get("samples")))
        references.append((HELD_OUT, found["held_out"], judge.get("held_out")))
    if all(reference == references[0] for reference in references):
        return [*columns, references[0]]
    # each run has its own held-out text, in the column after its samples
    paired: list[Column] = []
    for column, reference in zip(columns, references):
        paired += [column, reference]
    return paired


def _read_mean(key: str) -> Callable[[Part], Markup | None]:
    def read(part: Part) -> Markup | None:
        return _format_mean(part.get(key))

    return read


def _read_repetition(part: Part) -> Markup | None:
    return _format_mean(part["repetition"].get("4"))


def _read_distinct(part: Part) -> Markup | None:
    share = part["distinct"].get("2")
    return None if share is None else escape(f"{share:.4f}")


FIGURES: Mapping[str, Callable[[Part], Markup | None]] = {
    "entropy per sample, nats": _read_mean("entropy_nats"),
    "distinct-2": _read_distinct,
    "repetition-4": _read_repetition,
    "self-BLEU": _read_mean("self_bleu"),
    "share of words in held-out text": _read_mean("known_words"),
}
"""Title of each figure, and a function that formats it from the figures of samples or rows."""


def _format_mean(found: Part | None) -> Markup | None:
    return None if found is None else format_value(found["value"], found.get("interval"))


def _describe_perplexity(found: Part | None) -> Markup:
    if found is None:
        return escape("no judge")
    return escape(f"{found['corpus']:.4g} at entropy {found['entropy_nats']['value']:.3f}")


def _describe_settings(found: Part) -> str:
    """Return the settings of the samples and the name of the judge."""
    sampling = found["sampling"]
    kind = sampling["sampler"]["kind"]
    parts = [f"{sampling['count']} samples of {sampling['length']} tokens", kind]
    if sampling["steps"] is not None:
        parts.append(f"{sampling['steps']} steps")
    parts += [f"NFE {sampling['nfe']:.4g}", f"seed {sampling['seed']}"]
    if found.get("judge"):
        judge = found["judge"]["protocol"]["judge"]
        # the name of a local directory says enough
        parts.append(f"judge {Path(judge).name if Path(judge).is_absolute() else judge}")
    return ", ".join(parts)
