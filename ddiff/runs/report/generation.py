"""Figures of generated samples in a report, from generation.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddiff.runs.report.markup import EMPTY, Markup, element, escape, join
from ddiff.runs.report.run_files import ReportedRun
from ddiff.runs.report.tables import format_value, make_table, run_label

Part = Mapping[str, Any]


def make_generation(runs: Sequence[ReportedRun]) -> Markup:
    """Return the figures of the samples of all runs, with those of held-out text below them.

    A perplexity is shown only together with the entropy of the same samples.
    """
    columns = [run for run in runs if run.generation]
    if not columns:
        return EMPTY
    rows: list[list[object]] = []
    for title, figure in FIGURES.items():
        cells = [_make_cell(run.generation, figure) for run in columns]
        if any(cells):
            rows.append([title, *[cell or "–" for cell in cells]])
    rows.append(["perplexity at entropy", *[_describe_perplexity(run) for run in columns]])
    rows.append(["settings", *[_describe_settings(run.generation) for run in columns]])
    title = element("h3", "Generated samples")
    note = element("p", "Small numbers: 95 % intervals, and held-out text.", _class="note")
    return join([title, note, make_table(["", *map(run_label, columns)], rows)])


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
    "words of held-out text": _read_mean("known_words"),
}
"""Title of each figure, and a function that formats it from the figures of samples or rows."""


def _make_cell(found: Part, figure: Callable[[Part], Markup | None]) -> Markup | None:
    own = figure(found["samples"])
    if own is None:
        return None
    other = figure(found["held_out"])
    return own if other is None else _add_held_out(own, other)


def _add_held_out(own: Markup, other: Markup) -> Markup:
    return join([own, element("div", "held out: ", other, _class="note")])


def _format_mean(found: Part | None) -> Markup | None:
    return None if found is None else format_value(found["value"], found.get("interval"))


def _describe_perplexity(run: ReportedRun) -> Markup:
    judge = run.generation.get("judge")
    if judge is None:
        return escape("no judge")
    own, other = (_format_perplexity(judge[part]) for part in ("samples", "held_out"))
    return _add_held_out(own, other)


def _format_perplexity(found: Part) -> Markup:
    return escape(f"{found['corpus']:.4g} at entropy {found['entropy_nats']['value']:.3f}")


def _describe_settings(found: Part) -> str:
    """Return the settings of the samples and the name of the judge."""
    sampling = found["sampling"]
    kind = sampling["sampler"]["kind"]
    parts = [f"{sampling['count']} samples of {sampling['length']} tokens", kind]
    if sampling["steps"] is not None:
        parts.append(f"{sampling['steps']} steps")
    parts += [f"NFE {sampling['nfe']:g}", f"seed {sampling['seed']}"]
    if found.get("judge"):
        parts.append(f"judge {found['judge']['protocol']['judge']}")
    return ", ".join(parts)
