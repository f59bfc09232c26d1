"""Versioned schema of `clock.json`: measured field, found path and bounds of clocks of a tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ddiff.errors import CheckpointError
from ddiff.run_dir.command_record import CommandRecord, Estimate, Finite, RecordPart
from ddiff.run_dir.evaluation_record import Provenance
from ddiff.run_dir.files import CLOCK

SCHEMA_VERSION = 1
"""Newest version of the schema, which this version of ddiff writes."""

ClockName = Literal["diagonal", "recipe", "found"]


class FieldPoint(RecordPart):
    """Measured field at one point of the occupancies, by level l = 1..L.

    Attributes:
        occupancies: F_1..F_L, the probabilities of having reached each level.
        nats: mean divergence at a position of each level.
        standard_errors: standard errors over documents of `nats` minus the divergence of the fixed
            prediction, which is the part that the search compares.
        positions: number of positions of each level.
    """

    occupancies: list[Finite]
    nats: list[Finite]
    standard_errors: list[Finite]
    positions: list[Finite]


class ClockBound(RecordPart):
    """Bound of a clock on the documents of the comparison.

    Attributes:
        name: "diagonal": all levels are reached together, as in masked diffusion; "recipe": the
            clock of the recipe; "found": the path with the smallest bound on the other documents.
        bound: the bound in nats per token.
        minus_diagonal, minus_recipe: the bound minus that of the diagonal and of the recipe's
            clock, paired by document.
        occupancies: one list of values per level, as in [process] occupancies. None: the clock of
            the recipe.
    """

    name: ClockName
    bound: Estimate
    minus_diagonal: Estimate
    minus_recipe: Estimate
    occupancies: list[list[Finite]] | None = None


class ClockRecord(CommandRecord):
    """Content of clock.json.

    Attributes:
        run: name of the run.
        step: training step of the weights.
        weights: "ema" for the exponential moving average of the weights, "trained" for the weights
            as they were trained.
        trained_near_path: whether training had occupancies near the path of the clock, so that the
            field off the path is that of trained predictions.
        protocol: settings of the measurement and of the comparison.
        field: measured points.
        gains: degree of the polynomials -> nats per token by which the path found on one half of
            the measured documents is below the recipe's on the other half.
        fitted_gain: the same for the path on the documents that determined it.
        path: points of the found path; None if no path is better than the recipe's.
        bounds: bounds of the clocks.
        choice: name of the clock with the smallest bound. The choice among the clocks makes the
            smallest bound slightly too small; the intervals are those of each clock by itself.
        fingerprints: fingerprints of the weights, the tokenizer, the vocabulary and the validation
            rows of the run, by name.
        components: recipe key of each component -> its name, plugin and version.
        provenance: command, hardware and duration.
    """

    newest_version = SCHEMA_VERSION
    command = "ddiff clock"

    schema_version: int = SCHEMA_VERSION
    run: str
    step: int
    weights: Literal["ema", "trained"]
    trained_near_path: bool
    protocol: dict[str, Any]
    field: list[FieldPoint]
    gains: dict[int, Finite]
    fitted_gain: Finite
    path: list[list[Finite]] | None
    bounds: list[ClockBound]
    choice: ClockName
    fingerprints: dict[str, str]
    components: dict[str, str] = Field(default_factory=dict)
    provenance: Provenance = Provenance()

    def find_bound(self, name: str) -> ClockBound:
        """Return the bound of a clock by its name."""
        return next(bound for bound in self.bounds if bound.name == name)


def read_clock(run_dir: str | Path) -> ClockRecord:
    """Read clock.json of a run: `read_clock("runs/a").choice`.

    Raises CheckpointError if the file is missing or damaged, or if a newer version of ddiff wrote
    it.
    """
    path = Path(run_dir) / CLOCK
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist. Call `ddiff clock {run_dir}`, which writes the file."
        )
    return ClockRecord.read(path)
