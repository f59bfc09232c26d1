"""Comparison of a run's components and data with those that its checkpoints were trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.errors import CheckpointError
from ddiff.run_dir.identity import (
    DATA,
    Difference,
    check_fingerprints,
    check_noising,
    compare_fingerprints,
)
from ddiff.runs.noising import sample_noising

if TYPE_CHECKING:
    from ddiff.runs.run import Run


def component_fingerprints(run: Run) -> dict[str, str]:
    """Fingerprints of tokenizer and vocabulary, of which a run keeps files."""
    return {
        "tokenizer": run.tokenizer.fingerprint,
        "vocabulary": run.vocabulary.fingerprint,
    }


def run_fingerprints(run: Run) -> dict[str, str]:
    """Fingerprints of components and data, as a checkpoint records them."""
    return component_fingerprints(run) | run.data.fingerprints()


def check_checkpoint(run: Run, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the checkpoint was trained with the components of this run."""
    components = component_fingerprints(run)
    # the data are left out: loading a run must not need them
    check_fingerprints(
        run.run_dir,
        checkpoint.state,
        components,
        f"Restore the named files of {run.run_dir} from a copy; a run keeps those that it was "
        "trained with.",
        components,
    )
    remedy = "Install the version of the plugin that it was trained with, or train again."
    if run.overrides.process is not None:
        remedy = "Pass the process that it was trained with: ddiff.load(run_dir, process=...)."
    check_noising(run.run_dir, checkpoint.state, sample_noising(run.process), remedy)


def find_changed_data(run: Run) -> list[Difference]:
    """List the data that differ from those that the newest checkpoint was trained with."""
    newest = run.checkpoints.newest()
    if newest is None:
        return []
    recorded = newest.state.get("fingerprints", {})
    return compare_fingerprints(recorded, run_fingerprints(run), DATA)


def changed_data_error(run: Run, changed: list[Difference]) -> CheckpointError:
    """Explain that the data are not those of the run, and what to do."""
    return CheckpointError(
        f"The data are not those that {run.run_dir} was trained and evaluated with: "
        f"{'; '.join(map(str, changed))}. Its figures would change though the model did not, text "
        "that was trained on may be scored, and the baselines count another corpus. Restore the "
        "files of [data]; or score the data as they are now, next to the run's own figures: "
        f"ddiff eval {run.run_dir} --out other_data.json (from Python, "
        "run.evaluate(changed_data=True))."
    )
