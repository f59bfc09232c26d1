"""Findings of the judge of a text recipe on drawn samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ddiff.evaluation.judges import TEXT_FIELD, DrawnField, DrawnFields
from ddiff.run_dir.files import JUDGED
from ddiff.runs.findings import describe_findings
from ddiff.runs.record import write_run_file
from ddiff.runs.run import Run


def judge_texts(run: Run, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return what the judge of a text run finds on samples, as plain values.

    Returns None if the recipe has no judge.
    """
    judge = run.data.text.judge
    if judge is None:
        return None
    texts = [sample["text"] for sample in samples]
    drawn = DrawnFields(TEXT_FIELD, (TEXT_FIELD,), (), {TEXT_FIELD: DrawnField(texts)})
    return describe_findings(judge.judge(drawn))


def write_judged(run: Run, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Judge the samples of the recipe and write judged.json. Returns the content of the file.

    The content is empty, and no file is written, if the recipe has no judge.
    """
    findings = judge_texts(run, samples)
    if findings is None:
        return {}
    judged = {"step": run.step, "targets": {TEXT_FIELD: findings}}
    write_run_file(run.run_dir / JUDGED, json.dumps(judged, indent=2) + "\n")
    return judged
