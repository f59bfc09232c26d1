"""Bands of healthy runs: the range in which another seed of a shipped recipe is expected to lie.

`benchmarks/bands.py` computes a band from several seeds and writes the file `healthy/NAME.json` of
this package. A band is drawn only for runs whose recipe equals the recipe of the band in all keys
that change training or evaluation. The seed may differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ddiff.run_dir.identity import flatten_keys
from ddiff.runs.report.run_files import ReportedRun

FREE = ("name", "seed", "run_dir", "plugins", "backend", "sample", "tracker", "evaluate")
"""Tables and keys of a recipe that may differ from the recipe of a band."""
FREE_KEYS = ("train.log_every", "train.checkpoint_every", "train.keep")
KEPT = (
    "backend.precision",
    "evaluate.window",
    "evaluate.rows",
    "evaluate.weights",
    # All seeds of a band share the random numbers of the evaluation, so the band does not contain
    # their error.
    "evaluate.draws",
    "evaluate.seed",
)
"""Keys inside of these tables that must be equal."""


@dataclass(frozen=True)
class Range:
    """Interval [low, high] of a figure at each of several training steps."""

    steps: Sequence[int]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class HealthyBand:
    """Ranges of the figures of healthy runs of one recipe.

    Attributes:
        recipe: name of the recipe.
        keys: values of the keys that a run must have, see `select_keys`.
        seeds: seeds of the runs from which the band was computed.
        rule: definition of the range, in words.
        train_loss: smoothed training loss.
        validation: validation bound.
        provenance: versions and machine of the runs.
    """

    recipe: str
    keys: Mapping[str, Any]
    seeds: Sequence[int]
    rule: str
    train_loss: Range
    validation: Range
    provenance: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> HealthyBand:
        """Return the band of the content of a file."""
        found = json.loads(text)
        for name in ("train_loss", "validation"):
            found[name] = Range(**found[name])
        return cls(**found)

    def to_json(self) -> str:
        """Return the content of a file, from which `parse` makes an equal band."""
        return json.dumps(asdict(self), indent=1) + "\n"


def select_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a resolved recipe that change training or evaluation, by dotted name."""
    chosen = {}
    for key, value in flatten_keys(recipe).items():
        is_free = key in FREE_KEYS or key.partition(".")[0] in FREE
        if key in KEPT or not is_free:
            chosen[key] = value
    # through JSON, because a file has lists in place of tuples
    return dict(json.loads(json.dumps(chosen)))


def find_band(run: ReportedRun) -> HealthyBand | None:
    """Return the band of the recipe of a run, or None if there is none."""
    if run.has_fields:
        return None
    keys = select_keys(run.record.recipe)
    for band in read_bands():
        if band.keys == keys:
            return band
    return None


@cache
def read_bands() -> tuple[HealthyBand, ...]:
    """Return the bands of all shipped recipes that have one."""
    folder = files("ddiff.runs.report").joinpath("healthy")
    if not folder.is_dir():
        return ()
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".json"):
            found.append(HealthyBand.parse(entry.read_text(encoding="utf-8")))
    return tuple(found)
