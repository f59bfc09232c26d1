"""Checks that a checkpoint was trained with the recipe, components and data of a run.

The state of a checkpoint contains `fingerprints` (of tokenizer, vocabulary and rows) and
`made_with`:

    recipe      the whole recipe, by dotted keys
    given       components that a Python caller passed to replace components of the recipe
    noising     some transition probabilities of the process, to detect changes of settings or code

Code that reads a checkpoint calls `check_recipe`, `check_fingerprints` and `check_noising`. Each
function raises one error that lists all differences. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddiff.errors import CheckpointError
from ddiff.run_dir.files import ENVIRONMENT, RECIPE, RunRecord

READING = (
    "process",
    "denoiser",
    "objective",
    "tokenizer",
    "vocabulary",
    "data.length",
    "seed",
    "train.ema",
)
"""Tables and keys that must be equal to use the weights of a checkpoint.

Other keys may differ. These are the location of the data, because fingerprints identify the data;
the duration and device of training; and the settings of evaluation, sampling and tracking."""

FREE_KEYS_OF_FIELDS = ("sampler", "steps")
"""Keys of [fields.NAME] that may differ. All other keys must be equal, as those of `READING`."""

CONTINUING = (
    "train.steps",
    "train.keep",
    "train.log_every",
    "train.checkpoint_every",
    "train.init",
)
"""Keys of [train] that may change when training resumes; the other keys of [train] may not."""

TOLERANCE = 1e-6
"""Largest accepted relative difference of a probability, for rounding on another machine."""

DATA = ("training rows", "validation rows", "conditions", "validation conditions")
"""Names of the fingerprints of the data."""

LISTED_DIFFERENCES = 12  # largest number in one message
INLINE_DIFFERENCES = 6  # if there are more, each has a separate line


class Difference(NamedTuple):
    """Key whose value in a checkpoint differs from its present value.

    The value of an absent key is None.
    """

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        was = "absent" if self.was is None else repr(self.was)
        now = "absent" if self.now is None else repr(self.now)
        return f"{self.key}: was {was}, is {now}"


def flatten_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to one dict with dotted keys, such as "train.steps".

    `prefix` is put before every key.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_keys(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# ---------------------------------------------------------------------- checks


def check_recipe(
    place: object, state: Mapping[str, Any], recipe: Mapping[str, Any], *, training: bool = False
) -> None:
    """Raise CheckpointError if a checkpoint was trained with another recipe.

    Args:
        place: run directory, for messages.
        state: state of the checkpoint.
        recipe: present recipe of the run, as nested tables.
        training: whether training will resume, so that keys of [train] are also compared.
    """
    trained = state.get("made_with", {}).get("recipe")
    if trained is None:
        return  # an earlier version wrote the checkpoint
    now = flatten_keys(recipe)
    differences = []
    # the union of the keys, so that added and removed keys are differences
    for key in dict.fromkeys([*trained, *now]):
        if _is_compared(key, training) and trained.get(key) != now.get(key):
            differences.append(Difference(key, trained.get(key), now.get(key)))
    remedy = (
        f"Restore these keys of {Path(str(place)) / RECIPE}, or start a new run with another name."
    )
    raise_differences(place, differences, remedy)


def check_fingerprints(
    place: object,
    state: Mapping[str, Any],
    now: Mapping[str, str],
    remedy: str,
    names: Iterable[str] | None = None,
) -> None:
    """Raise CheckpointError if components or data differ from those of a checkpoint.

    Args:
        place: run directory, for the message.
        state: state of the checkpoint.
        now: present fingerprints.
        remedy: last sentence of the message.
        names: fingerprints to compare; None: all fingerprints in the checkpoint.

    A fingerprint that is missing in the checkpoint of an earlier version is not compared.
    """
    differences = compare_fingerprints(state.get("fingerprints", {}), now, names)
    raise_differences(place, differences, remedy)


def compare_fingerprints(
    trained: Mapping[str, str], now: Mapping[str, str], names: Iterable[str] | None = None
) -> list[Difference]:
    """List the differences between the fingerprints of a checkpoint and the present ones.

    Args:
        trained: fingerprints in the checkpoint.
        now: present fingerprints.
        names: fingerprints to compare; None: all in `trained`.
    """
    compared = list(trained) if names is None else [name for name in names if name in trained]
    return [
        Difference(name, trained[name], now.get(name))
        for name in compared
        if trained[name] != now.get(name)
    ]


def check_noising(
    place: object, state: Mapping[str, Any], now: Sequence[float], remedy: str
) -> None:
    """Raise CheckpointError if the transition probabilities of a process have changed.

    Args:
        place: run directory, for messages.
        state: state of the checkpoint.
        now: present probabilities of the process.
        remedy: last sentence of the message.
    """
    trained = state.get("made_with", {}).get("noising")
    if trained is None:
        return
    difference = _compare_probabilities(trained, now)
    if difference is not None:
        raise_differences(place, [difference], remedy)


def _compare_probabilities(trained: Sequence[float], now: Sequence[float]) -> Difference | None:
    label = "transition probability of the process"
    for was, value in zip(trained, now):
        if not abs(was - value) <= TOLERANCE * max(1.0, abs(was)):  # NaN differs from all numbers
            return Difference(label, was, value)
    if len(trained) != len(now):
        return Difference(label, len(trained), len(now))
    return None


def check_recorded(record: RunRecord, state: Mapping[str, Any], *, training: bool = False) -> None:
    """Raise CheckpointError if the record of a run does not belong to its checkpoint.

    All code that reads a checkpoint calls this function first: evaluation, sampling, export,
    comparison, `--verify-resume`, `[train] init` and resumed training. No plugin is loaded.

    Args:
        record: recipe and environment in the run directory.
        state: state of the checkpoint.
        training: whether training will resume, so that keys of [train] are also compared.
    """
    check_recipe(record.directory, state, record.recipe, training=training)
    recorded = record.environment.get("given")
    given = _saved_overrides(state)
    if recorded is None or given is None or recorded == given:
        return
    keys = dict.fromkeys([*given, *recorded])
    differences = [Difference(f"given {key}", given.get(key), recorded.get(key)) for key in keys]
    remedy = f"Restore {record.directory / ENVIRONMENT} from a copy, or delete this file."
    raise_differences(record.directory, differences, remedy)


def recorded_overrides(record: RunRecord, state: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the components that a Python caller passed to replace components of the recipe.

    `state`: state of a checkpoint of the run. `record`: record of the run, which contains the
    components if an earlier version of ddiff wrote the checkpoint.
    """
    given = _saved_overrides(state)
    if given is None:  # an earlier version recorded the overrides only in environment.json
        return record.environment.get("given", {})
    return given


