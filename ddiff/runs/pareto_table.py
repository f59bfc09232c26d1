"""Table of the points of a sweep, and sentences below it."""

from __future__ import annotations

from collections.abc import Sequence

from ddiff.evaluation.pareto import dominates
from ddiff.run_dir.command_record import Estimate
from ddiff.run_dir.pareto_record import JudgedFigures, ParetoRecord
from ddiff.runs.report.pareto import ENTROPY_KEYS, to_tradeoff

MARK = "*"
"""Mark of a point that no other point dominates."""

DEFINITION = (
    f"{MARK} No other comparable point has a perplexity as low, an entropy as high and an NFE as "
    "low, and is better in one of them."
)
TITLES = [
    "",
    "run",
    "sampler",
    "steps",
    "temperature",
    "NFE",
    "perplexity at entropy",
    "95 % interval",
    "distinct-2",
    "share of words in held-out text",
    "seconds",
]


def mark_front(records: Sequence[ParetoRecord]) -> list[list[bool]]:
    """Return for each point of each record whether no comparable point dominates it.

    Points are comparable if their entropies are, that is, if `ENTROPY_KEYS` are equal.
    """
    groups = [[record.protocol[name] for name in ENTROPY_KEYS] for record in records]
    marked = []
    for record, group in zip(records, groups):
        rivals = [
            to_tradeoff(point)
            for other, other_group in zip(records, groups)
            if other_group == group
            for point in other.points
        ]
        own = [to_tradeoff(point) for point in record.points]
        marked.append([not any(dominates(rival, point) for rival in rivals) for point in own])
    return marked


def make_rows(records: Sequence[ParetoRecord]) -> list[list[str]]:
    """Return a row for each point, and one for the held-out text of each run."""
    rows = []
    for record, marks in zip(records, mark_front(records)):
        for point, is_best in zip(record.points, marks):
            settings = [
                MARK if is_best else "",
                record.run,
                point.kind,
                _format_optional(point.steps),
                _format_optional(point.temperature),
                f"{point.nfe:.4g}",
            ]
            rows.append([*settings, *_format_figures(point), f"{point.seconds:.1f}"])
        text = ["", record.run, "held-out text", "", "", ""]
        rows.append([*text, *_format_figures(record.held_out), ""])
    return rows


def describe_records(records: Sequence[ParetoRecord]) -> list[str]:
    """Return sentences on the marks, the samples and the judge, and on figures that differ."""
    first = records[0].protocol
    judge = first["judge"]
    sentences = [
        DEFINITION,
        f"{first['count']} samples of {first['length']} {first['unit']}s per point, seed "
        f"{first['seed']}. Judge {judge.get('judge', '')}. Intervals are 95 % intervals over "
        "samples, entropies are in nats.",
    ]
    for record in records:
        if record.fingerprints["weights"] == judge.get("model"):
            sentences.append(
                f"{record.run} is the judge. Its samples have a low perplexity, because the judge "
                "has the same errors as the model that drew them."
            )
    for name, consequence in _COMPARED.items():
        if any(record.protocol[name] != first[name] for record in records):
            sentences.append(f"The runs have different values of {name}: {consequence}.")
    return sentences


_COMPARED = {
    "length": "their entropies cannot be compared, because the entropy rises with the length",
    "unit": "their entropies cannot be compared, because they count different units",
    "tokenizer": "their entropies cannot be compared, because they count different tokens",
    "seed": "their samples were drawn from different random numbers",
    "held_out": "their held-out texts differ",
}
"""Setting that may differ between runs -> consequence for the comparison."""


def _format_figures(found: JudgedFigures) -> list[str]:
    """Return perplexity with entropy, interval of the perplexity, distinct-2 and known words."""
    interval = found.perplexity.interval
    ends = "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
    return [
        f"{found.perplexity.value:.4g} at {_format_estimate(found.entropy)}",
        ends,
        "" if found.distinct_2 is None else f"{found.distinct_2:.3f}",
        _format_estimate(found.known_words),
    ]


def _format_estimate(found: Estimate | None) -> str:
    if found is None:
        return ""
    if found.interval is None:
        return f"{found.value:.3f}"
    half = (found.interval[1] - found.interval[0]) / 2
    return f"{found.value:.3f} ± {half:.3f}"


def _format_optional(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
