"""Tables and sentences on the clocks of `ddiff clock`."""

from __future__ import annotations

import itertools

from ddiff.evaluation.intervals import FEWEST_SAMPLES
from ddiff.run_dir.clock_record import ClockBound, ClockRecord
from ddiff.run_dir.command_record import Estimate

NAMES = {
    "diagonal": "diagonal (masked diffusion)",
    "recipe": "recipe",
    "found": "found",
}

BARS = 32
"""Characters of the bar that shows the levels of a clock."""

MARKS = " .:=#"
"""Characters of the levels in a bar, from the tokens up; the last one is the mask."""


def make_bound_rows(record: ClockRecord) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the table of the bounds."""
    titles = ["clock", "nats per token", "95 % interval", "minus diagonal", "minus recipe"]
    rows = []
    for each in record.bounds:
        bound = each.bound
        interval = "" if bound.interval is None else _format_ends(bound.interval, ".4f")
        differences = []
        for name, found in (("diagonal", each.minus_diagonal), ("recipe", each.minus_recipe)):
            differences.append("" if each.name == name else _format_difference(found))
        rows.append([NAMES[each.name], f"{bound.value:.4f}", interval, *differences])
    return titles, rows


def _format_ends(interval: tuple[float, float], form: str) -> str:
    return " to ".join(format(end, form) for end in interval)


def _format_difference(found: Estimate) -> str:
    text = f"{found.value:+.4f}"
    if found.interval is None:
        return text
    return f"{text} ({_format_ends(found.interval, '+.4f')})"


def make_path_rows(record: ClockRecord) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of a table of the chosen clock, or the found one, or the diagonal.

    A row is one time. Its bar has one character per position of an imaginary row, of its level.
    """
    shown = _select_shown(record)
    assert shown.occupancies is not None
    num_levels = len(shown.occupancies)
    titles = ["time", *(f"F_{level + 1}" for level in range(num_levels))]
    titles.append(f"levels of {shown.name} clock")
    count = len(shown.occupancies[0])
    rows = []
    for number in range(0, count, 2):
        t = number / (count - 1)
        reached = [_evaluate(values, t) for values in shown.occupancies]
        rows.append([f"{t:.3f}", *(f"{value:.3f}" for value in reached), _draw_bar(reached)])
    return titles, rows


def _select_shown(record: ClockRecord) -> ClockBound:
    """Return the chosen clock if it has a table, otherwise the last clock that has one."""
    with_table = [bound for bound in record.bounds if bound.occupancies is not None]
    chosen = [bound for bound in with_table if bound.name == record.choice]
    return (chosen or with_table)[-1]


def _evaluate(values: list[float], t: float) -> float:
    """Return the Bernstein polynomial of `values` at t, by de Casteljau's algorithm."""
    while len(values) > 1:
        values = [(1.0 - t) * first + t * second for first, second in itertools.pairwise(values)]
    return values[0]


def _draw_bar(reached: list[float]) -> str:
    """Return one character per position: the level that a share of the positions has."""
    bar = ""
    for number in range(BARS):
        place = (number + 0.5) / BARS
        level = sum(place < each for each in reached)
        mark = MARKS[-1] if level == len(reached) else MARKS[min(level, len(MARKS) - 2)]
        bar += mark
    return f"|{bar}|"


def describe_choice(record: ClockRecord) -> list[str]:
    """Return sentences on the choice and on its limits."""
    checked = max(record.gains.values())
    sentences = [
        f"Chosen clock: {record.choice}, the smallest of {len(record.bounds)} bounds on "
        f"{record.protocol['compared_documents']} documents that did not determine the path. The "
        "smallest of several bounds is slightly too small."
    ]
    difference = record.find_bound(record.choice).minus_recipe
    interval = difference.interval
    if record.choice != "recipe" and (interval is None or interval[1] >= 0.0):
        sentences.append(
            "Its difference from the recipe's clock is not significant: the 95 % interval contains "
            "0. Raise --draws, or evaluate more documents."
        )
    if record.protocol["compared_documents"] < FEWEST_SAMPLES:
        sentences.append(f"Intervals of fewer than {FEWEST_SAMPLES} documents may be too narrow.")
    if record.path is None:
        sentences.append(
            "No path was better than the recipe's on documents that did not determine it (best "
            f"gain {checked:.4f} nats per token)."
        )
    else:
        sentences.append(
            f"Gain of the found path over the recipe's, in the measured field: {checked:.4f} nats "
            f"per token on documents that did not determine it (the largest of {len(record.gains)} "
            f"degrees), {record.fitted_gain:.4f} on those that did."
        )
    if not record.trained_near_path:
        sentences.append(
            "The run was trained only on the path of its clock, and its predictions may be worse "
            'far from it. [objective] times = "occupancy" trains near the path, too.'
        )
    return sentences
