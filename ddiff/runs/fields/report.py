"""Content of `evaluation.json` of a run of several fields, and the command `ddiff eval`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from ddiff.distributed.ranks import Ranks
from ddiff.run_dir.destination import Destination, write_text
from ddiff.run_dir.files import EVALUATION, read_json
from ddiff.run_dir.location import check_writable
from ddiff.runs.evaluation_header import describe_record
from ddiff.runs.fields.provenance import find_changed_data
from ddiff.runs.fields.run import FieldsRun
from ddiff.runs.fields.summary import print_bounds
from ddiff.runs.provenance import changed_data_error
from ddiff.runs.record import write_run_file

Report = Mapping[str, Any]
"""Content of evaluation.json."""


def evaluate_once(run: FieldsRun, ranks: Ranks) -> Report:
    """Evaluate a run and write evaluation.json.

    If evaluation.json already contains the evaluation of the same step with the same settings, the
    evaluation is not repeated, and the file is read. `ranks` divide the batches; only rank 0
    writes.
    """
    path = run.run_dir / EVALUATION
    # read by one process, because rank 0 may write the file before another rank reads it
    saved: Report = ranks.on_first(lambda: read_json(path))
    if saved and saved.items() >= describe_settings(run).items():
        return saved
    report = make_report(run, ranks=ranks)
    if ranks.is_first:
        write_run_file(path, _to_json(report))
    return report


def make_report(
    run: FieldsRun, changed_data: bool = False, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Evaluate a run on its validation samples and return the full content of evaluation.json.

    `changed_data`: whether the data may differ from the data of training. `ranks`: processes that
    divide the batches; None: only this process.
    """
    start = time.monotonic()
    found = run.evaluate(changed_data=changed_data, ranks=ranks)
    seconds = time.monotonic() - start
    targets = {name: bounds.to_dict() for name, bounds in found.items()}
    units = {}
    for name, values in run.values.items():
        units[name] = values.unit
        if values.normalizer is not None and values.normalizer.log_volume is None:
            # dimensions were dropped, so that a density of the data does not exist
            units[name] = "normalized number"
    report = {**describe_settings(run), "units": units, "targets": targets}
    return describe_record(run, report, run.fingerprints(), seconds) | report


def describe_settings(run: FieldsRun) -> dict[str, Any]:
    """Return everything that determines an evaluation: weights, settings and data."""
    keys = run.recipe.evaluate
    return {
        "step": run.step,
        "weights": "ema" if run.uses_ema else "trained",
        "protocol": {
            "targets": list(keys.targets),
            "path": run.recipe.evaluate_path.to_dict(),
            "unnamed": keys.unnamed,
            "deviation": keys.deviation,
            "controls": keys.controls,
            "samples": keys.samples,
            "draws": keys.draws,
            "seed": keys.seed,
            "data": run.data.documents.validation.fingerprint,
        },
    }


def reevaluate(run: FieldsRun, target: Destination | None, ranks: Ranks) -> Report:
    """Evaluate a loaded run again, write the results and print them.

    The results replace the content of evaluation.json, or are written to `target`. `ranks` divide
    the batches; only rank 0 writes and prints. Raises CheckpointError if the data differ from the
    data of training and `target` is None.
    """
    if target is None:
        check_writable(run.run_dir)  # before an evaluation that may take hours
    changed = ranks.on_first(lambda: find_changed_data(run))
    if changed and target is None:
        raise changed_data_error(run.run_dir, changed)
    report = make_report(run, changed_data=bool(changed), ranks=ranks)
    if not ranks.is_first:
        return report
    if changed:
        differences = [str(difference) for difference in changed]
        print(
            f"These results are for other data than the data of training of {run.run_dir} "
            f"({'; '.join(differences)}). Do not compare these results with evaluation.json.",
            file=sys.stderr,
        )
        report["changed_data"] = differences
    place = run.run_dir / EVALUATION
    if target is None:
        write_run_file(place, _to_json(report))
    else:
        write_text(target, _to_json(report))
    if run.recipe.train.ema:
        moving = "The exponential moving average of the weights:"
        print(moving if run.uses_ema else "The weights as they were trained:")
    print_bounds(report)
    print(f"Written to {place if target is None else target.name}")
    return report


def _to_json(report: Report) -> str:
    return json.dumps(report, indent=2) + "\n"
