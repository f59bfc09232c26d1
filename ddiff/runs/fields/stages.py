"""Stages of runs of several fields: build, load, evaluate, sample and judge."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.core.process import ForwardProcess
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.run_dir.files import (
    JUDGED,
    SAMPLES,
    SAMPLING,
    read_json,
    read_json_lines,
)
from ddiff.runs.backends import build_single_backend
from ddiff.runs.build import Overrides
from ddiff.runs.fields.build import assemble_fields, build_joint_denoiser_on_meta, shapes_of
from ddiff.runs.fields.data import RunFields
from ddiff.runs.fields.grids import write_grids
from ddiff.runs.fields.judging import judge_samples
from ddiff.runs.fields.memory import check_memory
from ddiff.runs.fields.report import evaluate_once
from ddiff.runs.fields.run import FieldsRun
from ddiff.runs.fields.sampling import DrawnSamples, FieldsRequest, draw_fields
from ddiff.runs.fields.summary import print_summary
from ddiff.runs.findings import describe_findings
from ddiff.runs.record import write_run_file
from ddiff.training.protocols import Backend
from ddiff.training.settings import TrainingSummary


def build_run(recipe: FieldsRecipe, backend: Backend, overrides: Overrides) -> FieldsRun:
    """Build the data, the components and the untrained model of a run.

    Raises an error before a file is written if the components do not fit the data, or if the memory
    is too small.
    """
    given = overrides.to_dict()
    if given:
        raise ArgumentError(
            f"ddiff.run: {next(iter(given))} replaces a component of a text recipe; the recipe "
            f"{recipe.name} has several fields. Set the component in [fields.NAME]."
        )
    # rank 0 fits tokenizers and normalizers first; the other ranks then read them from the cache
    with backend.main_process_first():
        data = RunFields(recipe)
        data.read()
    if backend.rank == 0:
        for line in describe_missing(data):
            print(line, file=sys.stderr)
    shapes = shapes_of(data.fields)
    denoiser = build_joint_denoiser_on_meta(recipe, shapes)
    check_memory(recipe, shapes, denoiser, backend.device)
    return FieldsRun(recipe, assemble_fields(recipe, shapes, backend.device), data)


def describe_missing(data: RunFields) -> list[str]:
    """Return one line for each part of the data and each field that some samples lack."""
    lines = []
    parts = (("training", data.documents.train), ("validation", data.documents.validation))
    for part, table in parts:
        for name, count in table.missing().items():
            if count:
                lines.append(f"{count:,} of {len(table):,} {part} samples lack {name}")
    return lines


def load_run(
    recipe: FieldsRecipe,
    directory: Path,
    newest: Checkpoint,
    process: ForwardProcess | None,
) -> FieldsRun:
    """Build the run in `directory` from its files, with the weights of a checkpoint."""
    if process is not None:
        raise ArgumentError(
            "ddiff.load: process replaces the process of a text recipe; the run in "
            f"{directory} has several fields. Leave the argument out."
        )
    data = RunFields(recipe, directory)
    device = build_single_backend(recipe).device
    model = assemble_fields(recipe, shapes_of(data.fields), device)
    run = FieldsRun(recipe, model, data)
    run.check_checkpoint(newest)
    run.load_weights(newest)
    return run


# ---------------------------------------------------------------------- after training


def after_training(run: FieldsRun, summary: TrainingSummary, ranks: Ranks) -> None:
    """Evaluate, sample, judge and print the summary.

    `ranks` divide the evaluation and the sampling; only rank 0 judges, prints and writes.
    """
    report = evaluate_once(run, ranks)
    samples, judged = _sample_once(run, ranks)
    if not ranks.is_first:
        return
    written = ["evaluation.json", "samples.jsonl"]
    written += sorted(path.name for path in run.run_dir.glob("samples-*.png"))
    if judged:
        written.append(JUDGED)
    written += ["metrics.jsonl", "checkpoints/", "fields/", "recipe.toml"]
    print_summary(run, summary, report, samples, judged, written)


def _sample_once(run: FieldsRun, ranks: Ranks) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """Draw and judge the samples of the recipe, and write samples.jsonl and judged.json.

    If the files already contain the samples of the newest step, the files are read instead. Only
    rank 0 judges and returns the samples.
    """
    # decided by one process, because rank 0 may write the files before another rank reads them
    found = ranks.on_first(lambda: _read_samples(run))
    if found is not None:
        return found
    began = time.monotonic()
    drawn = [
        draw_fields(run.recipe, run.model, run.data, FieldsRequest(target=target), ranks=ranks)
        for target in run.recipe.sample.targets
    ]
    seconds = time.monotonic() - began
    return _write_samples(run, drawn, seconds) if ranks.is_first else ([], {})


def _read_samples(run: FieldsRun) -> tuple[list[dict[str, Any]], Mapping[str, Any]] | None:
    """Return samples and findings in the run directory; None unless all are of the newest step."""
    path = run.run_dir / SAMPLES
    keys = run.recipe.sample
    step = run.step
    saved = read_json_lines(path)
    judged = read_json(run.run_dir / JUDGED)
    is_complete = len(saved) == keys.count * len(keys.targets)
    is_judged = run.recipe.judge is None or judged.get("step") == step
    is_timed = read_json(run.run_dir / SAMPLING).get("step") == step
    is_new = is_complete and is_timed and all(sample.get("step") == step for sample in saved)
    return (saved, judged) if is_new and is_judged else None


def _write_samples(
    run: FieldsRun, drawn: Sequence[DrawnSamples], seconds: float
) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """Write samples, pictures and findings. Return the samples and the findings."""
    step = run.step
    directory = run.run_dir
    judged: dict[str, Any] = {}
    if run.recipe.judge is not None:
        targets = {}
        judge = run.recipe.judge.build(documents=run.data.documents)
        for each in drawn:
            findings = judge_samples(judge, run.data, each)
            targets[str(each.target)] = describe_findings(findings)
        judged = {"step": step, "targets": targets}
        write_run_file(directory / JUDGED, json.dumps(judged, indent=2) + "\n")
    samples = []
    for each in drawn:
        write_grids(run.data, each, directory)
        samples += [{"step": step, **sample} for sample in each.to_dicts()]
    figures = {
        "step": step,
        "seconds": seconds,
        "samples": len(samples),
        "steps": run.recipe.sample.steps,
    }
    write_run_file(directory / SAMPLING, json.dumps(figures) + "\n")
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    write_run_file(directory / SAMPLES, "".join(lines))
    return samples, judged
