"""The stages of a run: train, evaluate, sample, each written to its directory and not done again; and what calls them."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.tokenizer import load_tokenizer
from ddiff.distributed.launcher import place
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.evaluation.baselines import Baselines
from ddiff.evaluation.likelihood import Evaluation
from ddiff.recipe.model import Recipe
from ddiff.recipe.resolve import read_recipe
from ddiff.run_dir.contents import delete_run
from ddiff.run_dir.destination import check_destination, write_text
from ddiff.run_dir.files import (
    ENVIRONMENT,
    EVALUATION,
    RECIPE,
    SAMPLES,
    SAMPLING,
    TOKENIZER,
    VOCABULARY,
    damage_error,
    read_json,
    read_json_lines,
)
from ddiff.run_dir.identity import Difference, check_recorded, recorded_overrides
from ddiff.runs.build import (
    Overrides,
    backend_alone,
    check_sampling,
    check_tokenizer,
)
from ddiff.runs.directory import (
    check_directory,
    check_writable,
    checkpoints_of,
    held,
    newest_step,
    print_foreign,
    record,
    recorded_steps,
    remove_leftovers,
    tracked_names,
    write,
)
from ddiff.runs.run import Run, build_run, other_data
from ddiff.runs.summary import print_evaluation, print_going_on, print_start, print_summary
from ddiff.training.trainer import TrainingSummary

INTERRUPTED = 128 + signal.SIGINT  # the exit code of a run that SIGINT ended


def run(
    recipe: str | Path | Recipe,
    *,
    vocabulary: Vocabulary | None = None,
    process: ForwardProcess | None = None,
    settings: Iterable[str] = (),
    fresh: bool = False,
) -> Run:
    """Train a recipe (a path, a shipped name, or one already read), or go on with it; evaluate, sample, return the run.

    `vocabulary` and `process` take the place of the recipe's; `settings` are `--set` texts. Raises DdiffError's family,
    and after SIGINT (SIGTERM), once the step under way is saved, KeyboardInterrupt (SystemExit): the same call goes on.
    """
    if isinstance(recipe, Recipe) and tuple(settings):
        raise ArgumentError(
            "ddiff.run: settings go over a recipe by path or name; got them with one already read."
        )
    resolved = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, settings)
    built, code = _run_stages(resolved, Overrides(vocabulary, process), fresh)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
    return built


def load(
    run_dir: str | Path, *, process: ForwardProcess | None = None, settings: Iterable[str] = ()
) -> Run:
    """A trained run with its newest weights. `process` is needed when the run was given one from Python; `settings` are
    `--set` texts of the tables [evaluate] and [sample], which change nothing that was trained."""
    directory = Path(run_dir)
    newest = checkpoints_of(directory).newest()
    assert newest is not None  # or the line above had refused
    settings = list(settings)
    if alien := [
        setting for setting in settings if not setting.lstrip().startswith(("evaluate.", "sample."))
    ]:
        raise ArgumentError(
            f"settings of a trained run must be a list of keys of [evaluate] or [sample], such as evaluate.draws=4; got "
            f"{alien[0]!r}. Whatever else is changed makes another run."
        )
    check_recorded(directory, newest.state)
    recipe = read_recipe(directory / RECIPE, [f"run_dir={json.dumps(str(run_dir))}", *settings])
    given = recorded_overrides(newest.state)
    if given is None:
        given = read_json(directory / ENVIRONMENT).get("given", {})
    if "process" in given and process is None:
        raise CheckpointError(
            f"{run_dir} was trained with a process given from Python ({given['process']}), which no recipe can name. "
            "Load it with ddiff.load(run_dir, process=...)."
        )
    tokenizer = load_tokenizer(str(directory / TOKENIZER))
    vocabulary = Vocabulary.load(str(directory / VOCABULARY))
    check_tokenizer(tokenizer, vocabulary)
    built = Run(recipe, tokenizer, vocabulary, Overrides(process=process), backend_alone(recipe))
    built.check_trained_with(newest.state)
    built.load_weights()
    return built


def run_recipe(recipe: Recipe, *, fresh: bool = False) -> int:
    """`ddiff run`: every stage, then a summary; the exit code (130 or 143 after a signal)."""
    _, code = _run_stages(recipe, Overrides(), fresh)
    return code


def evaluate_run(
    run_dir: str | Path, settings: Iterable[str] = (), out: str | Path | None = None
) -> Evaluation:
    """`ddiff eval`: evaluate again, with `settings` over [evaluate], and write evaluation.json.

    With `out` the figures go to that JSON file, and the run's own stay as they are. Raises CheckpointError when the data
    are not those that the run was trained and evaluated with, unless `out` says where the figures of others go.
    """
    target = (
        None
        if out is None
        else check_destination(out, "ddiff eval --out", suffix=".json", owned=_is_evaluation)
    )
    built = load(run_dir, settings=settings)
    if target is None:
        check_writable(built.run_dir)
    changed = _changed_data(built)
    if changed and target is None:
        raise CheckpointError(other_data(built.run_dir, changed))
    figures = _evaluated(built, changed_data=bool(changed))
    if changed:
        figures.written["changed_data"] = [str(difference) for difference in changed]
        print(
            f"These figures are of other data than {built.run_dir} was trained and evaluated with "
            f"({'; '.join(map(str, changed))}): they do not belong beside its own, and text that is scored here may have "
            "been trained on.",
            file=sys.stderr,
        )
    text = json.dumps(figures.written, indent=2) + "\n"
    if target is None:
        write(built.run_dir / EVALUATION, text)
    else:
        write_text(target, text)
    if built.recipe.train.ema:
        print(
            "The moving average of the weights:"
            if built.averaged
            else "The weights as they were trained:"
        )
    print_evaluation(figures.evaluation, figures.counted, built.documents.entropy_rate)
    print(f"Written to {out if out is not None else built.run_dir / EVALUATION}")
    return figures.evaluation


def _is_evaluation(file: IO[bytes]) -> bool:
    """Whether a file holds figures that `ddiff eval` wrote."""
    try:
        found = json.load(file)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"step", "weights", "protocol"} <= found.keys()


def _changed_data(built: Run) -> list[Difference]:
    """Which data differ from those of the checkpoint, or from those that evaluation.json speaks of."""
    changed = built.changed_data()
    recorded = (
        read_json(built.run_dir / EVALUATION, allow_missing=True).get("protocol", {}).get("data")
    )
    if isinstance(recorded, str) and not any(
        difference.key == "validation rows" for difference in changed
    ):
        was, now = recorded.partition(",")[0], built.fingerprints()["validation rows"]
        if was != now:
            changed.append(Difference("validation rows", was, now))
    return changed


def sample_run(run_dir: str | Path, count: int | None = None, **asked: Any) -> None:
    """`ddiff sample`: JSON lines on standard output; `asked` are the arguments of `Run.sample`."""
    for sample in load(run_dir).sample(count, **asked):
        print(json.dumps(sample, ensure_ascii=not _writes_unicode()))


def _writes_unicode() -> bool:
    """Whether standard output takes every character; JSON escapes mean the same where it does not."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return encoding.lower().replace("-", "").replace("_", "").startswith("utf")


