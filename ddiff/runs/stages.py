"""Stages of a run: train, evaluate, sample.

Each stage writes files to the run directory. A stage is skipped if its files already exist.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.distributed.launcher import exit_with_message, get_rank_info
from ddiff.distributed.ranks import Ranks, connect_ranks
from ddiff.errors import ArgumentError
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.recipe.model import BaseRecipe
from ddiff.recipe.resolve import read_recipe
from ddiff.run_dir.protection import delete_run
from ddiff.runs.build import NO_OVERRIDES, Overrides
from ddiff.runs.directory import (
    check_directory,
    lock_run_dir,
    remove_leftovers,
    tracked_names,
)
from ddiff.runs.editing import add_target
from ddiff.runs.kinds import ClockSource, find_kind
from ddiff.runs.loading import load
from ddiff.runs.observer import SampleObserver
from ddiff.runs.record import read_recorded_steps, record_run
from ddiff.runs.session import TrainingSession
from ddiff.runs.summary import print_resume, print_start
from ddiff.runs.tracking import send_results
from ddiff.runs.trainable import TrainableRun
from ddiff.training.protocols import Tracker
from ddiff.training.settings import TrainingSummary

INTERRUPTED = 128 + signal.SIGINT  # exit code of a run that was stopped by SIGINT


def run(
    recipe: str | Path | BaseRecipe,
    *,
    vocabulary: Vocabulary | None = None,
    process: ForwardProcess | None = None,
    settings: Iterable[str] = (),
    fresh: bool = False,
) -> Any:
    """Train, evaluate and sample a recipe, or resume an interrupted run.

    Args:
        recipe: path of a recipe, name of a shipped recipe, or Recipe object.
        vocabulary: replaces the vocabulary of the recipe.
        process: replaces the forward process of the recipe.
        settings: `key=value` texts that override keys of the recipe, as `--set` does.
        fresh: delete the existing run in the run directory and start from the beginning.

    Returns the trained run. Raises a DdiffError for a user error. On SIGINT or SIGTERM, a
    checkpoint of the current step is saved, and KeyboardInterrupt or SystemExit is raised. The same
    call then resumes the run.
    """
    if isinstance(recipe, BaseRecipe):
        if tuple(settings):
            raise ArgumentError(
                "ddiff.run: settings apply to a recipe given by path or name; got settings and a "
                "Recipe object. Pass the path or name, or change the Recipe object."
            )
        resolved = recipe
    else:
        resolved = read_recipe(recipe, settings)
    trained, code = _run_stages(resolved, Overrides(vocabulary, process), fresh)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code or trained is None:
        raise SystemExit(code)
    return trained


def run_recipe(recipe: BaseRecipe, *, fresh: bool = False) -> int:
    """Run `ddiff run`: train, evaluate, sample and print a summary.

    Returns the exit code: 0, or 130 after SIGINT and 143 after SIGTERM.
    """
    _, code = _run_stages(recipe, NO_OVERRIDES, fresh)
    return code


def sample_run(
    run_dir: str | Path,
    *,
    prints_ids: bool = True,
    watch: bool = False,
    trajectory: str | None = None,
    gif: str | None = None,
    clock: ClockSource = "recipe",
    **arguments: Any,
) -> None:
    """Run `ddiff sample`: print one JSON line per sample.

    `arguments` are those of `Run.sample` or of `FieldsRun.sample`. Without `prints_ids`, the lines
    have no token ids. `watch` shows the samples on the terminal while they are drawn, `trajectory`
    is a JSON file for the states after each step, and `gif` an animation of these states. `clock`:
    clock of a tree, that of the recipe or the found one.
    """
    observer = SampleObserver.check(watch, trajectory, gif)
    # states are shown and recorded by one process
    connection = connect_ranks() if observer is None else nullcontext(Ranks())
    with connection as ranks:
        trained = load(run_dir, clock=clock)
        samples = find_kind(trained.recipe).sample(trained, arguments, prints_ids, observer, ranks)
        if ranks.is_first:
            _print_json_lines(samples)


def edit_run(
    run_dir: str | Path,
    texts: list[str],
    *,
    toward: str | Path | None = None,
    conditions: Mapping[str, Any] | None = None,
    prints_ids: bool = True,
    clock: ClockSource = "recipe",
    **arguments: Any,
) -> None:
    """Run `ddiff sample --edit`: print one JSON line per edited text.

    `toward` names a file with the target vectors. `conditions` and `arguments` are arguments of
    `Run.edit`. Without `prints_ids`, the lines have no token ids. `clock`: as for `sample_run`.
    """
    with connect_ranks() as ranks:
        trained = load(run_dir, clock=clock)
        require_text_recipe(trained.recipe, "ddiff sample --edit")
        if toward is not None:
            conditions = add_target(trained.recipe, trained.denoiser, conditions, toward)
        edited = trained.edit(texts, conditions=conditions, ranks=ranks, **arguments)
        if not prints_ids:
            for sample in edited:
                del sample["ids"]
        if ranks.is_first:
            _print_json_lines(edited)


def _print_json_lines(samples: Iterable[Mapping[str, Any]]) -> None:
    """Print each sample as one JSON line."""
    is_ascii = not _writes_unicode()
    for sample in samples:
        print(json.dumps(sample, ensure_ascii=is_ascii))


def _writes_unicode() -> bool:
    """Return True if the encoding of standard output is Unicode.

    If the encoding is not Unicode, characters outside ASCII are printed as JSON escapes.
    """
    encoding = "utf-8"
    if sys.stdout is not None and sys.stdout.encoding:  # None if the stream is closed
        encoding = sys.stdout.encoding
    return encoding.lower().replace("-", "").replace("_", "").startswith("utf")


def _run_stages(
    recipe: BaseRecipe, overrides: Overrides, fresh: bool
) -> tuple[TrainableRun | None, int]:
    """Run all stages. Return the trained run and the exit code.

    The run is None if a signal stopped the training. `overrides` replaces the vocabulary or the
    process of the recipe. `fresh` deletes an existing run first.
    """
    directory = Path(recipe.run_dir)
    rank_info = get_rank_info()  # None for one process
    leads = rank_info is None or rank_info.rank == 0
    check_directory(recipe, overrides, fresh, warn=leads)
    with lock_run_dir(directory) if leads else nullcontext(), ExitStack() as trackers:
        if leads:
            remove_leftovers(directory)
        with TrainingSession.open(recipe, overrides) as session:
            start, init = _prepare_training(session, fresh)
            # open until the end, so that the results belong to the same run of the tracker
            tracker = trackers.enter_context(closing(session.build_tracker()))
            summary = _train(session, start, init, tracker)
            if summary.exit_code:
                if leads:
                    _print_stop(summary)
                return None, summary.exit_code
            trained = session.load_trained_run()
            code = _after_training(trained, summary, tracker, session.ranks())
        return trained, code


def _after_training(
    trained: TrainableRun, summary: TrainingSummary, tracker: Tracker, ranks: Ranks
) -> int:
    """Evaluate, sample, print the summary and log the results. Return the exit code.

    `ranks` divide the evaluation and the sampling; only rank 0 prints, writes and logs.
    """
    try:
        find_kind(trained.recipe).after_training(trained, summary, ranks)
        if ranks.is_first:
            send_results(trained, tracker)
    except KeyboardInterrupt:
        message = (
            "Stopped after training. The weights are saved; the same command evaluates and samples."
        )
        if ranks.world_size > 1:
            # Closing the session would wait for ranks that wait for results of this rank.
            exit_with_message(message, INTERRUPTED)
        print(message, file=sys.stderr)
        return INTERRUPTED
    return 0


def _prepare_training(
    session: TrainingSession[Any], fresh: bool
) -> tuple[Checkpoint | None, Mapping[str, Any] | None]:
    """Return the checkpoint to resume from, and the record of the weights that [train] init loaded.

    If `fresh` is True, the existing run is deleted and training starts from the beginning.
    """
    recipe = session.recipe
    leads = session.backend.rank == 0
    session.run.check_stages()
    # read under the lock: another process may have trained after `check_directory`
    start = None if fresh else session.run.checkpoints.newest()
    init = session.initialize_weights() if start is None else None
    if fresh and leads:
        # deleted only after all other checks
        delete_run(session.run.run_dir, tracked_names(recipe))
    session.backend.barrier()
    return start, init


def _train(
    session: TrainingSession[Any],
    start: Checkpoint | None,
    init: Mapping[str, Any] | None,
    tracker: Tracker,
) -> TrainingSummary:
    """Train from the checkpoint `start`, or from the beginning, to the last step of the recipe."""

    def record_start() -> None:
        if session.backend.rank == 0:
            _record_start(session, init)

    return session.fit(start, record_start, tracker)


def _record_start(session: TrainingSession[Any], init: Mapping[str, Any] | None) -> None:
    """Write the recipe and components of the run, and print the step at which training starts.

    `init`: record of the weights that [train] init loaded; None when training resumes.
    """
    recipe = session.recipe
    backend = session.backend
    recorded = None
    if recipe.train.schedule == "cosine":  # only this learning rate depends on the last step
        # read under the lock too, so that the steps belong to the checkpoint
        recorded = read_recorded_steps(session.run.run_dir)
    record_run(session.run, backend, init)
    kind = recipe.backend.component.name
    print_start(session.run, backend.world_size, kind)
    done = session.run.step
    if done:
        print_resume(done, recipe.train.steps, recorded)


def _print_stop(summary: TrainingSummary) -> None:
    where = "before the first step"
    if summary.checkpoint:
        where = f"at step {summary.step} of {summary.steps}, saved"
    print(f"Stopped {where}. The same command resumes the run.", file=sys.stderr)
