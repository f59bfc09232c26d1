"""`ddiff run --verify-resume K`: steps that are recorded are done again from a checkpoint, and held against the record.

Two things are compared: the lines of `metrics.jsonl`, but for what the clock says in them, and, where the steps lead to
another checkpoint, what stands in it. In the layout of the record (`[backend]`, device, processes, threads, torch) equal
bits are due; in another one figures and weights may differ by the rounding of sums in another order.
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
from ddiff.recipe.model import Recipe
from ddiff.recipe.resolve import parse_recipe
from ddiff.run_dir.contents import classify_contents, format_names
from ddiff.run_dir.files import CHECKPOINTS, ENVIRONMENT, RECIPE, read_json, read_text
from ddiff.run_dir.files import REPLAY as FOLDER
from ddiff.runs.build import Overrides
from ddiff.runs.directory import check_directory, describe_layout, open_checkpoints
from ddiff.runs.session import TrainingSession
from ddiff.training.metrics import FILE, WALL_CLOCK

ROUNDING = 1e-5  # relative, of figures in another layout: float32 sums, which Muon's orthogonalisation makes tenfold
ROUNDING_OF_WEIGHTS = 1e-5  # of the norm of all: Adam divides by a gradient's own size, which for some entries is rounding

Record = Mapping[str, float]


class Span(NamedTuple):
    """Steps to do again: those after `start`, up to `end`, whose checkpoint is there to compare with if `state`."""

    start: int
    end: int
    state: bool


class Difference(NamedTuple):
    """The largest of several relative differences, and where it is."""

    size: float
    where: str


def verify_resume(recipe: Recipe, steps: int) -> int:
    """Do up to `steps` recorded steps of the recipe's run again and say what differs: 0 when nothing does, else 1.

    The run's own files stay as they are. Raises CheckpointError where there is nothing to do again.
    """
    directory = Path(recipe.run_dir)
    checkpoints = open_checkpoints(directory)
    check_directory(directory, recipe, Overrides(), fresh=False)
    was = parse_recipe(read_text(directory / RECIPE), str(directory / RECIPE))
    if was.train.steps != recipe.train.steps:
        raise ArgumentError(
            f"--verify-resume: train.steps must be the {was.train.steps} that {directory} was recorded with, as learning "
            f"rates depend on it; got {recipe.train.steps}. Leave it as it was, or train on first."
        )
    recorded = records(directory)
    span = chosen(checkpoints.steps(), len(recorded), steps)
    folder = directory / FOLDER
    with TrainingSession.open(recipe) as session:
        there = describe_layout(session.backend)
        leads = session.backend.rank == 0
        if leads:
            _empty(folder)
            lines = read_text(directory / FILE).splitlines(keepends=True)
            (folder / FILE).write_text("".join(lines[: span.start]), encoding="utf-8")
        session.backend.barrier()
        start = checkpoints.load(span.start) if span.start else None
        if start is None:
            session.initialize_weights()
        summary = session.replay(start, span.end, folder)
    if not leads:
        return summary.exit_code
    is_same_layout = there.items() <= read_json(directory / ENVIRONMENT).items()
    exact = is_same_layout and was.backend_keys == recipe.backend_keys
    try:
        return summary.exit_code or _compare(directory, folder, span, recorded, exact)
    finally:
        shutil.rmtree(folder)


def _empty(folder: Path) -> None:
    """An empty folder for the steps; what a verification that was killed has left there is removed."""
    foreign = [
        name
        for name in classify_contents(folder.parent).foreign
        if Path(name).parts[0] == folder.name
    ]
    if foreign:
        raise CheckpointError(
            f"--verify-resume: the steps are written to {folder} for a while, and {folder.parent} holds "
            f"{format_names(foreign)}, which ddiff did not write. Move that away."
        )
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def chosen(checkpoints: Sequence[int], recorded: int, steps: int) -> Span:
    """From the newest checkpoint, or the beginning, with `steps` recorded steps after it, or else from the newest with any.

    They end at the last checkpoint among them, where there is one, so that its state can be compared.
    """
    starts = [start for start in (0, *checkpoints) if start < recorded]
    if not starts:
        raise CheckpointError(
            "--verify-resume: metrics.jsonl records no step, so there is none to do again. Train first."
        )
    start = max([s for s in starts if s + steps <= recorded] or starts[-1:])
    among = [step for step in checkpoints if start < step <= start + steps]
    return (
        Span(start, among[-1], True) if among else Span(start, min(start + steps, recorded), False)
    )


def _compare(
    directory: Path, folder: Path, span: Span, recorded: Sequence[Record], exact: bool
) -> int:
    origin = f"step {span.start}" if span.start else "the beginning"
    due = (
        "in the layout of the record: equal bits are due"
        if exact
        else "in another layout: equal to rounding"
    )
    print(f"{directory}: steps {span.start + 1} to {span.end} done again from {origin}, {due}.")
    figures = farthest_figure(recorded[span.start : span.end], records(folder)[span.start :])
    good = _told("losses and other figures", figures, 0.0 if exact else ROUNDING)
    if not span.state:
        print(
            "state: not compared, as no checkpoint lies among these steps; ask for more steps, or keep more checkpoints."
        )
        return int(not good)
    theirs, mine = (
        Checkpoints(str(place / CHECKPOINTS)).load(span.end) for place in (directory, folder)
    )
    if exact:
        same = _told(f"state after step {span.end}", farthest_tensor(theirs, mine), 0.0)
    else:
        same = _told(f"weights after step {span.end}", distance(theirs, mine), ROUNDING_OF_WEIGHTS)
    return int(not (good and same))


def _told(what: str, difference: Difference | None, allowed: float) -> bool:
    """Say what came out; whether it may."""
    if difference is None:
        print(f"{what}: equal")
        return True
    good = difference.size <= allowed
    verdict = (
        f"within {allowed:g}" if good else f"NOT within {allowed:g}" if allowed else "NOT equal"
    )
    print(
        f"{what}: {verdict}; largest relative difference {difference.size:.3g}, {difference.where}"
    )
    return good


def farthest_figure(theirs: Sequence[Record], mine: Sequence[Record]) -> Difference | None:
    """Of the lines of the same steps; None when they are equal."""
    worst: Difference | None = None
    for one, two in zip(theirs, mine, strict=True):
        for name in {**one, **two}:
            a, b = one.get(name), two.get(name)
            if a == b:
                continue
            size = (
                abs(a - b) / max(abs(a), abs(b))
                if a is not None and b is not None
                else float("inf")
            )
            if worst is None or size > worst.size:
                worst = Difference(
                    size, f"in {name} of step {int(one['step'])} ({a} recorded, {b} now)"
                )
    return worst


def farthest_tensor(theirs: Checkpoint, mine: Checkpoint) -> Difference | None:
    """Of all that goes on: model, average, optimizer, random state; None when they are equal."""
    one, two = _all(theirs), _all(mine)
    worst: Difference | None = None
    for name in {**one, **two}:
        a, b = one.get(name), two.get(name)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
            if torch.equal(a, b):
                continue
            scale = max(a.double().abs().max().item(), 1e-300)
            size = (a.double() - b.double()).abs().max().item() / scale
        elif a == b:
            continue
        else:
            size = float("inf")
        if worst is None or size > worst.size:
            worst = Difference(size, f"in {name}")
    return worst


def distance(theirs: Checkpoint, mine: Checkpoint) -> Difference | None:
    """The norm of the difference of all weights over that of the weights; None when they are equal."""
    one, two = theirs.weights(), mine.weights()
    flat = [
        torch.cat([tensors[name].double().ravel() for name in sorted(tensors)])
        for tensors in (one, two)
    ]
    if torch.equal(*flat):
        return None
    return Difference(
        ((flat[0] - flat[1]).norm() / flat[0].norm()).item(), "the norm of all of them together"
    )


def _all(checkpoint: Checkpoint) -> dict[str, Any]:
    tree = {
        name: entry
        for name, entry in checkpoint.tree().items()
        if name in ("optimizer", "ema", "random")
    }
    return dict(_leaves({"model": checkpoint.weights()} | tree, ""))


def _leaves(tree: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    else:
        yield place, tree


def is_record(line: Any, step: int) -> bool:
    """Whether a line of metrics.jsonl is that of a step: numbers by name."""
    return (
        isinstance(line, dict)
        and line.get("step") == step
        and all(isinstance(x, int | float) for x in line.values())
    )


def records(directory: Path) -> list[Record]:
    """The lines of metrics.jsonl, up to the first that is none: a process that was killed may have left half of one."""
    path = directory / FILE
    records: list[Record] = []
    for line in read_text(path).splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not is_record(found, len(records) + 1):
            break
        records.append({name: value for name, value in found.items() if name not in WALL_CLOCK})
    return records
