"""Content of a run directory that a report shows. Files that do not exist are empty.

This module does not import torch: a report needs only the files of the runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddiff.errors import ArgumentError
from ddiff.run_dir.files import (
    EVALUATION,
    GAPS,
    GENERATION,
    JUDGED,
    LM_EVALS,
    METRICS,
    OTHER_EVALUATIONS,
    PICTURES,
    SAMPLES,
    SAMPLING,
    TRAINING_SAMPLES,
    RunRecord,
    read_json,
    read_json_lines,
    require_run_dir,
)
from ddiff.run_dir.origin_record import OriginRecord, find_origin

OTHER_RECORDS = (OTHER_EVALUATIONS, LM_EVALS)
"""Patterns of files of a run with the figures of further evaluations."""


@dataclass(frozen=True)
class Bound:
    """Likelihood bound of a text run on its validation text.

    Attributes:
        label: "NELBO", or "NLL" if it is exact.
        unit: "token" or "symbol".
        nats: the bound in nats per unit, with its 95 % `interval` or None.
        terms: terms of the bound in nats per unit, by name. Their sum is the bound.
        parts: parts of the diffusion term by name, such as levels of a tree.
        baselines: name -> nats per unit of simple models, such as "unigram".
        entropy_rate: true entropy of the source in nats per unit, or None if it is unknown.
    """

    label: str
    unit: str
    nats: float
    interval: tuple[float, float] | None
    bits_per_byte: float | None
    perplexity: float | None
    terms: Mapping[str, float]
    parts: Mapping[str, float]
    baselines: Mapping[str, float]
    entropy_rate: float | None
    protocol: Mapping[str, Any]
    documents: int
    units: int

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Bound:
        """Return the bound of the content of evaluation.json of a text run."""
        unit = found["unit"]
        label = found["bound"]
        low_high = found.get("interval")
        baselines = {}
        for name, value in found["baselines"].items():
            baselines[name.split("_")[0]] = value  # unigram_nats_per_token -> unigram
        return cls(
            label=label,
            unit=unit,
            nats=found[f"{label.lower()}_nats_per_{unit}"],
            interval=(low_high[0], low_high[1]) if low_high else None,
            bits_per_byte=found.get("bits_per_byte"),
            perplexity=found.get("ppl"),
            terms=found.get(f"terms_nats_per_{unit}", {}),
            parts=found.get(f"parts_nats_per_{unit}", {}),
            baselines=baselines,
            entropy_rate=found.get(f"entropy_rate_nats_per_{unit}"),
            protocol=found["protocol"],
            documents=found["documents"],
            units=found[f"{unit}s"],
        )


@dataclass(frozen=True)
class ReportedRun:
    """Files of one run.

    Attributes:
        name: name of the recipe, or the directory if two runs have the same name.
        number: number of the run in the report, which selects its colour.
        pictures: name of each file with pictures of samples -> its content (PNG).
        records: name of each other record with figures -> its content: evaluations on other texts,
            and by the lm-evaluation-harness.
        origin: published files of an imported run; None for a trained run.
    """

    directory: Path
    name: str
    number: int
    record: RunRecord
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    gaps: Sequence[Mapping[str, Any]]
    training_samples: Sequence[Mapping[str, Any]]
    sampling: Mapping[str, Any]
    judged: Mapping[str, Any]
    generation: Mapping[str, Any]
    pictures: Mapping[str, bytes]
    records: Mapping[str, Mapping[str, Any]]
    origin: OriginRecord | None

    @classmethod
    def read(cls, directory: Path, number: int) -> ReportedRun:
        """Read the files of a run.

        Raises CheckpointError if the directory is not a run, or if a file is damaged.
        """
        require_run_dir(directory)
        record = RunRecord.read(directory)
        pictures = {}
        for path in sorted(directory.glob(PICTURES)):
            pictures[path.name] = path.read_bytes()
        return cls(
            directory=directory,
            name=record.recipe["name"],
            number=number,
            record=record,
            metrics=read_json_lines(directory / METRICS),
            evaluation=read_json(directory / EVALUATION),
            samples=read_json_lines(directory / SAMPLES),
            gaps=read_json_lines(directory / GAPS),
            origin=find_origin(directory),
            training_samples=read_json_lines(directory / TRAINING_SAMPLES),
            sampling=read_json(directory / SAMPLING),
            judged=read_json(directory / JUDGED),
            generation=read_json(directory / GENERATION),
            pictures=pictures,
            records=_read_records(directory),
        )

    @property
    def has_fields(self) -> bool:
        """True for a run of several fields, such as text and image."""
        return "fields" in self.record.recipe

    @property
    def bound(self) -> Bound | None:
        """Bound of a text run, or None if the run is not evaluated or has several fields."""
        if not self.evaluation or self.has_fields:
            return None
        return Bound.of(self.evaluation)

    @property
    def process(self) -> str:
        """Kinds of the processes, or the kind of the objective if there is no process."""
        recipe = self.record.recipe
        if self.has_fields:
            fields = recipe["fields"].items()
            return ", ".join(f"{name}: {field['process']['kind']}" for name, field in fields)
        if recipe.get("process"):
            return str(recipe["process"]["kind"])
        return str(recipe["objective"]["kind"])

    @property
    def sampler(self) -> str:
        """Sampler of the written samples with its number of steps, such as "KIND, 64 steps"."""
        keys = self.record.recipe["sample"]
        steps = self.sampling.get("steps", keys["steps"])
        kind = keys.get("sampler", {}).get("kind", "one sampler per field")
        return kind if steps is None else f"{kind}, {steps} steps"


def _read_records(directory: Path) -> dict[str, Mapping[str, Any]]:
    """Read the records of other evaluations, whose names are those of their files."""
    found: dict[str, Mapping[str, Any]] = {}
    for pattern in OTHER_RECORDS:
        for path in sorted(directory.glob(pattern)):
            content = read_json(path)
            # files of the first version have no figures
            if content.get("figures"):
                found[path.stem.removeprefix("evaluation-")] = content
    return found


def read_runs(directories: Sequence[str | Path]) -> list[ReportedRun]:
    """Read the runs of a report. Their names are distinct.

    Raises ArgumentError if there is no run or a run is given twice.
    """
    if not directories:
        raise ArgumentError("ddiff report: give at least one run directory, such as runs/<name>.")
    places = [Path(directory) for directory in directories]
    for place, count in Counter(place.resolve() for place in places).items():
        if count > 1:
            raise ArgumentError(f"ddiff report: {place} was given twice. Give each run once.")
    runs = [ReportedRun.read(place, number) for number, place in enumerate(places)]
    counts = Counter(run.name for run in runs)
    return [run if counts[run.name] == 1 else replace(run, name=str(run.directory)) for run in runs]


def environment_of(run: ReportedRun) -> Mapping[str, Any]:
    """Return the recorded environment without the list of components."""
    found = dict(run.record.environment)
    found.pop("components", None)
    return found
