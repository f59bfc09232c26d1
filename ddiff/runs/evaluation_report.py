"""Content of `evaluation.json`, and the command `ddiff eval`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ddiff.distributed.ranks import Ranks, connect_ranks
from ddiff.errors import ArgumentError
from ddiff.evaluation.baselines import Baselines
from ddiff.evaluation.likelihood import Evaluation
from ddiff.evaluation.protocols import find_program, find_protocol
from ddiff.run_dir.destination import Destination, check_destination, write_text
from ddiff.run_dir.files import EVALUATION, damage_error, name_of_clock, read_json
from ddiff.run_dir.identity import Difference
from ddiff.run_dir.location import check_writable
from ddiff.runs.evaluation_header import describe_record
from ddiff.runs.kinds import EvaluationOptions, find_kind
from ddiff.runs.loading import load
from ddiff.runs.provenance import changed_data_error, find_changed_data
from ddiff.runs.record import write_run_file
from ddiff.runs.run import Run
from ddiff.runs.summary import print_evaluation
from ddiff.runs.text_bytes import describe_bytes


@dataclass(frozen=True)
class EvaluationReport:
    """Result of an evaluation, and the baselines on the same tokens.

    `written` is the content of evaluation.json as a dict.
    """

    evaluation: Evaluation
    baselines: Baselines
    written: Mapping[str, Any]

    def to_json(self) -> str:
        return json.dumps(self.written, indent=2) + "\n"


def evaluate_once(run: Run, ranks: Ranks) -> EvaluationReport:
    """Evaluate a run and write evaluation.json.

    If evaluation.json already contains the evaluation of the same step with the same settings, the
    evaluation is not repeated, and the file is read. `ranks` divide the batches; only rank 0
    writes.
    """
    path = run.run_dir / EVALUATION

    def read_saved() -> EvaluationReport | None:
        saved = read_json(path)
        return _read_report(run, path, saved) if saved else None

    # decided by one process, because rank 0 may write the file before another rank reads it
    report = ranks.on_first(read_saved)
    if report is None:
        report = make_report(run, ranks=ranks)
        if ranks.is_first:
            write_run_file(path, report.to_json())
    return report


def _read_report(run: Run, path: Path, saved: Mapping[str, Any]) -> EvaluationReport | None:
    """Return the evaluation in `saved`, the content of evaluation.json at `path`.

    Returns None if the step or the settings of the evaluation differ from those of the run.
    """
    wanted, protocol = _settings(run)
    # other keys, such as the batch size or the version, do not change the figures
    found = {**saved, **saved["protocol"]}
    if not found.items() >= {**wanted, **protocol}.items():
        return None
    try:
        evaluation = Evaluation.from_dict(saved)
        # by name, since a program that rewrites the file may change the order of the keys
        unit = f"per_{evaluation.unit}"
        baselines = saved["baselines"].items()
        counted = Baselines(**{name.replace(unit, "per_token"): value for name, value in baselines})
    except (KeyError, TypeError) as error:
        raise damage_error(path, f"a figure of the evaluation is missing ({error})") from error
    return EvaluationReport(evaluation, counted, saved)


def make_report(
    run: Run,
    changed_data: bool = False,
    until: float | None = None,
    ranks: Ranks | None = None,
) -> EvaluationReport:
    """Evaluate a run on its validation text and return the full content of evaluation.json.

    Args:
        run: the run.
        changed_data: whether the data may differ from the data of training.
        until: draws are added until the half width of the Monte-Carlo interval is at most this;
            None: [evaluate] draws.
        ranks: processes that divide the batches; None: only this process.
    """
    wanted, protocol = _settings(run)
    if run.clock_source != "recipe":
        protocol["clock"] = run.clock_source
    if until is not None:
        del protocol["draws"]  # the evaluation decides
    start = time.monotonic()
    evaluation, counted = run.evaluate(changed_data=changed_data, until=until, ranks=ranks)
    seconds = time.monotonic() - start
    figures = evaluation.to_dict()
    unit = f"per_{evaluation.unit}"
    baselines = {
        name.replace("per_token", unit): value for name, value in counted._asdict().items()
    }
    written = {
        **wanted,
        **figures,
        "protocol": {**figures["protocol"], **protocol},
        "baselines": baselines,
        "bytes": describe_bytes(evaluation, has_texts=run.data.validation_texts is not None),
        f"entropy_rate_nats_{unit}": run.data.documents.entropy_rate,
    }
    if warning := find_impossible(evaluation, run.data.documents.entropy_rate):
        written["warning"] = warning
    header = describe_record(run, written, run.fingerprints(), seconds)
    return EvaluationReport(evaluation, counted, header | written)


def _settings(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the inputs of an evaluation as two dicts.

    - The step and the weights ("ema" or "trained") that are evaluated.
    - The settings of the evaluation.
    """
    keys = run.recipe.evaluate
    wanted = {"step": run.step, "weights": "ema" if run.uses_ema else "trained"}
    return wanted, {"draws": keys.draws, "seed": keys.seed, **run.protocol()}