def _saved_overrides(state: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Return the components that a Python caller passed to the run, as stored in a checkpoint.

    Returns None if the checkpoint is from an earlier version of ddiff that did not store them.
    """
    return state.get("made_with", {}).get("given")


def raise_differences(place: object, differences: Sequence[Difference], remedy: str) -> None:
    """Raise a CheckpointError that lists the differences. Do nothing if the list is empty.

    `place`: run directory, for the message. `remedy`: last sentence of the message.
    """
    if not differences:
        return
    lines = [str(difference) for difference in differences[:LISTED_DIFFERENCES]]
    if len(differences) > LISTED_DIFFERENCES:
        lines.append(f"and {len(differences) - LISTED_DIFFERENCES} more")
    if len(lines) <= INLINE_DIFFERENCES:
        text = f" {'; '.join(lines)}. "
    else:
        text = "".join(f"\n  {line}" for line in lines) + "\n"
    raise CheckpointError(
        f"{place} was trained with other settings, components or data:{text}{remedy}"
    )


def _is_compared(key: str, training: bool) -> bool:
    if training and key.startswith("train."):
        return not any(_is_within(key, free) for free in CONTINUING)
    if key.startswith("fields."):
        return key.split(".")[2] not in FREE_KEYS_OF_FIELDS
    return any(_is_within(key, table) for table in READING)


def _is_within(key: str, table: str) -> bool:
    return key == table or key.startswith(f"{table}.")
