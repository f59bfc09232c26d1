"""Comparison of the components and data of a run of several fields with its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.run_dir.identity import (
    Difference,
    check_fingerprints,
    check_noising,
    compare_fingerprints,
)
from ddiff.runs.provenance import changed_data_error

if TYPE_CHECKING:
    from ddiff.runs.fields.run import FieldsRun


def check_components(run: FieldsRun, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a checkpoint was trained with components other than the run's.

    The compared components are tokenizers, vocabularies, normalizers and forward processes. The
    forward processes are compared by some of their numbers.
    """
    components = run.data.component_fingerprints()
    # the data are not compared, because a run must be loadable without its data
    check_fingerprints(
        run.run_dir,
        checkpoint.state,
        components,
        f"Restore the named files of {run.run_dir} from a copy; a run must keep the files from its "
        "training.",
        components,
    )
    remedy = "Install the version of the plugin that trained the run, or train again."
    check_noising(run.run_dir, checkpoint.state, run.noising(), remedy)


def find_changed_data(run: FieldsRun) -> list[Difference]:
    """List the data whose fingerprints differ from the record in the newest checkpoint."""
    newest = run.checkpoints.newest()
    if newest is None:
        return []
    components = run.data.component_fingerprints()
    now = run.fingerprints()
    names = [name for name in now if name not in components]
    return compare_fingerprints(newest.state.get("fingerprints", {}), now, names)


def check_changed_data(run: FieldsRun) -> None:
    """Raise CheckpointError if the data differ from the data of training."""
    changed = find_changed_data(run)
    if changed:
        raise changed_data_error(run.run_dir, changed)