# ---------------------------------------------------------------------- ddiff eval


def evaluate_run(
    run_dir: str | Path,
    settings: Iterable[str] = (),
    out: str | Path | None = None,
    options: EvaluationOptions | None = None,
) -> Any:
    """Run `ddiff eval`: evaluate a trained run again and write the results.

    `settings` are `key=value` texts that override keys of [evaluate]. The results replace the
    content of evaluation.json, or are written to the JSON file `out`. Results on other data, which
    `options` names, never replace evaluation.json. Raises CheckpointError if the data differ from
    the data of training and `out` is None.
    """
    options = options or EvaluationOptions()
    _check_options(options)
    target = None
    if out is not None:
        target = check_destination(out, "ddiff eval --out", suffix=".json", owned=_is_evaluation)
    with connect_ranks() as ranks:
        run = load(run_dir, settings=settings, clock=options.clock)
        return find_kind(run.recipe).evaluate(run, target, options, ranks)


def _check_options(options: EvaluationOptions) -> None:
    if options.protocol is not None:
        find_protocol(options.protocol)
    if options.program is not None:
        find_program(options.program)
        if not options.published:
            raise ArgumentError(
                f"ddiff eval --program {options.program}: names the published program that "
                "--published repeats. Give --published too, or remove --program."
            )
    if not options.data and (options.protocol is not None or options.published):
        name = "--published" if options.published else f"--protocol {options.protocol}"
        raise ArgumentError(
            f"ddiff eval {name}: expected the text in --data; got none. Name the text files, such "
            "as --data test.txt."
        )
    if not options.data and options.split != "file":
        raise ArgumentError(
            f"ddiff eval --split {options.split}: expected text files in --data, which are split "
            "into documents; got none. The documents of the validation text are those of [data]."
        )
    if options.clock != "recipe" and options.data:
        raise ArgumentError(
            f"ddiff eval --clock {options.clock}: the found clock is evaluated on the validation "
            "text of the run, so --data must be left out."
        )
    if options.until is not None and not 0.0 < options.until < math.inf:
        raise ArgumentError(
            "ddiff eval --until: half the width of the Monte-Carlo interval in nats per token must "
            f"be positive and finite, such as 0.002; got {options.until}."
        )


def reevaluate(
    run: Run,
    target: Destination | None,
    until: float | None,
    ranks: Ranks,
) -> Evaluation:
    """Evaluate a loaded text run again, write the results and print them (see `evaluate_run`).

    `ranks` divide the batches; only rank 0 writes and prints. The results with another clock than
    that of the recipe are written to evaluation-SOURCE-clock.json.
    """
    name = name_of_clock(EVALUATION, run.clock_source)
    if target is None:
        check_writable(run.run_dir)  # before an evaluation that may take hours
    changed = ranks.on_first(lambda: _find_changes(run))
    if changed and target is None:
        raise changed_data_error(run.run_dir, changed)
    report = make_report(run, changed_data=bool(changed), until=until, ranks=ranks)
    if not ranks.is_first:
        return report.evaluation
    if changed:
        report = _mark_changed(run, report, changed)
    place = _write_report(run.run_dir / name, report, target)
    print_weights(run)
    print_evaluation(report.evaluation, report.baselines, run.data.documents.entropy_rate)
    print_remarks(report.evaluation, report.written, until)
    print(f"Written to {place}")
    return report.evaluation


