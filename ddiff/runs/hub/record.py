"""Record of a run in the folder of a saved model: the files from which `ddiff.load` restores it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ddiff import __version__
from ddiff.run_dir.command_record import CommandRecord
from ddiff.run_dir.evaluation_record import EvaluationRecord
from ddiff.run_dir.files import (
    CHAT,
    ENVIRONMENT,
    EVALUATION,
    GENERATION,
    RECIPE,
    RECORDS,
    TOKENIZER,
    VOCABULARY,
    read_json,
)
from ddiff.run_dir.identity import flatten_keys
from ddiff.runs.record import write_run_file

if TYPE_CHECKING:
    from ddiff.checkpoint.checkpoints import Checkpoint
    from ddiff.recipe.model import Recipe
    from ddiff.runs.run import Run

FOLDER = "run"
"""Folder of the record in the folder of a saved model."""

_LOCAL = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|file:")

RECORD = "saved.json"
COPIED = (ENVIRONMENT, EVALUATION, GENERATION, CHAT)
"""Files of the run directory that are copied, if they exist. Samples are not among them: those of
conversations contain prompts of the validation data."""

CONTENTS = {
    RECIPE: "recipe, with its paths",
    TOKENIZER: "tokenizer in the format of ddiff",
    VOCABULARY: "vocabulary, with its tree",
    RECORD: "step, kind of the weights, versions of the components, fingerprints, recipe of the "
    "training",
    ENVIRONMENT: "versions of Python and torch, kind of machine, `[train] init`",
    EVALUATION: "likelihood bound with its protocol, without the command line",
    GENERATION: "figures of `ddiff eval --generate`, if it was called, without the command line",
    CHAT: "of a run of conversations: chat template and length of the answers",
}
"""Description of each file of the record, for the documentation."""


class SavedRecord(CommandRecord):
    """Content of saved.json.

    Attributes:
        ddiff: version of ddiff that saved the run.
        step: training step of the weights.
        weights: "ema" for the exponential moving average, "trained" for the trained weights.
        constants: names of the tensors of the weights' file that are constants of the network, and
            not weights of the run.
        components: recipe key of each component -> its name, plugin and version.
        fingerprints: fingerprints of tokenizer, vocabulary and data.
        made_with: recipe and process of the training, as in a checkpoint.
    """

    newest_version: ClassVar[int] = 1
    command: ClassVar[str] = "ddiff export --format hf"

    schema_version: Literal[1] = 1
    ddiff: str
    step: int
    weights: Literal["ema", "trained"]
    constants: tuple[str, ...]
    components: dict[str, str]
    fingerprints: dict[str, str]
    made_with: dict[str, Any]


def write_record(run: Run, newest: Checkpoint, constants: Iterable[str], folder: Path) -> Path:
    """Write the record of a run to the folder of a saved model, and return its folder.

    `newest`: checkpoint of the run. `constants`: names of the tensors of the file of weights that
    are no weights of the run.
    """
    target = folder / FOLDER
    target.mkdir()
    write_run_file(target / RECIPE, run.recipe.to_toml())
    run.save_components(target)
    for name in COPIED:
        path = run.run_dir / name
        if name in RECORDS and path.is_file():
            write_run_file(target / name, _remove_command(read_json(path)))
        elif path.is_file():
            shutil.copyfile(path, target / name)
    made_with = {
        "recipe": flatten_keys(run.recipe.to_dict()),
        "given": run.given(),
        "noising": run.noising(),
    }
    record = SavedRecord(
        ddiff=__version__,
        step=newest.step,
        weights="ema" if run.uses_ema else "trained",
        constants=tuple(constants),
        components=run.recipe.origins(),
        fingerprints=newest.state["fingerprints"],
        made_with=made_with,
    )
    write_run_file(target / RECORD, record.to_json())
    return target


def _remove_command(record: dict[str, Any]) -> str:
    """Return a record of figures as JSON, with the name of its command without the arguments."""
    provenance = dict(record.get("provenance") or {})
    if "command" in provenance:
        # The arguments may have paths and names that are not meant for publication.
        provenance["command"] = " ".join(str(provenance["command"]).split()[:2])
        record = {**record, "provenance": provenance}
    return json.dumps(record, indent=2) + "\n"


def find_local_paths(recipe: Recipe) -> tuple[str, ...]:
    """Return the keys of a recipe with paths of this machine: absolute ones, and those of `~`."""
    found = []
    for key, value in flatten_keys(recipe.to_dict()).items():
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(each, str) and _LOCAL.match(each) for each in values):
            found.append(key)
    return tuple(found)


def read_evaluation(record: Path) -> EvaluationRecord | None:
    """Read the evaluation of the saved weights; None if they were not evaluated.

    `record`: folder of the record.
    """
    path = record / EVALUATION
    if not path.is_file():
        return None
    tree: Mapping[str, Any] = read_json(path)
    evaluation = EvaluationRecord.from_tree(tree)
    saved = SavedRecord.read(record / RECORD)
    is_same = (evaluation.step, evaluation.weights) == (saved.step, saved.weights)
    return evaluation if is_same else None
