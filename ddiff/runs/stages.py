"""The stages of a run: train, evaluate, sample, each written to its directory and not done again; and what calls them."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.documents import find_files
from ddiff.data.tokenizer import load_tokenizer
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.evaluation.baselines import Baselines
from ddiff.evaluation.likelihood import Evaluation
from ddiff.launch import place
from ddiff.recipe import Recipe, read_recipe
from ddiff.runs.built import Run, build_run
from ddiff.runs.directory import (
    ENVIRONMENT,
    EVALUATION,
    RECIPE,
    SAMPLES,
    SAMPLING,
    TOKENIZER,
    VOCABULARY,
    check_directory,
    check_writable,
    checkpoints_of,
    held,
    newest_step,
    parsed,
    read_json,
    record,
    recorded_steps,
    remove_leftovers,
    write,
)
from ddiff.runs.init import check_source
from ddiff.runs.parts import (
    Given,
    backend_alone,
    build_objective,
    build_process,
    check_backend,
    check_sampling,
    check_tokenizer,
    outlined,
)
from ddiff.summary import print_evaluation, print_going_on, print_start, print_summary
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
        raise ArgumentError("ddiff.run: settings go over a recipe by path or name; got them with one already read.")
    resolved = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, settings)
    built, code = _run_stages(resolved, Given(vocabulary, process), fresh)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
    return built


def load(run_dir: str | Path, *, process: ForwardProcess | None = None, settings: Iterable[str] = ()) -> Run:
    """A trained run with its newest weights. `process` is needed when the run was given one from Python; `settings` are
    `--set` texts of the tables [evaluate] and [sample], which change nothing that was trained."""
    directory = Path(run_dir)
    checkpoints_of(directory)  # refuses what is no trained run
    settings = list(settings)
    if alien := [setting for setting in settings if not setting.lstrip().startswith(("evaluate.", "sample."))]:
        raise ArgumentError(
            f"settings of a trained run must be a list of keys of [evaluate] or [sample], such as evaluate.draws=4; got "
            f"{alien[0]!r}. Whatever else is changed makes another run."
        )
    recipe = read_recipe(directory / RECIPE, [f"run_dir={json.dumps(str(run_dir))}", *settings])
    made_with = read_json(directory / ENVIRONMENT).get("given", {})
    if "process" in made_with and process is None:
        raise CheckpointError(
            f"{run_dir} was trained with a process given from Python ({made_with['process']}), which no recipe can name. "
            "Load it with ddiff.load(run_dir, process=...)."
        )
    tokenizer = load_tokenizer(str(directory / TOKENIZER))
    vocabulary = Vocabulary.load(str(directory / VOCABULARY))
    check_tokenizer(tokenizer, vocabulary)
    built = Run(recipe, tokenizer, vocabulary, Given(process=process), backend_alone(recipe))
    built.load_weights()
    return built


def run_recipe(recipe: Recipe, *, fresh: bool = False) -> int:
    """`ddiff run`: every stage, then a summary; the exit code (130 or 143 after a signal)."""
    _, code = _run_stages(recipe, Given(), fresh)
    return code


def rehearse(recipe: Recipe, *, fresh: bool = False) -> None:
    """`ddiff run --dry-run`: refuse what can be known to fail before any data is read.

    The run directory, the files that are named, the device; and where the recipe tells how many tokens there are, the
    parts that stand on a vocabulary, built on one of the same shape.
    """
    check_directory(Path(recipe.run_dir), recipe, Given(), fresh)
    check_backend(recipe)
    for part in recipe.parts().values():
        with part.blamed():
            for pattern in part.reads():
                find_files(pattern)
    recipe.data.preview()
    vocabulary = recipe.vocabulary.preview(num_tokens=recipe.tokenizer.preview())
    if (init := recipe.train.init) is not None and init.run is not None:
        check_source(init.run)
    if vocabulary is not None:
        process = build_process(recipe, vocabulary)
        denoiser = outlined(recipe, vocabulary)
        objective = build_objective(recipe, process, denoiser)
        check_sampling(recipe, vocabulary, process, getattr(objective, "denoiser", denoiser), objective)


def evaluate_run(run_dir: str | Path, settings: Iterable[str] = ()) -> Evaluation:
    """`ddiff eval`: evaluate anew, with `settings` over [evaluate], and write evaluation.json."""
    built = load(run_dir, settings=settings)
    check_writable(built.run_dir)
    evaluation, counted = _evaluate_stage(built, again=True)
    if built.recipe.train.ema:
        print("The moving average of the weights:" if built.averaged else "The weights as they were trained:")
    print_evaluation(evaluation, counted, built.documents.entropy_rate)
    print(f"Written to {built.run_dir / EVALUATION}")
    return evaluation


def sample_run(run_dir: str | Path, count: int | None = None, **asked: Any) -> None:
    """`ddiff sample`: JSON lines on standard output; `asked` are the arguments of `Run.sample`."""
    for sample in load(run_dir).sample(count, **asked):
        print(json.dumps(sample, ensure_ascii=False))


def _run_stages(recipe: Recipe, given: Given, fresh: bool) -> tuple[Run, int]:
    directory, there = Path(recipe.run_dir), place()
    check_directory(directory, recipe, given, fresh)
    leads = there is None or there.rank == 0
    with held(directory) if leads else nullcontext():
        if leads:
            remove_leftovers(directory)
        return _stages(directory, recipe, given, fresh)


def _stages(directory: Path, recipe: Recipe, given: Given, fresh: bool) -> tuple[Run, int]:
    built = build_run(recipe, given)
    check_sampling(recipe, built.vocabulary, built.process, built.denoiser, built.objective)
    if fresh or not newest_step(built):
        built.begin()
    writes = built.backend.rank == 0
    if fresh and writes and directory.exists():
        shutil.rmtree(directory)  # now that everything else is known to be right
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
                f"at step {summary.step} of {summary.steps}, saved" if summary.checkpoint else "before the first step"
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
        print("Stopped after training, which is saved. The same command evaluates and samples.", file=sys.stderr)
        return INTERRUPTED
    what = f"{type(built.process or built.objective).__name__} on {built.vocabulary}"
    if built.averaged:
        what += ", the moving average of its weights"
    rate = built.documents.entropy_rate
    print_summary(built.run_dir, what, built.denoiser, summary, evaluation, counted, rate, samples)
    return 0


def _evaluate_stage(built: Run, again: bool = False) -> tuple[Evaluation, Baselines]:
    """evaluation.json, unless it stands there for this step, evaluated as the recipe has it."""
    path, step, keys = built.run_dir / EVALUATION, newest_step(built), built.recipe.evaluate
    saved = read_json(path)
    wanted = {"step": step, "weights": "ema" if built.averaged else "trained"}
    protocol = {"draws": keys.draws, "seed": keys.seed, **built.protocol()}
    stands = "bound" in saved and {**saved, **saved["protocol"]}.items() >= {**wanted, **protocol}.items()
    if stands and not again:
        return Evaluation.from_dict(saved), Baselines(*saved["baselines"].values())
    evaluation, counted = built.evaluate()
    per = f"per_{evaluation.unit}"
    figures = evaluation.to_dict()
    written: Mapping[str, Any] = {
        **wanted,
        **figures,
        "protocol": {**figures["protocol"], **protocol},
        "baselines": {name.replace("per_token", per): value for name, value in counted._asdict().items()},
        f"entropy_rate_nats_{per}": built.documents.entropy_rate,
    }
    write(path, json.dumps(written, indent=2) + "\n")
    return evaluation, counted


def _sample_stage(built: Run) -> list[dict[str, Any]]:
    """samples.jsonl, unless it stands there for this step."""
    path, timing, step = built.run_dir / SAMPLES, built.run_dir / SAMPLING, newest_step(built)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    saved = [parsed(line, path) for line in lines]
    timed = read_json(timing).get("step") == step
    if timed and len(saved) == built.recipe.sample.count and all(sample.get("step") == step for sample in saved):
        return saved
    began = time.monotonic()
    sampler = built.sampler()
    samples = [{"step": step, **sample} for sample in built.sample(sampler=sampler)]
    seconds, tokens = time.monotonic() - began, sum(len(sample["ids"]) for sample in samples)
    figures = {"step": step, "seconds": seconds, "tokens": tokens, "steps": sampler.steps}
    write(timing, json.dumps(figures) + "\n")
    write(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    return samples