def print_weights(run: Run) -> None:
    """Print whether the evaluated weights are the moving average or those of training."""
    if run.recipe.train.ema:
        moving = "The exponential moving average of the weights:"
        print(moving if run.uses_ema else "The weights as they were trained:")


def print_remarks(evaluation: Evaluation, written: Mapping[str, Any], until: float | None) -> None:
    """Print whether the interval is as narrow as `until`, and print a warning of the record."""
    interval = evaluation.monte_carlo_interval
    draws = evaluation.protocol["draws"]
    if until is not None and interval is not None:
        half = (interval[1] - interval[0]) / 2
        reached = "" if half <= until else f", the upper limit; --until {until} was not reached"
        print(f"Monte-Carlo interval ± {half:.2g} after {draws} draws{reached}")
    if "warning" in written:
        print(written["warning"], file=sys.stderr)


def find_impossible(evaluation: Evaluation, entropy_rate: float | None) -> str | None:
    """Return a warning if the result is significantly below the entropy of the source.

    Significantly means by more than two half widths of the 95 % interval, about four standard
    errors. Returns None for a possible result, and if entropy or interval are unknown.
    """
    if entropy_rate is None or evaluation.interval is None:
        return None
    low, high = evaluation.interval
    mean = evaluation.nelbo_nats_per_token
    if mean + (high - low) >= entropy_rate:
        return None
    return (
        f"Impossible result: the {evaluation.bound} of {mean:.4f} nats per {evaluation.unit} is "
        f"below the entropy rate {entropy_rate:.4f} of the source, which no model can reach. The "
        "process or the objective does not compute a bound; check them with `ddiff check`."
    )


def _is_evaluation(file: IO[bytes]) -> bool:
    """Return True if a file contains results that `ddiff eval` wrote."""
    try:
        found = json.load(file)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"step", "weights", "protocol"} <= found.keys()


def _find_changes(run: Run) -> list[Difference]:
    """List the data whose fingerprints differ from those in the checkpoint or evaluation.json."""
    changed = find_changed_data(run.checkpoints.newest(), run.data, run.model)
    if any(difference.key == "validation rows" for difference in changed):
        return changed
    saved = read_json(run.run_dir / EVALUATION, allow_missing=True)
    recorded = saved.get("protocol", {}).get("data")
    if isinstance(recorded, str):
        was = recorded.partition(",")[0]  # after the comma: the number of evaluated rows
        now = run.data.validation_rows.fingerprint
        if was != now:
            changed.append(Difference("validation rows", was, now))
    return changed


def _mark_changed(
    run: Run, report: EvaluationReport, changed: list[Difference]
) -> EvaluationReport:
    """Warn that the data have changed since training or evaluation, and record the changes.

    `changed` lists the data with their fingerprints. The returned report contains this list.
    """
    differences = [str(difference) for difference in changed]
    print(
        f"These results are for other data than the data of training and evaluation of "
        f"{run.run_dir} ({'; '.join(differences)}). Do not compare these results with "
        "evaluation.json. The evaluated text may be part of the training text.",
        file=sys.stderr,
    )
    written = {**report.written, "changed_data": differences}
    return EvaluationReport(report.evaluation, report.baselines, written)


def _write_report(path: Path, report: EvaluationReport, target: Destination | None) -> str:
    """Write the results to `target`, or by default to `path`. Return the name of the file."""
    if target is not None:
        write_text(target, report.to_json())
        return target.name
    write_run_file(path, report.to_json())
    return str(path)
