"""Evaluation of a run on tasks of the lm-evaluation-harness: `Run.lm_eval`, `ddiff lm-eval`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ddiff.errors import ArgumentError, DataError, DdiffError, shorten, suggest
from ddiff.plugin.registry import describe_error
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.run_dir.destination import Destination, check_destination, write_text
from ddiff.run_dir.location import check_writable
from ddiff.runs.lm_eval.price import price_requests
from ddiff.runs.lm_eval.record import file_name, make_record
from ddiff.runs.lm_eval.scoring import Request, RequestScorer, Settings
from ddiff.runs.loading import load
from ddiff.runs.record import write_run_file
from ddiff.runs.run import Run

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

FEWSHOT_SEED = 1234
"""Seed of the choice of few-shot examples, the default of the harness."""


@dataclass(frozen=True)
class TaskOptions:
    """Options of the tasks.

    Attributes:
        num_fewshot: number of examples before each question; None: that of the task.
        limit: number of documents per task, or a share of them below 1; None: all.
        include_path: folder with more task definitions.
        gen_kwargs: arguments of generation that replace those of the tasks.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    include_path: str | None = None
    gen_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and not self.limit > 0:
            raise ArgumentError(
                f"limit must be a number of documents, or a share below 1; got {self.limit}."
            )
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ArgumentError(f"num_fewshot must be at least 0; got {self.num_fewshot}.")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ArgumentError(
                f"include_path must be a folder with task definitions (YAML files); got "
                f"{self.include_path}, which does not exist."
            )


def require_harness() -> None:
    """Raise ArgumentError if the package lm_eval is not installed."""
    if find_spec("lm_eval") is None:
        raise ArgumentError(
            "lm-eval: the lm-evaluation-harness is not installed. Install it with "
            "pip install 'discrete-diffusion[lm-eval]'."
        )


