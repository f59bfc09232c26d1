"""Record and show the fields of samples during sampling.

Fields of tokens have trajectories of states, and fields with pictures trajectories of pictures.
Vectors without a picture are not shown. `FieldsRecorder` is a callback `on_step` of
`FieldsRun.sample`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.text import Text
from torch import Tensor

from ddiff.core.field_targets import Target, parse_target
from ddiff.data.pictures import Pixels
from ddiff.errors import ArgumentError
from ddiff.runs.fields.run import FieldsRun
from ddiff.runs.fields.values import FieldValues
from ddiff.runs.observer import MOST_RECORDED, SampleObserver
from ddiff.runs.report.clusters import TokenTree
from ddiff.runs.report.trajectories import AnyTrajectory, PictureTrajectory, Trajectory
from ddiff.runs.terminal_view import MOST_WATCHED, StateView, draw_pixels, watch_samples
from ddiff.sampling.fields import OnJointStep
from ddiff.sampling.loop import Canvas

MASK_COLOUR = (138, 160, 222)
NODE_COLOUR = (240, 190, 110)
"""Colours of masked pixels, and of pixels that are at a node of a tree."""
WIDEST_WATCHED = 40  # columns of a picture on the terminal


def draw_states(values: FieldValues, states: Tensor) -> list[Pixels]:
    """Return the pixels of noisy states of k samples.

    Vectors are drawn like clean vectors. Masked positions have the colour `MASK_COLOUR`, and
    positions at a node of a tree `NODE_COLOUR`. Raises ArgumentError for a field without pictures.
    """
    vocabulary = values.vocabulary
    if vocabulary is None or values.picture is None:
        return values.draw(states)
    is_token = states < vocabulary.num_tokens
    drawn = values.draw(torch.where(is_token, states, 0))
    down, across = values.picture.grid
    height = values.picture.rows // down
    width = values.picture.columns // across
    is_mask = torch.zeros_like(is_token)
    if vocabulary.mask_id is not None:
        is_mask = states == vocabulary.mask_id
    is_node = ~is_token & ~is_mask
    for row, pixels in enumerate(drawn):
        for marked, colour in ((is_mask, MASK_COLOUR), (is_node, NODE_COLOUR)):
            # a position may have several pixels
            area = marked[row].cpu().numpy().reshape(down, across)
            pixels[area.repeat(height, 0).repeat(width, 1)] = colour
    return drawn


def make_tree(values: FieldValues) -> TokenTree:
    """Return the tree of tokens of a field. A token is shown by its text, or by its number."""
    vocabulary = values.vocabulary
    assert vocabulary is not None
    tokens = range(vocabulary.num_tokens)
    words = [f" {token}" for token in tokens]
    if values.tokenizer is not None:
        words = values.tokenizer.decode([[token] for token in tokens])
    parents = [level.cpu().numpy().astype(np.int64) for level in vocabulary.parents]
    return TokenTree(parents, words, {})


# ---------------------------------------------------------------------- recording


@dataclass
class RecordedField:
    """States of one field of a sample: before the first step and after each step.

    `states` are ids [n] or pixels uint8 [rows,columns,3]. `times` has the mean time of each.
    """

    states: list[list[int]] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class FieldsRecorder:
    """Callback that keeps the fields of the first `count` samples after each step.

    Args:
        values: values of the fields by name. Vectors without a picture are left out.
        count: number of samples to record.
    """

    def __init__(self, values: Mapping[str, FieldValues], count: int) -> None:
        self.values = {name: each for name, each in values.items() if is_shown(each)}
        self.count = count
        self.samples: list[dict[str, RecordedField]] = []
        self._first = 0  # number of the first sample of the current batch

    def __call__(self, step: int, canvases: Mapping[str, Canvas]) -> None:
        if step == 0:
            self._first = len(self.samples)
            size = len(next(iter(canvases.values())).zt)
            for _ in range(min(size, self.count - self._first)):
                self.samples.append({name: RecordedField() for name in self.values})
        kept = self.samples[self._first :]
        if not kept:
            return
        for name, values in self.values.items():
            canvas = canvases[name]
            states = canvas.zt[: len(kept)]
            times = canvas.network_input().t[: len(kept)].double().mean(1).tolist()
            for sample, time in zip(kept, times):
                sample[name].times.append(time)
            if values.picture is None:
                for sample, row in zip(kept, states.tolist()):
                    sample[name].states.append(row)
            else:
                for sample, pixels in zip(kept, draw_states(values, states)):
                    sample[name].pixels.append(pixels)


def is_shown(values: FieldValues) -> bool:
    """Return whether the states of a field can be shown."""
    return values.picture is not None or values.vocabulary is not None


def make_trajectories(
    run: FieldsRun, recorder: FieldsRecorder, target: Target, seed: int | None
) -> list[AnyTrajectory]:
    """Return the trajectories of the drawn and given fields that were recorded.

    Drawn fields come first. `seed` is the argument of `FieldsRun.sample`.
    """
    shown = [name for name in (*target.drawn, *target.given) if name in recorder.values]
    trees = {}
    for name in shown:
        if run.values[name].picture is None:
            trees[name] = make_tree(run.values[name])
    found: list[AnyTrajectory] = []
    for index, sample in enumerate(recorder.samples):
        for name in shown:
            is_given = name in target.given
            origin: dict[str, Any] = {
                "run": run.recipe.name,
                "sampler": "given" if is_given else run.recipe.fields[name].sampler.component.name,
                "seed": run.recipe.sample.seed if seed is None else seed,
                "index": index,
                "target": str(target),
                "field": name,
            }
            recorded = sample[name]
            times = recorded.times[1:]
            if name in trees:
                given = range(len(recorded.states[0])) if is_given else ()
                found.append(
                    Trajectory.of(recorded.states, times, trees[name], list(given), **origin)
                )
            else:
                found.append(PictureTrajectory.of(recorded.pixels, times, **origin))
    return found


def draw_trajectories(run: FieldsRun, count: int) -> list[AnyTrajectory]:
    """Draw `count` samples and record them.

    The target is the first one of [sample] targets without given fields. Returns an empty list if
    there is none.
    """
    names = list(run.values)
    for text in run.recipe.sample.targets:
        target = parse_target(text, names)
        if not target.given:
            recorder = FieldsRecorder(run.values, count)
            run.sample(count, text, on_step=recorder)
            return make_trajectories(run, recorder, target, None)
    return []


# ---------------------------------------------------------------------- ddiff sample


@contextmanager
def observe_fields(
    run: FieldsRun, observer: SampleObserver, target: Target, seed: int | None
) -> Iterator[OnJointStep]:
    """Show or record the samples that are drawn in a `with` block, as an observer wants.

    Yields the callback `on_step` for `FieldsRun.sample`. The files are written at the end of the
    block. Raises ArgumentError if no field of the target can be shown.
    """
    names = [name for name in (*target.drawn, *target.given) if is_shown(run.values[name])]
    if not names:
        raise ArgumentError(
            f'ddiff sample: the fields of the target "{target}" are vectors without pictures, '
            "which --watch, --trajectory and --gif cannot show. Leave these options out."
        )
    recorder = FieldsRecorder(run.values, MOST_RECORDED if observer.records else 0)
    watcher = watch_fields(run, names) if observer.watch else nullcontext()
    with watcher as show:

        def observe(step: int, canvases: Mapping[str, Canvas]) -> None:
            recorder(step, canvases)
            if show is not None:
                show(step, canvases)

        yield observe
    if observer.records:
        observer.write(make_trajectories(run, recorder, target, seed))


@contextmanager
def watch_fields(run: FieldsRun, names: list[str]) -> Iterator[OnJointStep]:
    """Show the fields `names` of the samples of the current batch on stderr, in place."""
    views = {}
    for name in names:
        if run.values[name].picture is None:
            views[name] = StateView(make_tree(run.values[name]))
    batch = 0
    with watch_samples() as show:

        def on_step(step: int, canvases: Mapping[str, Canvas]) -> None:
            nonlocal batch
            batch += step == 0
            current = batch
            show(step, lambda: _draw_fields(run, names, views, canvases, current))

        yield on_step


def _draw_fields(
    run: FieldsRun,
    names: Sequence[str],
    views: Mapping[str, StateView],
    canvases: Mapping[str, Canvas],
    batch: int,
) -> tuple[float, list[Text]]:
    """Return the mean time of the first samples of a batch, and the texts of their fields."""
    columns = []
    times = []
    for name in names:
        canvas = canvases[name]
        times.append(float(canvas.network_input().t.double().mean()))
        columns.append(_draw_field(run.values[name], views.get(name), canvas, batch))
    samples = []
    for parts in zip(*columns):
        sample = Text()
        for name, part in zip(names, parts):
            sample.append(f"{name}\n", style="dim").append_text(part).append("\n")
        samples.append(sample)
    return sum(times) / len(times), samples


def _draw_field(
    values: FieldValues, view: StateView | None, canvas: Canvas, batch: int
) -> list[Text]:
    """Return the texts of one field of the first samples."""
    states = canvas.zt[:MOST_WATCHED]
    if view is not None:
        return view.draw(states.tolist(), batch)
    drawn = []
    for pixels in draw_states(values, states):
        # a large picture is shown with fewer pixels
        stride = -(-pixels.shape[1] // WIDEST_WATCHED)
        drawn.append(draw_pixels(pixels[::stride, ::stride]))
    return drawn
