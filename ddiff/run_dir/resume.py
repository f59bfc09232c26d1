"""Check that a run can resume with a changed recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ddiff.errors import CheckpointError

FREE_KEYS = (
    "run_dir",
    "train.checkpoint_every",
    "train.keep",
    "train.log_every",
    "evaluate.every",
    "sample.every",
)
"""Keys that do not change the trained weights, apart from those of [backend]."""

Change = tuple[str, Any, Any]
"""Dotted key, old value, new value."""


def check_resumable(directory: Path, changed: Iterable[Change], replaced: Iterable[Change]) -> None:
    """Raise CheckpointError if a trained run cannot resume with the present recipe.

    A run can resume if the recipes differ only in `FREE_KEYS`, in the table [backend], and in a
    larger number [train] steps.

    Args:
        directory: directory of the run.
        changed: keys whose values differ between the recorded and the present recipe.
        replaced: components passed from Python that differ between the recorded run and this run.
    """
    refused = []
    for key, old, new in changed:
        if not _may_change(key, old, new):
            refused.append((key, old, new))
    for key, old, new in replaced:
        refused.append((f"given {key}", old, new))
    if refused:
        raise CheckpointError(_explain_changes(directory, refused))


def _may_change(key: str, old: Any, new: Any) -> bool:
    """Return True if a run can resume with the new value of this key."""
    if key == "train.steps":
        return isinstance(old, int) and new >= old
    return key in FREE_KEYS or key.startswith("backend.")


def _explain_changes(directory: Path, changed: Sequence[Change]) -> str:
    if [key for key, _, _ in changed] == ["train.steps"]:
        _, old, new = changed[0]
        return (
            f"{directory} is a run of {old} steps (train.steps: was {old}, is {new}). To resume, "
            f"set train.steps >= {old}. To use its newest checkpoint, call "
            f"`ddiff eval {directory}`, `ddiff sample {directory}` or "
            f'ddiff.load("{directory}"). To start over, use `ddiff run` with --fresh.'
        )
    lines = "\n".join(f"  {key}: was {old!r}, is {new!r}" for key, old, new in changed)
    tables = {key.split(".")[0] for key, _, _ in changed}
    if tables <= {"evaluate", "sample"}:
        remedy = (
            "These keys do not affect training. To use other settings, call "
            f"`ddiff eval {directory} --set ...` or `ddiff sample {directory} --set ...`. To make "
            "a separate run, use --set name=..."
        )
    else:
        remedy = (
            "Give the new run another name (--set name=...), or delete the trained run and start "
            "over with `ddiff run` and --fresh. On resuming, train.steps may grow, and [backend] "
            f"and {', '.join(FREE_KEYS[1:])} may change."
        )
    return f"{directory} was made with another recipe. Changed keys:\n{lines}\n{remedy}"
