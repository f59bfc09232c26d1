"""Start of a command on a trained run in several processes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer

from ddiff.distributed.launcher import get_rank_info, launch
from ddiff.run_dir.files import RECIPE


def launch_for_run(context: typer.Context, run_dir: Path, processes: int | None) -> None:
    """Run the command of `context` in the processes of a run, and exit with their exit code.

    `processes`: number of processes; None: [backend] processes of the run. Returns without effect
    for one process, and in a process that was launched.
    """
    if get_rank_info() is not None:
        return
    wanted = _read_processes(run_dir) if processes is None else processes
    if wanted == 1:
        return
    arguments: list[str] = context.find_root().obj
    raise typer.Exit(launch(arguments, wanted))


def _read_processes(run_dir: Path) -> int:
    """Return the number of processes that trained a run.

    Returns 1 if the recipe of the run cannot be read. The command then explains why.
    """
    try:
        # read without the plugins of the recipe, which would take seconds
        tree: dict[str, Any] = tomllib.loads((run_dir / RECIPE).read_text(encoding="utf-8"))
        processes = tree["backend"]["processes"]
    except (OSError, ValueError, KeyError, TypeError):
        return 1
    return processes if isinstance(processes, int) and processes > 1 else 1
