"""Comparison of a run's components and data with those that its checkpoints were trained with."""

from __future__ import annotations

from pathlib import Path

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.errors import CheckpointError
from ddiff.run_dir.identity import (
    DATA,
    Difference,
    check_fingerprints,
    check_noising,
    compare_fingerprints,
)
from ddiff.runs.build import Model, Overrides
from ddiff.runs.data import RunData
from ddiff.runs.noising import sample_noising


def component_fingerprints(data: RunData, model: Model) -> dict[str, str]:
    """Return the fingerprints of the tokenizer and the vocabulary, which a run saves as files."""
    return {
        "tokenizer": data.tokenizer.fingerprint,
        "vocabulary": model.vocabulary.fingerprint,
    }


def run_fingerprints(data: RunData, model: Model) -> dict[str, str]:
    """Return the fingerprints of components and data, as a checkpoint records them."""
    return component_fingerprints(data, model) | data.fingerprints()


def check_checkpoint(
    checkpoint: Checkpoint, data: RunData, model: Model, overrides: Overrides
) -> None:
    """Raise CheckpointError unless the checkpoint was trained with the components of this run."""
    run_dir = Path(data.recipe.run_dir)
    components = component_fingerprints(data, model)
    # the data are left out: loading a run must not need them
    check_fingerprints(
        run_dir,
        checkpoint.state,
        components,
        f"Restore the named files of {run_dir} from a copy; a run keeps those that it was "
        "trained with.",
        components,
    )
    remedy = "Install the version of the plugin that it was trained with, or train again."
    if overrides.process is not None:
        remedy = "Pass the process that it was trained with: ddiff.load(run_dir, process=...)."
    check_noising(run_dir, checkpoint.state, sample_noising(model.process), remedy)


def find_changed_data(newest: Checkpoint | None, data: RunData, model: Model) -> list[Difference]:
    """List the data that differ from those that the newest checkpoint was trained with."""
    if newest is None:
        return []
    recorded = newest.state.get("fingerprints", {})
    return compare_fingerprints(recorded, run_fingerprints(data, model), DATA)


def changed_data_error(run_dir: Path, changed: list[Difference]) -> CheckpointError:
    """Return the error for data that differ from those of the run; its message says what to do."""
    return CheckpointError(
        f"The data are not those that {run_dir} was trained and evaluated with: "
        f"{'; '.join(map(str, changed))}. Its figures would change though the model did not, text "
        "that was trained on may be scored, and the baselines count another corpus. Restore the "
        "files of [data]; or score the data as they are now, next to the run's own figures: "
        f"ddiff eval {run_dir} --out other_data.json (from Python, "
        "run.evaluate(changed_data=True))."
    )
