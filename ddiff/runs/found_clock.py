"""Use of the clock that `ddiff clock` found, in evaluation and sampling."""

from __future__ import annotations

from dataclasses import replace

from ddiff.core.clock import CdfClock
from ddiff.core.schedule import BernsteinSchedule
from ddiff.errors import CheckpointError
from ddiff.run_dir.clock_record import read_clock
from ddiff.run_dir.files import CLOCK
from ddiff.runs.evaluation_header import fingerprint_weights
from ddiff.runs.run import Run


def apply_found_clock(run: Run) -> Run:
    """Return the run with the clock that `ddiff clock` chose.

    Raises CheckpointError if clock.json is missing or was written for other weights.
    """
    record = read_clock(run.run_dir)
    found = {"step": record.step, "weights": record.fingerprints["weights"]}
    if found != {"step": run.step, "weights": fingerprint_weights(run)}:
        raise CheckpointError(
            f"{run.run_dir / CLOCK} has the clock of other weights, of step {record.step}; the "
            f"weights of the run are of step {run.step}. Repeat `ddiff clock {run.run_dir}`."
        )
    occupancies = record.find_bound(record.choice).occupancies
    if occupancies is not None:  # None: the clock of the recipe is the best one
        run = run.with_clock(CdfClock([BernsteinSchedule(values) for values in occupancies]))
    return replace(run, clock_source="found")