def evaluate_tasks(
    run: Run,
    tasks: str | Sequence[str],
    settings: Settings,
    options: TaskOptions,
    *,
    dry_run: bool = False,
    out: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run on tasks of the harness, write the record, and return it.

    The price of the job is printed before it starts. With `dry_run`, only the price is returned.
    `Run.lm_eval` explains the other arguments.
    """
    require_harness()
    names = _check_tasks(tasks)
    target = None
    if out is not None:
        target = check_destination(out, "lm-eval: out", suffix=".json", owned=_is_record)
    elif not dry_run:
        check_writable(run.run_dir)
    manager = _make_manager(options)
    requests = _build_requests(manager, names, options)
    price = price_requests(RequestScorer(run, settings), requests)
    print(f"lm-eval: {price}", file=sys.stderr)
    if dry_run:
        return price.to_dict()
    start = time.monotonic()
    scorer, results = _evaluate(run, manager, names, settings, options)
    seconds = time.monotonic() - start
    harness = _describe_harness(names, options)
    record: dict[str, Any] = _drop_infinite(make_record(scorer, results, price, harness, seconds))
    _write(run, names, target, record)
    return record


def evaluate_run(
    run_dir: Path,
    tasks: Sequence[str],
    settings: Settings,
    options: TaskOptions,
    *,
    dry_run: bool,
    out: str | None,
) -> None:
    """Run `ddiff lm-eval`: load a run, evaluate it on tasks, and print the results."""
    run = load(run_dir)
    require_text_recipe(run.recipe, "ddiff lm-eval")
    record = evaluate_tasks(run, tasks, settings, options, dry_run=dry_run, out=out)
    if dry_run:
        return
    print_record(record)
    place = run.run_dir / file_name(_check_tasks(tasks)) if out is None else out
    print(f"Written to {place}")


def print_record(record: Mapping[str, Any]) -> None:
    """Print the figures of a record, with both kinds of intervals."""
    for name, figure in record["figures"].items():
        line = f"{name}  {figure['value']:.4f} {figure['unit']}"
        if figure["interval"] is not None:
            low, high = figure["interval"]
            line += f"  ({low:.4f} to {high:.4f} for other documents)"
        print(line)
    exact = record["protocol"]["likelihood"] == "exact"
    for task, errors in record["monte_carlo"].items():
        if exact:
            print(f"{task}: exact log-likelihoods")
            continue
        draws = record["protocol"]["draws"]
        if errors["standard_error_nats"] is None:
            print(f"{task}: lower bounds of the log-likelihoods, one draw, error unknown")
            continue
        line = (
            f"{task}: lower bounds of the log-likelihoods, {draws} draws, standard error "
            f"{errors['request_standard_error_nats']:.3f} nats per request"
        )
        if errors["undecided"] is not None:
            line += f"; {errors['undecided']:.1%} of the questions undecided"
        print(line)
        for metric, (low, high) in errors["metrics"].items():
            print(f"  {metric.partition(',')[0]}: Monte-Carlo interval {low:.4f} to {high:.4f}")


# ---------------------------------------------------------------------- tasks


def _check_tasks(tasks: str | Sequence[str]) -> list[str]:
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    names = [part.strip() for name in names for part in str(name).split(",") if part.strip()]
    if not names:
        raise ArgumentError("lm-eval: tasks must name at least one task of the harness; got none.")
    return names


def _make_manager(options: TaskOptions) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=options.include_path)


def _load_tasks(manager: TaskManager, names: Sequence[str], options: TaskOptions) -> dict[str, Any]:
    """Load tasks with their data, and apply the options as the harness does."""
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise ArgumentError(
                f"lm-eval: there is no task {shorten(name)!r}.{suggest(name, manager.all_tasks)} "
                "`lm-eval ls tasks` lists the tasks; include_path (--include-path) names a folder "
                "with more."
            )
    try:
        loaded = manager.load(list(names))
    except DdiffError:
        raise
    except Exception as error:  # of any library that reads data
        raise DataError(
            f"lm-eval: the tasks {', '.join(names)} cannot be loaded: {describe_error(error)}. "
            "Tasks of the harness read their data from the hub, which needs a network."
        ) from error
    for task in loaded["tasks"].values():
        if options.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(options.gen_kwargs), update=True)
        shots = task.get_config("num_fewshot")
        # a task that fixes 0 examples keeps them
        if options.num_fewshot is not None and shots != 0:
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif shots is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    found: dict[str, Any] = loaded["tasks"]
    return found


def _build_requests(
    manager: TaskManager, names: Sequence[str], options: TaskOptions
) -> dict[str, list[Request]]:
    """Return all requests of the tasks, by type."""
    from lm_eval.evaluator_utils import get_sample_size

    from ddiff.runs.lm_eval.model import read_instances

    requests: dict[str, list[Request]] = {}
    for task in _load_tasks(manager, names, options).values():
        task.build_all_requests(limit=get_sample_size(task, options.limit))
        for instance in task.instances:
            repeated = [instance] * (instance.repeats or 1)
            requests.setdefault(instance.request_type, []).extend(read_instances(repeated))
    return requests


def _evaluate(
    run: Run,
    manager: TaskManager,
    names: Sequence[str],
    settings: Settings,
    options: TaskOptions,
) -> tuple[RequestScorer, dict[str, Any]]:
    """Run the harness. Return the scorer that answered the requests, and the results."""
    from lm_eval import simple_evaluate

    from ddiff.runs.lm_eval.model import HarnessModel

    model = HarnessModel(run, **vars(settings), announces=False)
    results = simple_evaluate(
        model=model,
        tasks=list(names),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        gen_kwargs=dict(options.gen_kwargs) if options.gen_kwargs else None,
        task_manager=manager,
        log_samples=False,
        fewshot_random_seed=FEWSHOT_SEED,
    )
    # The harness also returns numbers of numpy. JSON converts them to plain numbers.
    return model.scorer, json.loads(json.dumps(results, default=_to_json))


def _to_json(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _drop_infinite(value: Any) -> Any:
    """Replace NaN and infinite numbers, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: _drop_infinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_drop_infinite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---------------------------------------------------------------------- record


def _describe_harness(names: Sequence[str], options: TaskOptions) -> dict[str, Any]:
    import lm_eval

    return {
        "version": lm_eval.__version__,
        "tasks": list(names),
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "gen_kwargs": dict(options.gen_kwargs or {}),
    }


def _write(
    run: Run, names: Sequence[str], target: Destination | None, record: Mapping[str, Any]
) -> None:
    text = json.dumps(record, indent=2) + "\n"
    if target is None:
        write_run_file(run.run_dir / file_name(names), text)
    else:
        write_text(target, text)


def _is_record(file: IO[bytes]) -> bool:
    """Return whether a file is a record that this module wrote."""
    try:
        found = json.load(file)
    except ValueError:
        return False
    return isinstance(found, dict) and "harness" in found.get("protocol", {})
