"""Comparison of the components and data of a run with the record in its checkpoints."""

from __future__ import annotations

from pathlib import Path

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.errors import CheckpointError
from ddiff.nn.adapters import fingerprint_base
from ddiff.run_dir.identity import (
    DATA,
    Difference,
    check_fingerprints,
    check_noising,
    compare_fingerprints,
)
from ddiff.runs.build import Model, Overrides
from ddiff.runs.data import RunData
from ddiff.runs.initial_weights import explain_base
from ddiff.runs.noising import sample_noising

BASE = "base weights"
"""Name of the fingerprint of the frozen weights to which adapters belong."""


def component_fingerprints(data: RunData, model: Model) -> dict[str, str]:
    """Return the fingerprints of tokenizer, vocabulary and, with adapters, their base."""
    found = {
        "tokenizer": data.tokenizer.fingerprint,
        "vocabulary": model.vocabulary.fingerprint,
    }
    if model.denoiser.adapters is not None:
        found[BASE] = fingerprint_base(model.denoiser)
    return found


def run_fingerprints(data: RunData, model: Model) -> dict[str, str]:
    """Return the fingerprints of tokenizer, vocabulary and data for a checkpoint."""
    return component_fingerprints(data, model) | data.fingerprints()


def check_checkpoint(
    checkpoint: Checkpoint, data: RunData, model: Model, overrides: Overrides
) -> None:
    """Raise CheckpointError if a checkpoint was trained with components other than the run's.

    The compared components are the tokenizer, the vocabulary and the forward process. The forward
    process is compared by some of its probabilities. `overrides` are the components that a Python
    caller passed in place of those of the recipe.
    """
    run_dir = Path(data.recipe.run_dir)
    components = component_fingerprints(data, model)
    if BASE in components:
        check_fingerprints(
            run_dir,
            checkpoint.state,
            components,
            f"The adapters were trained with other base weights. {explain_base(data.recipe)}",
            [BASE],
        )
    # the data are not compared, because a run must be loadable without its data
    check_fingerprints(
        run_dir,
        checkpoint.state,
        components,
        f"Restore the named files of {run_dir} from a copy; a run must keep the files from its "
        "training.",
        components,
    )
    remedy = "Install the version of the plugin that trained the run, or train again."
    if overrides.process is not None:
        remedy = "Pass the process from the training: ddiff.load(run_dir, process=...)."
    check_noising(run_dir, checkpoint.state, sample_noising(model.process), remedy)


def find_changed_data(newest: Checkpoint | None, data: RunData, model: Model) -> list[Difference]:
    """List the data whose fingerprints differ from the record in the newest checkpoint."""
    if newest is None:
        return []
    recorded = newest.state.get("fingerprints", {})
    return compare_fingerprints(recorded, run_fingerprints(data, model), DATA)


def changed_data_error(run_dir: Path, changed: list[Difference]) -> CheckpointError:
    """Return the CheckpointError for data that differ from the data of training."""
    return CheckpointError(
        f"The data differ from the data that {run_dir} was trained and evaluated with: "
        f"{'; '.join(map(str, changed))}. The results would not be comparable, and the evaluation "
        "could include training text. Restore the files of [data]. To evaluate the current data "
        f"and keep the results of the run, call ddiff eval {run_dir} --out other_data.json, or "
        "run.evaluate(changed_data=True) in Python."
    )
