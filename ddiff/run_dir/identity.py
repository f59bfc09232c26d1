"""Identity of the weights in a checkpoint, compared with what a run has now.

A checkpoint's state holds `fingerprints` (of tokenizer, vocabulary and rows) and `made_with`:

    recipe      the whole recipe, by dotted keys
    given       components that were passed in from Python in place of the recipe's
    noising     some transition probabilities of the process, which change with its settings or code

A reader of a checkpoint calls `check_recipe`, `check_fingerprints` and `check_noising`. Each raises
one error that lists every difference. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddiff.errors import CheckpointError
from ddiff.run_dir.files import ENVIRONMENT, RECIPE, read_json, read_recipe_tree

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
"""Tables and keys that decide what the weights mean and which of them are read.

Others may differ: where the data lie (their rows have fingerprints), how long and where the run was
trained, and how it is evaluated, sampled, tracked and named."""

CONTINUING = (
    "train.steps",
    "train.keep",
    "train.log_every",
    "train.checkpoint_every",
    "train.init",
)
"""Keys of [train] that may change when training resumes; the other keys of [train] may not."""

TOLERANCE = 1e-6
"""Difference of a probability that another machine may cause with the same formula."""

DATA = ("training rows", "validation rows", "conditions", "validation conditions")
"""Names of the fingerprints of the data."""

LISTED_DIFFERENCES = 12  # in one message
INLINE_DIFFERENCES = 6  # in one paragraph; more are listed on separate lines


class Difference(NamedTuple):
    """A key with its value in the checkpoint and now; None stands for absent."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        was = "absent" if self.was is None else repr(self.was)
        now = "absent" if self.now is None else repr(self.now)
        return f"{self.key}: was {was}, is {now}"


def flatten_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to one dict by dotted keys."""
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
    """Raise CheckpointError if a run's recipe is not the one that its checkpoint was trained with.

    Args:
        place: the run directory, as messages name it.
        state: state of the checkpoint.
        recipe: nested tables, as a run's recipe.toml holds them.
        training: whether training is to resume, so that keys of [train] are compared too.
    """
    trained = state.get("made_with", {}).get("recipe")
    if trained is None:
        return  # an earlier version wrote the checkpoint
    now = flatten_keys(recipe)
    differences = []
    # both sets of keys, so that added and removed ones are differences too
    for key in dict.fromkeys([*trained, *now]):
        if _is_compared(key, training) and trained.get(key) != now.get(key):
            differences.append(Difference(key, trained.get(key), now.get(key)))
    remedy = (
        f"Put these keys of {Path(str(place)) / RECIPE} back as they were; another recipe is "
        "another run, under its own name."
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

    Compared are `names`, by default all that the checkpoint records. A fingerprint that an earlier
    version did not record is not compared.
    """
    differences = compare_fingerprints(state.get("fingerprints", {}), now, names)
    raise_differences(place, differences, remedy)


def compare_fingerprints(
    trained: Mapping[str, str], now: Mapping[str, str], names: Iterable[str] | None = None
) -> list[Difference]:
    """List the fingerprints that differ; the arguments are those of `check_fingerprints`."""
    compared = list(trained) if names is None else [name for name in names if name in trained]
    return [
        Difference(name, trained[name], now.get(name))
        for name in compared
        if trained[name] != now.get(name)
    ]


def check_noising(
    place: object, state: Mapping[str, Any], now: Sequence[float], remedy: str
) -> None:
    """Raise CheckpointError if a process has other probabilities than that of a checkpoint."""
    trained = state.get("made_with", {}).get("noising")
    if trained is None:
        return
    difference = _compare_probabilities(trained, now)
    if difference is not None:
        raise_differences(place, [difference], remedy)


def _compare_probabilities(trained: Sequence[float], now: Sequence[float]) -> Difference | None:
    label = "probabilities of the process, such as one that"
    for was, value in zip(trained, now):
        if not abs(was - value) <= TOLERANCE * max(1.0, abs(was)):  # NaN differs from everything
            return Difference(label, was, value)
    if len(trained) != len(now):
        return Difference(label, len(trained), len(now))
    return None


def check_recorded(directory: Path, state: Mapping[str, Any], *, training: bool = False) -> None:
    """Compare the files of a run directory with its checkpoint, without loading plugins.

    Everything that reads a checkpoint of a run directory calls this first: load (evaluate, sample),
    export, compare, `--verify-resume`, `[train] init`, and a run that resumes.
    """
    check_recipe(directory, state, read_recipe_tree(directory / RECIPE), training=training)
    recorded = read_json(directory / ENVIRONMENT).get("given")
    given = recorded_overrides(state)
    if recorded is None or given is None or recorded == given:
        return
    keys = dict.fromkeys([*given, *recorded])
    differences = [Difference(f"given {key}", given.get(key), recorded.get(key)) for key in keys]
    remedy = f"Restore {directory / ENVIRONMENT} from a copy, or delete it."
    raise_differences(directory, differences, remedy)


def recorded_overrides(state: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Return the components that were passed in from Python for a checkpoint.

    None if a version wrote the checkpoint that did not record them.
    """
    return state.get("made_with", {}).get("given")


def raise_differences(place: object, differences: Sequence[Difference], remedy: str) -> None:
    """Raise the CheckpointError that lists the differences, if there are any."""
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
        f"{place} was trained with something else than this run has:{text}{remedy}"
    )


def _is_compared(key: str, training: bool) -> bool:
    if training and key.startswith("train."):
        return not any(_is_within(key, free) for free in CONTINUING)
    return any(_is_within(key, table) for table in READING)


def _is_within(key: str, table: str) -> bool:
    return key == table or key.startswith(f"{table}.")