def _run_stages(recipe: Recipe, given: Overrides, fresh: bool) -> tuple[Run, int]:
    directory, there = Path(recipe.run_dir), place()
    check_directory(directory, recipe, given, fresh)
    leads = there is None or there.rank == 0
    if leads:
        print_foreign(directory, recipe)
    with held(directory) if leads else nullcontext():
        if leads:
            remove_leftovers(directory)
        return _stages(directory, recipe, given, fresh)


def _stages(directory: Path, recipe: Recipe, given: Overrides, fresh: bool) -> tuple[Run, int]:
    built = build_run(recipe, given)
    check_sampling(recipe, built.vocabulary, built.process, built.denoiser, built.objective)
    if fresh or not newest_step(built):
        built.begin()
    writes = built.backend.rank == 0
    if fresh and writes:
        delete_run(
            directory, tracked_names(recipe)
        )  # now that everything else is known to be right
    built.backend.barrier()

    def accepted() -> None:
        # a learning rate that stays constant is the same in a run of more steps
        before = recorded_steps(directory) if recipe.train.schedule == "cosine" else None
        record(directory, recipe, built, given)
        where, kind = built.backend, recipe.backend.component.name
        print_start(recipe.name, built.denoiser, where.device, where.world_size, kind)
        if done := newest_step(built):
            print_going_on(done, recipe.train.steps, before)

    summary = built.train(accepted=accepted if writes else lambda: None)
    built.end_together()
    if summary.exit_code:
        if writes:
            where = (
                f"at step {summary.step} of {summary.steps}, saved"
                if summary.checkpoint
                else "before the first step"
            )
            print(f"Stopped {where}. The same command goes on.", file=sys.stderr)
        return built, summary.exit_code
    built.go_on_alone()
    return built, _after_training(built, summary) if writes else 0


