"""Record the states of samples of a text run during sampling.

`TrajectoryRecorder` is a callback `on_step` of `Run.sample`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError
from ddiff.recipe.resolve import configure_sampler
from ddiff.run_dir.files import SAMPLES, read_json_lines
from ddiff.runs.confidence import ConfidenceMeter, make_meter, select_samples
from ddiff.runs.observer import MOST_RECORDED, SampleObserver
from ddiff.runs.report.clusters import TokenTree, read_tree_of
from ddiff.runs.report.trajectories import Trajectory
from ddiff.runs.run import Run
from ddiff.runs.terminal_view import MOST_WATCHED, StateView, watch_samples
from ddiff.sampling.loop import Canvas, OnStep

STAGE_SHARE = 0.02  # largest share of the time that drawing takes in `ddiff run`


class TrajectoryRecorder:
    """Callback that keeps the states of the first `count` samples after each step.

    Args:
        count: number of samples to record.
        start: the state of the prior if the prior is one state, such as the mask. All positions
            but those of a prompt then have this state before the first step. None: the recording
            begins after the first step.
        has_prompt: whether the samples have a prompt or infill text.
        undrawn: see `hide_undrawn`.
        meter: measures the confidence of the network in each new state; None: not measured.
    """

    def __init__(
        self,
        count: int,
        start: int | None,
        has_prompt: bool = False,
        undrawn: int | None = None,
        meter: ConfidenceMeter | None = None,
    ) -> None:
        self.count = count
        self.undrawn = undrawn
        self.start = start
        self.has_prompt = has_prompt
        self.meter = meter
        self.rows: list[RecordedRow] = []
        self._before: Canvas | None = None  # state of the recorded samples before the step
        self._first = 0  # number of the first sample of the current batch

    def __call__(self, step: int, canvas: Canvas) -> None:
        if step == 1:
            self._first = len(self.rows)
            wanted = max(0, self.count - len(self.rows))
            for states, clean in zip(canvas.zt[:wanted].tolist(), canvas.clean[:wanted].tolist()):
                self.rows.append(self._begin_row(states, clean))
            self._before = self._open_canvas(canvas)
        kept = self.rows[self._first :]
        times = canvas.t.double().mean(1).tolist()
        shown = hide_undrawn(canvas, self.undrawn)
        for row, states, time in zip(kept, shown.tolist(), times):
            row.states.append(states)
            row.times.append(time)
        self._measure(canvas, kept)

    def _measure(self, canvas: Canvas, kept: Sequence[RecordedRow]) -> None:
        """Record the confidence of the network in the states of a step."""
        if self.meter is None or not kept:
            return
        after = select_samples(canvas, len(kept))
        found: list[dict[int, float]] = [{} for _ in kept]
        if self._before is not None:
            found = self.meter.measure(self._first, select_samples(self._before, len(kept)), after)
        for row, values in zip(kept, found):
            row.confidence.append(values)
        self._before = after

    def _open_canvas(self, canvas: Canvas) -> Canvas | None:
        """Return the state before the first step, or None if the prior has several states.

        `canvas` is the state after the first step.
        """
        if self.start is None:
            return None
        given = canvas.clean if self.has_prompt else torch.zeros_like(canvas.clean)
        zt = torch.where(given, canvas.zt, self.start)
        return Canvas(zt, torch.ones_like(canvas.t), given, canvas.free, canvas.block)

    def _begin_row(self, states: Sequence[int], clean: Sequence[bool]) -> RecordedRow:
        """Return a row before its first step. `states` and `clean` are those after this step."""
        given = []
        if self.has_prompt:
            given = [place for place, is_clean in enumerate(clean) if is_clean]
        if self.start is None:
            return RecordedRow([], given)
        before = [self.start] * len(states)
        for place in given:
            before[place] = states[place]
        return RecordedRow([before], given)


class RecordedRow:
    """States and times of one sample, the positions of its prompt, and confidences by position."""

    def __init__(self, states: list[list[int]], given: list[int]) -> None:
        self.states = states
        self.given = given
        self.times: list[float] = []
        self.confidence: list[dict[int, float]] = []


def find_start(run: Run) -> int | None:
    """Return the only state of the prior of a run, or None if the prior has several states.

    Without a process, this is the mask, which stands for tokens that are not drawn yet.
    """
    if run.process is None:
        return run.vocabulary.mask_id
    possible = run.process.prior.log_prob.isfinite().nonzero().flatten().tolist()
    return possible[0] if len(possible) == 1 else None


def find_undrawn(run: Run) -> int | None:
    """Return the state to show at undrawn positions; see `hide_undrawn`."""
    return run.vocabulary.mask_id if run.process is None else None


def hide_undrawn(canvas: Canvas, undrawn: int | None) -> Tensor:
    """Return the states [B,L] to show, with the state `undrawn` where no token is drawn yet.

    A model without a process has an arbitrary token there. If `undrawn` is None, the states are
    those of the canvas.
    """
    if undrawn is None:
        return canvas.zt
    return canvas.zt.masked_fill(canvas.t > 0, undrawn)


def make_trajectories(
    run: Run, recorder: TrajectoryRecorder, sampler: str | None, seed: int | None
) -> list[Trajectory]:
    """Return the trajectories that were recorded while `run` drew samples.

    `sampler` and `seed` are the arguments of `Run.sample`.
    """
    tree = read_tree(run)
    keys = run.recipe.sample
    trajectories = []
    for index, row in enumerate(recorder.rows):
        # without a state before the first step, the first step is the start
        skipped = len(row.times) - (len(row.states) - 1)
        trajectories.append(
            Trajectory.of(
                row.states,
                row.times[skipped:],
                tree,
                row.given,
                row.confidence[skipped:],
                run=run.recipe.name,
                sampler=configure_sampler(run.recipe, sampler).component.name,
                seed=keys.seed if seed is None else seed,
                index=index,
            )
        )
    return trajectories


def draw_trajectories(
    run: Run, count: int, samplers: Sequence[str | None], steps: int | None = None
) -> list[Trajectory]:
    """Draw `count` samples with each sampler, from the same random numbers, and record them.

    None in `samplers` is the sampler of the recipe.
    """
    found = []
    for sampler in samplers:
        meter = make_meter(run, count, sampler)
        recorder = TrajectoryRecorder(
            count, find_start(run), undrawn=find_undrawn(run), meter=meter
        )
        run.sample(count, sampler=sampler, steps=steps, on_step=recorder)
        found += make_trajectories(run, recorder, sampler, None)
    return found


def read_tree(run: Run) -> TokenTree:
    """Return the tokens of a run and their tree. Raises ArgumentError if there are no texts."""
    tree = read_tree_of(run.run_dir, read_json_lines(run.run_dir / SAMPLES))
    if tree is None:
        raise ArgumentError(
            f"{run.run_dir}: the states of a sample can only be shown if the run has a tokenizer "
            "that can be loaded. Install the packages of its tokenizer."
        )
    return tree


# ---------------------------------------------------------------------- ddiff sample


@contextmanager
def observe_samples(
    run: Run, observer: SampleObserver, arguments: Mapping[str, Any]
) -> Iterator[OnStep]:
    """Show or record the samples that are drawn in a `with` block, as an observer wants.

    Yields the callback `on_step` for `Run.sample`, whose arguments are `arguments`. The files are
    written at the end of the block.
    """
    has_prompt = any(arguments.get(name) is not None for name in ("prompt", "infill", "message"))
    has_end = any(arguments.get(name) is not None for name in ("infill", "message"))
    undrawn = find_undrawn(run)
    meter = None
    # positions after the end of an infill text are padding, which the meter does not know
    if observer.records and not has_end:
        meter = make_meter(
            run,
            MOST_RECORDED,
            arguments.get("sampler"),
            arguments.get("conditions"),
            arguments.get("guidance"),
        )
    recorder = TrajectoryRecorder(MOST_RECORDED, find_start(run), has_prompt, undrawn, meter)
    watcher = watch_text(run) if observer.watch else nullcontext()
    with watcher as show:

        def observe(step: int, canvas: Canvas) -> None:
            if observer.records:
                recorder(step, canvas)
            if show is not None:
                show(step, canvas)

        yield observe
    if observer.records:
        sampler = arguments.get("sampler")
        observer.write(make_trajectories(run, recorder, sampler, arguments.get("seed")))


@contextmanager
def watch_text(
    run: Run,
    sizes: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[OnStep]:
    """Show the samples of the current batch on stderr, in place, while they are drawn.

    Yields the callback `on_step` for `Run.sample`. `sizes`: number of tokens to show of each
    sample; None: all. `options` are arguments of `watch_samples`.
    """
    view = StateView(read_tree(run))
    undrawn = find_undrawn(run)
    first = 0  # number of the first sample of the current batch
    following = 0  # and of the next batch
    with watch_samples(**options) as show:

        def on_step(step: int, canvas: Canvas) -> None:
            nonlocal first, following
            if step == 1:
                first = following
                following += len(canvas.zt)
            begin = first

            def draw() -> tuple[float, list[Text]]:
                states = hide_undrawn(canvas, undrawn)[:MOST_WATCHED].tolist()
                if sizes is not None:
                    states = [row[:size] for row, size in zip(states, sizes[begin:])]
                return float(canvas.t.mean()), view.draw(states, batch=begin)

            show(step, draw)

        yield on_step


@contextmanager
def watch_stage(
    run: Run, title: str, ranks: Ranks, sizes: Sequence[int] | None = None
) -> Iterator[OnStep | None]:
    """Show the samples of a stage of `ddiff run` on the terminal while they are drawn.

    Yields a callback as `watch_text` does, or None if stderr is not a terminal, if several ranks
    divide the samples, or if the tokens have no texts. At the end the samples are removed, because
    the summary has them. Drawing takes at most `STAGE_SHARE` of the time.
    """
    console = Console(stderr=True)
    if not console.is_terminal or ranks.world_size > 1 or read_tree_of(run.run_dir) is None:
        yield None
        return
    with watch_text(
        run, sizes, console=console, title=title, share=STAGE_SHARE, transient=True
    ) as on_step:
        yield on_step
