"""The command `ddiff report`: draw or read trajectories, and write the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ddiff.errors import ArgumentError
from ddiff.run_dir.files import CHECKPOINTS
from ddiff.runs.report.page import check_report_path, write_report
from ddiff.runs.report.run_files import ReportedRun, read_runs
from ddiff.runs.report.trajectories import AnyTrajectory, read_trajectories


def report_runs(
    run_dirs: Sequence[Path],
    out: str,
    figures: str | None = None,
    files: Sequence[Path] = (),
    draws: int = 2,
    samplers: Sequence[str] = (),
) -> list[Path]:
    """Write the report of runs, and return the paths of all written files.

    Args:
        run_dirs: directories of the runs.
        out: HTML file to write.
        figures: folder for the charts as SVG files, or None.
        files: files of trajectories. If there are some, no trajectories are drawn.
        draws: number of samples per run whose trajectories are drawn.
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
    trajectories: list[AnyTrajectory] = []
    for file in files:
        trajectories += read_trajectories(file)
    if not files and draws:
        trajectories = _draw(runs, draws, samplers)
    return write_report(run_dirs, out, trajectories, figures)


def _draw(runs: Sequence[ReportedRun], draws: int, samplers: Sequence[str]) -> list[AnyTrajectory]:
    """Draw trajectories of the runs that have a checkpoint.

    `samplers` are for text runs; a run of several fields has the samplers of its recipe.
    """
    found: list[AnyTrajectory] = []
    for run in runs:
        if not _is_trained(run.directory):
            continue
        # imported here, because a report without trajectories needs no torch
        from ddiff.runs.loading import load

        loaded = load(run.directory)
        drawn: Sequence[AnyTrajectory]
        if run.has_fields:
            from ddiff.runs.fields.trajectory import draw_trajectories as draw_fields

            drawn = draw_fields(loaded, draws)
        else:
            from ddiff.runs.trajectory import draw_trajectories

            drawn = draw_trajectories(loaded, draws, samplers or [None])
        for trajectory in drawn:
            # the name in the report, which differs from the other names
            found.append(replace(trajectory, run=run.name))
    return found


def _is_trained(directory: Path) -> bool:
    return (directory / CHECKPOINTS).is_dir()
