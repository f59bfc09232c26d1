"""Table of the figures of generated samples, printed by `ddiff eval --generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ddiff.console import make_console, print_table
from ddiff.evaluation.intervals import FEWEST_SAMPLES
from ddiff.evaluation.judges import TEXT_FIELD
from ddiff.runs.findings import print_findings

_SHOWN_GRAMS = ("2", "4")  # lengths of the n-grams in the table; generation.json has all


def print_generation(written: Mapping[str, Any]) -> None:
    """Print the figures of samples and of held-out rows as a table.

    `written` is the content of generation.json.
    """
    console = make_console()
    table = Table("generated samples", "samples", "held-out text", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    _add_perplexity(table, written)
    samples, held_out = written["samples"], written["held_out"]
    _add_means(table, "entropy per sample, nats", samples, held_out, "entropy_nats")
    table.add_row(
        "entropy pooled, nats",
        f"{samples['pooled_entropy_nats']:.3f}",
        f"{held_out['pooled_entropy_nats']:.3f}",
    )
    for n in _SHOWN_GRAMS:
        cells = [_format_share(part["distinct"].get(n)) for part in (samples, held_out)]
        table.add_row(f"distinct-{n}", *cells)
    for n in _SHOWN_GRAMS:
        cells = [_format_mean(part["repetition"].get(n)) for part in (samples, held_out)]
        table.add_row(f"repetition-{n}", *cells)
    _add_means(table, "self-BLEU", samples, held_out, "self_bleu")
    _add_means(table, "share of words in held-out text", samples, held_out, "known_words")
    _add_mauve(table, written)
    _add_correction(table, written["self_correction"])
    print_table(table, console)
    console.print(_describe(written))
    if written["findings"] is not None:
        print_findings({"targets": {TEXT_FIELD: written["findings"]}}, console)


def _add_perplexity(table: Table, written: Mapping[str, Any]) -> None:
    """Add the perplexity, in cells that also show the entropy."""
    judge = written["judge"]
    if judge is None:
        return
    parts = (judge["samples"], judge["held_out"])
    table.add_row("perplexity", *(_format_perplexity(part, "corpus") for part in parts))
    table.add_row("  95 % interval", *(_format_interval(part["corpus_interval"]) for part in parts))
    means = [_format_perplexity(part, "per_sample") for part in parts]
    table.add_row("  mean of samples", *means)


def _add_mauve(table: Table, written: Mapping[str, Any]) -> None:
    """Add MAUVE with the range of its values over the seeds of k-means."""
    found = written["mauve"] or (written["judge"] or {}).get("mauve")
    if found is not None:
        best = found["held_out_value"]
        table.add_row("MAUVE", f"{found['value']:.3f}", "" if best is None else f"{best:.3f}")
        ends = f"{found['lowest']:.3f} to {found['highest']:.3f}"
        table.add_row(f"  {found['seeds']} seeds of k-means", ends, "")


def _format_perplexity(found: Mapping[str, Any], key: str) -> str:
    """Return a perplexity together with the entropy. `key`: "corpus" or "per_sample"."""
    value = found["corpus"] if key == "corpus" else found[key]["value"]
    return f"{value:.4g} at entropy {found['entropy_nats']['value']:.2f}"


def _format_interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _add_means(
    table: Table, name: str, samples: Mapping[str, Any], held_out: Mapping[str, Any], key: str
) -> None:
    if samples[key] is not None:
        table.add_row(name, _format_mean(samples[key]), _format_mean(held_out[key]))


def _add_correction(table: Table, found: Mapping[str, Any] | None) -> None:
    if found is None:
        return
    table.add_row("self-correction accuracy", _format_mean(found["accuracy"]), "")
    table.add_row(f"  after {found['rounds']} rounds", f"{found['curve'][-1]:.3f}", "")


def _format_share(share: float | None) -> str:
    return "" if share is None else f"{share:.3f}"


def _format_mean(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    if found is None:
        return ""
    text = f"{found['value']:.{digits}f}"
    if found["interval"]:
        low, high = found["interval"]
        text += f" ± {(high - low) / 2:.{digits}f}"
    return text


def _describe(written: Mapping[str, Any]) -> str:
    """Return the settings of the samples as one line."""
    sampling = written["sampling"]
    sampler = sampling["sampler"]
    text = (
        f"{sampling['count']} samples of {sampling['length']} {written['unit']}s, sampler "
        f"{sampler['kind']}"
    )
    if sampling["steps"] is not None:
        text += f", {sampling['steps']} steps"
    text += f", NFE {sampling['nfe']:.4g}"
    if "clock" in sampling:
        text += f", {sampling['clock']} clock"
    if "temperature" in sampler:
        text += f", temperature {sampler['temperature']:g}"
    text += f", {sampling['precision']}, seed {sampling['seed']}"
    text += f". {written['held_out']['count']} rows of held-out text"
    if written["judge"] is not None:
        judge = written["judge"]["protocol"]
        text += (
            f". Judge {judge['judge']}, window {judge['window']}, stride {judge['stride']}, "
            f"{judge['dtype']}"
        )
    text += ". Intervals are 95 % intervals over samples."
    if sampling["count"] < FEWEST_SAMPLES:
        text += f" Those of fewer than {FEWEST_SAMPLES} samples may be too narrow."
    return text
