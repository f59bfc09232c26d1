"""Replay of recorded training steps: `ddiff run --verify-resume K`.

The replay must reproduce the lines of `metrics.jsonl`, except for wall-clock times. If the replayed
steps end at a checkpoint, the replay must also reproduce the state of the checkpoint.

The layout of a run consists of `[backend]`, device, processes, threads and version of torch. If the
replay has the layout of the recorded run, the results must be bitwise identical. In another layout,
floating-point sums are computed in another order. Differences up to the constants ROUNDING and
ROUNDING_OF_WEIGHTS are then allowed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddiff.checkpoint.checkpoints import Checkpoint, Checkpoints
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.recipe.model import BaseRecipe
from ddiff.recipe.resolve import parse_recipe
from ddiff.run_dir.contents import classify_contents
from ddiff.run_dir.files import CHECKPOINTS, ENVIRONMENT, RECIPE, REPLAY, read_json, read_text
from ddiff.run_dir.protection import format_names
from ddiff.runs.build import NO_OVERRIDES
from ddiff.runs.directory import check_directory
from ddiff.runs.record import describe_layout, open_checkpoints
from ddiff.runs.session import TrainingSession
from ddiff.training.metrics import FILE, WALL_CLOCK
from ddiff.training.settings import TrainingSummary

# Allowed relative difference of a figure in another layout: rounding of float32 sums (1e-7 each),
# which the orthogonalization of Muon makes about ten times as large.
ROUNDING = 1e-5
# Allowed difference of all weights, relative in norm. Adam divides each gradient by its own size,
# and some gradients are only rounding error, so single weights may differ by more.
ROUNDING_OF_WEIGHTS = 1e-5

Record = Mapping[str, float]


class Span(NamedTuple):
    """Range of training steps to replay: from step `start` + 1 to step `end`.

    `has_state`: whether the run has a checkpoint of step `end`, with which the replay is compared.
    """

    start: int
    end: int
    has_state: bool


class Deviation(NamedTuple):
    """Largest of several relative differences, and the name of the value with this difference."""

    size: float
    where: str


def verify_resume(recipe: BaseRecipe, steps: int) -> int:
    """Replay up to `steps` recorded steps of a run and print the differences.

    Returns the exit code: 0 if all differences are allowed, 1 otherwise. The files of the run are
    not changed. Raises CheckpointError if the run has no recorded step.
    """
    directory = Path(recipe.run_dir)
    checkpoints = open_checkpoints(directory)
    check_directory(recipe, NO_OVERRIDES, fresh=False)
    recorded_recipe = parse_recipe(read_text(directory / RECIPE), str(directory / RECIPE))
    if recorded_recipe.train.steps != recipe.train.steps:
        raise ArgumentError(
            f"--verify-resume: train.steps must be {recorded_recipe.train.steps}, the recorded "
            f"value of {directory}, because the learning rates depend on train.steps; got "
            f"{recipe.train.steps}. Use the recorded value, or train to the new number of steps "
            "first."
        )
    recorded = read_records(directory)
    span = choose_span(checkpoints.steps(), len(recorded), steps)
    folder = directory / REPLAY
    with TrainingSession.open(recipe) as session:
        layout = describe_layout(session.backend)
        summary = _replay(session, checkpoints, span, folder)
        leads = session.backend.rank == 0
    if not leads:
        return summary.exit_code
    is_same_layout = layout.items() <= read_json(directory / ENVIRONMENT).items()
    is_exact = is_same_layout and recorded_recipe.backend_keys == recipe.backend_keys
    try:
        return summary.exit_code or _compare(directory, folder, span, recorded, is_exact)
    finally:
        shutil.rmtree(folder)


def _replay(
    session: TrainingSession, checkpoints: Checkpoints, span: Span, folder: Path
) -> TrainingSummary:
    """Repeat the training steps of a span and write the results to `folder`."""
    if session.backend.rank == 0:
        _make_empty(folder)
        # the trainer requires a line for each step up to `start`
        lines = read_text(folder.parent / FILE).splitlines(keepends=True)
        (folder / FILE).write_text("".join(lines[: span.start]), encoding="utf-8")
    session.backend.barrier()
    if not span.start:
        session.initialize_weights()
        return session.replay(None, span.end, folder)
    return session.replay(checkpoints.load(span.start), span.end, folder)


def _make_empty(folder: Path) -> None:
    """Create an empty folder and remove leftovers of a killed verification."""
    foreign = []
    for name in classify_contents(folder.parent).foreign:
        if Path(name).parts[0] == folder.name:
            foreign.append(name)
    if foreign:
        raise CheckpointError(
            f"--verify-resume needs {folder} as a temporary folder, but {folder.parent} contains "
            f"{format_names(foreign)}, which ddiff did not write. Move these files away."
        )
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def choose_span(checkpoints: Sequence[int], recorded: int, steps: int) -> Span:
    """Choose the training steps to replay.

    The replay starts at the newest checkpoint with at least `steps` recorded steps after it. If
    there is no such checkpoint, the replay starts at the newest checkpoint with any recorded step
    after it. The replay ends at the last checkpoint within `steps` steps of the start, so that the
    training states can be compared. If there is no such checkpoint, the replay ends after `steps`
    steps or at the last recorded step.

    Args:
        checkpoints: steps of the checkpoints. Step 0 counts as a checkpoint too.
        recorded: number of steps in metrics.jsonl.
        steps: largest number of steps to replay.
    """
    starts = [start for start in (0, *checkpoints) if start < recorded]
    if not starts:
        raise CheckpointError(
            "--verify-resume: metrics.jsonl records no step, so no step can be replayed. Train the "
            "run first."
        )
    long_enough = [start for start in starts if start + steps <= recorded]
    start = max(long_enough or starts[-1:])
    among = [step for step in checkpoints if start < step <= start + steps]
    if among:
        return Span(start, among[-1], True)
    return Span(start, min(start + steps, recorded), False)


# ---------------------------------------------------------------------- comparison


def _compare(
    directory: Path, folder: Path, span: Span, recorded: Sequence[Record], is_exact: bool
) -> int:
    """Print the differences between replay and record, and return the exit code.

    Args:
        directory: directory of the run.
        folder: folder of the replay.
        span: replayed steps.
        recorded: lines of metrics.jsonl of the run.
        is_exact: whether the results must be bitwise identical.
    """
    origin = f"step {span.start}" if span.start else "the beginning"
    expected = "in another layout: equality up to rounding is expected"
    if is_exact:
        expected = "in the recorded layout: bitwise equality is expected"
    print(f"{directory}: steps {span.start + 1} to {span.end} repeated from {origin}, {expected}.")
    replayed = read_records(folder)
    figures = compare_records(recorded[span.start : span.end], replayed[span.start :])
    good = _print_verdict("losses and other figures", figures, 0.0 if is_exact else ROUNDING)
    if not span.has_state:
        print(
            "state: not compared, because the run has no checkpoint at these steps. Replay more "
            "steps, or keep more checkpoints."
        )
        return int(not good)
    theirs = Checkpoints(str(directory / CHECKPOINTS)).load(span.end)
    mine = Checkpoints(str(folder / CHECKPOINTS)).load(span.end)
    if is_exact:
        same = _print_verdict(f"state after step {span.end}", compare_states(theirs, mine), 0.0)
    else:
        same = _print_verdict(
            f"weights after step {span.end}", compare_weights(theirs, mine), ROUNDING_OF_WEIGHTS
        )
    return int(not (good and same))


def _print_verdict(subject: str, deviation: Deviation | None, allowed: float) -> bool:
    """Print the deviation of `subject`. Return True if the deviation is at most `allowed`."""
    if deviation is None:
        print(f"{subject}: equal")
        return True
    is_allowed = deviation.size <= allowed
    if is_allowed:
        verdict = f"within {allowed:g}"
    elif allowed:
        verdict = f"NOT within {allowed:g}"
    else:
        verdict = "NOT equal"
    print(
        f"{subject}: {verdict}; largest relative difference {deviation.size:.3g}, {deviation.where}"
    )
    return is_allowed


def compare_records(theirs: Sequence[Record], mine: Sequence[Record]) -> Deviation | None:
    """Return the largest relative difference between two recordings of the same steps.

    `theirs` are the records that the run wrote, and `mine` those of the replay. Returns None if the
    records are equal.
    """
    worst: Deviation | None = None
    for one, two in zip(theirs, mine, strict=True):
        for name in {**one, **two}:
            a = one.get(name)
            b = two.get(name)
            if a == b:
                continue
            size = float("inf")  # only one of the two records has the figure
            if a is not None and b is not None:
                size = abs(a - b) / max(abs(a), abs(b))
            if worst is None or size > worst.size:
                where = f"in {name} of step {int(one['step'])} ({a} recorded, {b} now)"
                worst = Deviation(size, where)
    return worst


def compare_states(theirs: Checkpoint, mine: Checkpoint) -> Deviation | None:
    """Compare the training states of two checkpoints.

    The state consists of weights, exponential moving average, optimizer and random generators.
    Returns the largest deviation, or None if the states are bitwise identical.
    """
    one = _flatten_state(theirs)
    two = _flatten_state(mine)
    worst: Deviation | None = None
    for name in {**one, **two}:
        size = _relative_difference(one.get(name), two.get(name))
        if size is not None and (worst is None or size > worst.size):
            worst = Deviation(size, f"in {name}")
    return worst


def _relative_difference(a: Any, b: Any) -> float | None:
    """Return max |a - b| / max |a|, or None if the values are equal.

    The result is infinity for unequal values that are not tensors of the same shape.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        if torch.equal(a, b):
            return None
        scale = max(a.double().abs().max().item(), 1e-300)  # a tensor may be zero everywhere
        difference = (a.double() - b.double()).abs().max().item()
        return difference / scale
    return None if a == b else float("inf")


