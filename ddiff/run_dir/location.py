"""Checks of the path of a run directory: local, writable, and outside of all checkpoints."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ddiff.errors import ArgumentError, CheckpointError
from ddiff.run_dir.files import CHECKPOINTS, RECIPE, REPLAY


def check_location(run_dir: str) -> None:
    """Raise an error if no run can be written to the directory `run_dir`.

    Raises ArgumentError for a URL and for a path inside a checkpoint. Raises CheckpointError if the
    directory is not writable.
    """
    _check_local(run_dir)
    check_writable(Path(run_dir))


def _check_local(run_dir: str) -> None:
    """Raise ArgumentError for a URL, or a path inside the checkpoints of a run."""
    if "://" in run_dir:
        raise ArgumentError(
            f"run_dir must be a directory of this machine; got the URL {run_dir}. Set a local "
            "directory (--set run_dir=...); remote storage must be mounted first."
        )
    run = find_enclosing_checkpoint(Path(run_dir).resolve())
    if run is not None:
        raise ArgumentError(
            f"run_dir must not be inside the checkpoints of a run; got {run_dir}, inside {run}. "
            "Set another directory: --set run_dir=..."
        )


def check_writable(directory: Path) -> None:
    """Raise CheckpointError if the directory is not writable. The check leaves no file behind."""
    places = (directory, *directory.absolute().parents)
    existing = next(place for place in places if os.path.exists(place))
    try:
        with tempfile.TemporaryDirectory(prefix=".ddiff-", dir=existing):
            pass
    except OSError as error:
        raise CheckpointError(
            f"run_dir must be a writable directory; got {directory}, but {existing} cannot be "
            f"written ({error.strerror}). Set another directory: --set run_dir=..."
        ) from error


def find_enclosing_checkpoint(path: Path) -> Path | None:
    """Find the checkpoint or folder of checkpoints that contains a resolved path.

    Returns None if the path is outside of all checkpoints.
    """
    for above in (path, *path.parents):
        if above.name in (CHECKPOINTS, REPLAY) and (above.parent / RECIPE).is_file():
            return above
        if above.name.startswith("step_") and (above / "complete.json").exists():
            return above
    return None