def _after_training(built: Run, summary: TrainingSummary) -> int:
    """Evaluate, sample, and tell of it; the exit code."""
    try:
        evaluation, counted = _evaluate_stage(built)
        samples = _sample_stage(built)
    except KeyboardInterrupt:
        print(
            "Stopped after training, which is saved. The same command evaluates and samples.",
            file=sys.stderr,
        )
        return INTERRUPTED
    what = f"{type(built.process or built.objective).__name__} on {built.vocabulary}"
    if built.averaged:
        what += ", the moving average of its weights"
    rate = built.documents.entropy_rate
    print_summary(built.run_dir, what, built.denoiser, summary, evaluation, counted, rate, samples)
    return 0


class _Figures(NamedTuple):
    """An evaluation with the counting baselines, and both as evaluation.json has them."""

    evaluation: Evaluation
    counted: Baselines
    written: dict[str, Any]


def _evaluate_stage(built: Run) -> tuple[Evaluation, Baselines]:
    """evaluation.json, unless it stands there for this step, evaluated as the recipe has it."""
    path = built.run_dir / EVALUATION
    saved = read_json(path)
    wanted, protocol = _asked(built)
    if saved and {**saved, **saved["protocol"]}.items() >= {**wanted, **protocol}.items():
        try:
            return Evaluation.from_dict(saved), Baselines(*saved["baselines"].values())
        except (KeyError, TypeError) as error:
            raise damage_error(
                path, f"not every figure of an evaluation is there ({error})"
            ) from error
    figures = _evaluated(built)
    write(path, json.dumps(figures.written, indent=2) + "\n")
    return figures.evaluation, figures.counted


def _asked(built: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is evaluated, and how."""
    keys = built.recipe.evaluate
    wanted = {"step": newest_step(built), "weights": "ema" if built.averaged else "trained"}
    return wanted, {"draws": keys.draws, "seed": keys.seed, **built.protocol()}


def _evaluated(built: Run, changed_data: bool = False) -> _Figures:
    wanted, protocol = _asked(built)
    evaluation, counted = built.evaluate(changed_data=changed_data)
    per = f"per_{evaluation.unit}"
    figures = evaluation.to_dict()
    written = {
        **wanted,
        **figures,
        "protocol": {**figures["protocol"], **protocol},
        "baselines": {
            name.replace("per_token", per): value for name, value in counted._asdict().items()
        },
        f"entropy_rate_nats_{per}": built.documents.entropy_rate,
    }
    return _Figures(evaluation, counted, written)


def _sample_stage(built: Run) -> list[dict[str, Any]]:
    """samples.jsonl, unless it stands there for this step."""
    path, timing, step = built.run_dir / SAMPLES, built.run_dir / SAMPLING, newest_step(built)
    saved = read_json_lines(path)
    timed = read_json(timing).get("step") == step
    if (
        timed
        and len(saved) == built.recipe.sample.count
        and all(sample.get("step") == step for sample in saved)
    ):
        return saved
    began = time.monotonic()
    sampler = built.sampler()
    samples = [{"step": step, **sample} for sample in built.sample(sampler=sampler)]
    seconds, tokens = time.monotonic() - began, sum(len(sample["ids"]) for sample in samples)
    figures = {"step": step, "seconds": seconds, "tokens": tokens, "steps": sampler.steps}
    write(timing, json.dumps(figures) + "\n")
    write(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    return samples