def compare_weights(theirs: Checkpoint, mine: Checkpoint) -> Deviation | None:
    """Return the norm of the weight difference, divided by the norm of the weights.

    Returns None if the weights are bitwise identical.
    """
    one = _flatten_weights(theirs)
    two = _flatten_weights(mine)
    if torch.equal(one, two):
        return None
    size = ((one - two).norm() / one.norm()).item()
    return Deviation(size, "the norm of all weights together")


def _flatten_weights(checkpoint: Checkpoint) -> Tensor:
    weights = checkpoint.read_weights()
    flat = []
    for name in sorted(weights):
        flat.append(weights[name].double().ravel())
    return torch.cat(flat)


def _flatten_state(checkpoint: Checkpoint) -> dict[str, Any]:
    tree: dict[str, Any] = {"model": checkpoint.read_weights()}
    for name, entry in checkpoint.read_state().items():
        if name in ("optimizer", "ema", "random"):
            tree[name] = entry
    return dict(_leaves(tree, ""))


def _leaves(tree: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each leaf of nested dicts and lists.

    `place`: dotted key of `tree` itself, or "" at the top.
    """
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    else:
        yield place, tree


# ---------------------------------------------------------------------- records


def read_records(directory: Path) -> list[Record]:
    """Read the lines of metrics.jsonl without their wall-clock times.

    Stops at the first line that is not the record of the next step, since a killed process may
    leave an incomplete last line.
    """
    path = directory / FILE
    records: list[Record] = []
    if not path.exists():
        return records
    for line in read_text(path).splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_record(found, len(records) + 1):
            break
        for name in WALL_CLOCK:
            found.pop(name, None)
        records.append(found)
    return records


def _is_record(line: Any, step: int) -> bool:
    """Return True if a line is a dict of numbers for the given step."""
    if not isinstance(line, dict) or line.get("step") != step:
        return False
    return all(isinstance(value, int | float) for value in line.values())
