"""What the weights of a checkpoint belong to, and the one comparison of it with what a run has now.

A checkpoint's state holds `fingerprints` (tokenizer, vocabulary, rows) and `made_with`:

    recipe      the whole recipe, by dotted keys
    given       parts that were handed in from Python in place of the recipe's
    noising     some probabilities of the process, so that a process of other settings or other code is told

Whoever reads a checkpoint asks `check_recipe`, `check_fingerprints` and `check_noising`, which raise one error with every
difference. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
"""Tables and keys that decide what the weights mean and which of them are read. Others may differ: where the data lie
(the rows have fingerprints), how long and where was trained, how the run is evaluated, sampled, tracked and called."""

CONTINUING = (
    "train.steps",
    "train.keep",
    "train.log_every",
    "train.checkpoint_every",
    "train.init",
)
"""Keys of [train] that may change while a run is trained; the other ones are added to READING then."""

TOLERANCE = 1e-6  # of a probability: the same formula on another machine
DATA = ("training rows", "validation rows", "conditions", "validation conditions")
"""Names of the fingerprints of the data."""

_SHOWN = 12  # differences that one message lists


class Difference(NamedTuple):
    """One key, with its value in the checkpoint and now; None: absent."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        was = "absent" if self.was is None else repr(self.was)
        now = "absent" if self.now is None else repr(self.now)
        return f"{self.key}: was {was}, is {now}"


def flatten_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to a dict by dotted keys."""
    return dict(_leaves(tree, prefix))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_recipe(
    place: object, state: Mapping[str, Any], recipe: Mapping[str, Any], *, training: bool = False
) -> None:
    """Raise CheckpointError when a run's recipe is not the one that its checkpoint was trained with.

    Args:
        place: the run directory, as messages name it.
        state: the checkpoint's.
        recipe: nested tables, as a run's recipe.toml holds them.
        training: whether training is to continue, so that the keys of [train] count too.
    """
    trained = state.get("made_with", {}).get("recipe")
    if trained is None:
        return  # a checkpoint of a version that recorded none
    now = flatten_keys(recipe)
    keys = [key for key in dict.fromkeys([*trained, *now]) if _counts(key, training)]
    differing = [
        Difference(key, trained.get(key), now.get(key))
        for key in keys
        if trained.get(key) != now.get(key)
    ]
    refuse(
        place,
        differing,
        f"Put these keys of {Path(str(place)) / RECIPE} back as they were; another recipe is another run, under a name "
        "of its own.",
    )


def check_fingerprints(
    place: object,
    state: Mapping[str, Any],
    now: Mapping[str, str],
    remedy: str,
    names: Iterable[str] | None = None,
) -> None:
    """Raise CheckpointError when parts or data are not those that a checkpoint was trained with.

    Compared are `names`, or all that either has; a fingerprint that an earlier version did not record is left out.
    """
    refuse(place, differing_fingerprints(state.get("fingerprints", {}), now, names), remedy)


def differing_fingerprints(
    trained: Mapping[str, str], now: Mapping[str, str], names: Iterable[str] | None = None
) -> list[Difference]:
    """The differences that `check_fingerprints` refuses."""
    compared = list(trained) if names is None else [name for name in names if name in trained]
    return [
        Difference(name, trained[name], now.get(name))
        for name in compared
        if trained[name] != now.get(name)
    ]


def check_noising(
    place: object, state: Mapping[str, Any], now: Sequence[float], remedy: str
) -> None:
    """Raise CheckpointError when a process noises tokens otherwise than the one that a checkpoint was trained with."""
    trained = state.get("made_with", {}).get("noising")
    if trained is None:
        return
    is_same = len(trained) == len(now) and all(
        abs(a - b) <= TOLERANCE * max(1.0, abs(a)) for a, b in zip(trained, now, strict=True)
    )
    if not is_same:
        where = next(
            (i for i, (a, b) in enumerate(zip(trained, now)) if abs(a - b) > TOLERANCE), None
        )
        was, value = (trained[where], now[where]) if where is not None else (len(trained), len(now))
        refuse(
            place,
            [Difference("probabilities of the process, such as one that", was, value)],
            remedy,
        )


def given_in(state: Mapping[str, Any]) -> Mapping[str, str] | None:
    """The parts that a checkpoint was given from Python; None when a version that recorded none wrote it."""
    return state.get("made_with", {}).get("given")


def refuse(place: object, differing: Sequence[Difference], remedy: str) -> None:
    """Raise the CheckpointError that lists the differences, when there are any."""
    if not differing:
        return
    lines = [str(difference) for difference in differing[:_SHOWN]]
    if len(differing) > _SHOWN:
        lines.append(f"and {len(differing) - _SHOWN} more")
    # a few stand in the paragraph, many below one another
    told = (
        f" {'; '.join(lines)}. "
        if len(lines) <= 6
        else "".join(f"\n  {line}" for line in lines) + "\n"
    )
    raise CheckpointError(
        f"{place} was trained with something else than this run has:{told}{remedy}"
    )


def check_recorded(directory: Path, state: Mapping[str, Any], *, training: bool = False) -> None:
    """Hold the files of a run directory against its checkpoint, as far as they can be read without its plugins.

    Everything that reads a checkpoint of a run directory calls this first: load (evaluate, sample), export, compare,
    `--verify-resume`, `[train] init` and a run that resumes.
    """
    check_recipe(directory, state, read_recipe_tree(directory / RECIPE), training=training)
    recorded = read_json(directory / ENVIRONMENT).get("given")
    given = given_in(state)
    if recorded is not None and given is not None and recorded != given:
        keys = dict.fromkeys([*given, *recorded])
        refuse(
            directory,
            [Difference(f"given {key}", given.get(key), recorded.get(key)) for key in keys],
            f"Restore {directory / ENVIRONMENT} from a copy, or delete it.",
        )


def _counts(key: str, training: bool) -> bool:
    if training and key.startswith("train."):
        return not any(_within(key, free) for free in CONTINUING)
    return any(_within(key, table) for table in READING)


def _within(key: str, table: str) -> bool:
    return key == table or key.startswith(f"{table}.")
