"""The command `ddiff report`: draw or read trajectories, and write the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ddiff.errors import ArgumentError, DataError
from ddiff.run_dir.files import CHECKPOINTS
from ddiff.runs.report.extras import Extras
from ddiff.runs.report.formulas import read_explanations
from ddiff.runs.report.page import check_report_path, write_report
from ddiff.runs.report.run_files import ReportedRun, read_runs
from ddiff.runs.report.trajectories import AnyTrajectory, read_trajectories


def report_runs(
    run_dirs: Sequence[str | Path],
    out: str,
    figures: str | None = None,
    files: Sequence[str | Path] = (),
    draws: int = 2,
    samplers: Sequence[str] = (),
) -> list[Path]:
    """Write the report of runs, and return the paths of all written files.

    Args:
        run_dirs: directories of the runs.
        out: HTML file to write.
        figures: folder for the charts as SVG and PNG files, or None.
        files: files of trajectories. If there are some, no trajectories are drawn.
        draws: number of samples per run whose trajectories are drawn. With 0, only files are read:
            the report has no trajectories, confusions or formulas.
        samplers: samplers that draw the trajectories; none for the sampler of the recipe.
    """
    # before trajectories are drawn, which takes a while
    check_report_path(out)
    runs = read_runs(run_dirs)
    if files and samplers:
        raise ArgumentError(
            "ddiff report: --sampler draws new trajectories, and --trajectory reads a file of "
            "trajectories. Leave one of the options out."
        )
    given: list[AnyTrajectory] = []
    for file in files:
        given += read_trajectories(Path(file))
    extras = Extras(given)
    if draws:
        extras = _compute(runs, given, draws, samplers)
    return write_report(run_dirs, out, extras, figures)


def _compute(
    runs: Sequence[ReportedRun],
    given: Sequence[AnyTrajectory],
    draws: int,
    samplers: Sequence[str],
) -> Extras:
    """Compute the parts of a report that need torch, for the runs that have a checkpoint.

    If trajectories are `given`, no others are drawn. `samplers` are for text runs; a run of several
    fields has the samplers of its recipe.
    """
    # imported here, because a report without these parts needs no torch
    from ddiff.runs.confusion import measure_confusion
    from ddiff.runs.fields.trajectory import draw_trajectories as draw_fields
    from ddiff.runs.loading import load
    from ddiff.runs.trajectory import draw_trajectories

    trajectories = list(given)
    confusions = {}
    for run in runs:
        if not _is_trained(run.directory):
            continue
        loaded = load(run.directory)
        if not run.has_fields:
            with suppress(DataError):  # the text of the run may not be on this machine
                confusions[run.number] = measure_confusion(loaded)
        if given:
            continue
        drawn: Sequence[AnyTrajectory]
        if run.has_fields:
            drawn = draw_fields(loaded, draws)
        else:
            drawn = draw_trajectories(loaded, draws, samplers or [None])
        for trajectory in drawn:
            # the name in the report, which differs from the other names
            trajectories.append(replace(trajectory, run=run.name))
    explanations = {run.number: read_explanations(run) for run in runs}
    return Extras(trajectories, confusions, explanations)


def _is_trained(directory: Path) -> bool:
    return (directory / CHECKPOINTS).is_dir()
