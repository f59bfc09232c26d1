"""Results of a finished run for its tracker: figures, samples, pictures and report."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddiff.plugin.registry import describe_error
from ddiff.run_dir.evaluation_record import Figure
from ddiff.run_dir.files import (
    EVALUATION,
    GENERATION,
    JUDGED,
    OTHER_EVALUATIONS,
    OTHER_GENERATIONS,
    PICTURES,
    SAMPLES,
    TRACKED,
    evaluation_record,
    generation_record,
    read_json,
    read_json_lines,
)
from ddiff.runs.record import write_run_file
from ddiff.runs.trainable import TrainableRun
from ddiff.training.protocols import ResultTracker, RunResults, Tracker

REPORT = "report.html"
"""Report of the run, if the user wrote it into the run directory with `ddiff report --out`."""


def send_results(run: TrainableRun, tracker: Tracker) -> None:
    """Log the results of a run to its tracker, unless they were logged before.

    The digests of the logged files are written to tracked.json. An error of the tracker is printed
    and not raised, because the results themselves are in the run directory.
    """
    if not isinstance(tracker, ResultTracker):
        return
    state = describe_files(run.run_dir, run.recipe.tracker.component.name)
    record = run.run_dir / TRACKED
    if record.exists() and record.read_text(encoding="utf-8") == state:
        return
    try:
        tracker.log_results(run.step, read_results(run.run_dir, run.step))
    except Exception as error:  # any error of a service or of a plugin
        print(
            f"The results were not logged to the tracker: {describe_error(error)}. They are in "
            f"{run.run_dir}. The same command logs them again.",
            file=sys.stderr,
        )
        return
    write_run_file(record, state)


def describe_files(run_dir: Path, tracker: str) -> str:
    """Return the content of tracked.json: the kind of the tracker, and the digest of each file."""
    digests = {}
    for path in _list_files(run_dir):
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return json.dumps({"tracker": tracker, "files": digests}, indent=2) + "\n"


def _list_files(run_dir: Path) -> Iterator[Path]:
    """Yield the files with results that exist in a run directory."""
    records = (EVALUATION, OTHER_EVALUATIONS, GENERATION, OTHER_GENERATIONS, JUDGED)
    for pattern in (*records, SAMPLES, PICTURES, REPORT):
        yield from sorted(run_dir.glob(pattern))


def read_results(run_dir: Path, step: int) -> RunResults:
    """Read the results of a run for the weights of a step. Results of other steps are left out."""
    report = run_dir / REPORT
    samples = [
        _flatten_sample(sample)
        for sample in read_json_lines(run_dir / SAMPLES)
        if sample["step"] == step
    ]
    return RunResults(
        figures=dict(_read_figures(run_dir, step)),
        samples=_fill_keys(samples),
        pictures=sorted(run_dir.glob(PICTURES)),
        report=report if report.is_file() else None,
    )


def _read_figures(run_dir: Path, step: int) -> Iterator[tuple[str, float]]:
    """Yield the name and the value of each figure of a step, and the ends of its interval."""
    for path in (run_dir / EVALUATION, *sorted(run_dir.glob(OTHER_EVALUATIONS))):
        found = read_json(path)
        if found and found["step"] == step:
            yield from _list_values(path.stem, evaluation_record(found, path).figures)
    for path in (run_dir / GENERATION, *sorted(run_dir.glob(OTHER_GENERATIONS))):
        found = read_json(path)
        if found and found["step"] == step:
            yield from _list_values(path.stem, generation_record(found, path).figures)
    judged = read_json(run_dir / JUDGED)
    if judged and judged["step"] == step:
        for target, findings in judged["targets"].items():
            for finding in findings:
                yield f"judged/{target}/{finding['name']}", finding["value"]


def _list_values(prefix: str, figures: Mapping[str, Figure]) -> Iterator[tuple[str, float]]:
    for name, figure in figures.items():
        yield f"{prefix}/{name}", figure.value
        if figure.interval is not None:
            yield f"{prefix}/{name}/low", figure.interval[0]
            yield f"{prefix}/{name}/high", figure.interval[1]


def _flatten_sample(sample: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Return the numbers and texts of a sample. Token ids and vectors are left out."""
    cells: dict[str, int | float | str] = {}
    for key, value in sample.items():
        if key == "fields":
            for name, field in value.items():
                if "text" in field:
                    cells[f"fields.{name}"] = field["text"]
        elif key == "given":
            cells[key] = ", ".join(value)
        elif _is_cell(value):
            cells[key] = value
    return cells


def _is_cell(value: object) -> bool:
    return isinstance(value, int | float | str)


def _fill_keys(
    samples: Sequence[Mapping[str, int | float | str]],
) -> list[Mapping[str, int | float | str]]:
    """Give every sample the keys of all samples, with an empty text for a missing value."""
    keys: dict[str, int | float | str] = {}
    for sample in samples:
        keys |= dict.fromkeys(sample, "")
    return [{**keys, **sample} for sample in samples]
