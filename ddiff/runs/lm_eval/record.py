"""Record of an evaluation by the harness: `lm-eval-NAME.json`. This module needs no harness."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddiff.evaluation.intervals import NORMAL95, student95, wilson95
from ddiff.run_dir.evaluation_record import LARGEST_EXPONENT, SCHEMA_VERSION, Figure
from ddiff.runs.evaluation_header import (
    describe_components,
    describe_provenance,
    fingerprint_weights,
)
from ddiff.runs.lm_eval.price import Price
from ddiff.runs.lm_eval.scoring import RequestScorer
from ddiff.runs.provenance import component_fingerprints
from ddiff.runs.sampling import build_sampler

LONGEST_NAME = 80  # characters of the tasks in the name of a file

UNITS = {
    "acc": "share",
    "acc_norm": "share",
    "acc_bytes": "share",
    "acc_mutual_info": "share",
    "exact_match": "share",
    "perplexity": "perplexity",
    "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte",
    "bits_per_byte": "bits/byte",
}
"""Units of common metrics of the harness; other metrics have the unit "metric"."""

PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")
"""Metrics whose logarithm is proportional to the nats of the task."""


def file_name(tasks: Sequence[str]) -> str:
    """Return the name of the file with the results of the given tasks."""
    name = re.sub(r"[^\w.-]+", "_", "_".join(tasks)).strip("._-") or "tasks"
    if len(name) > LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[:LONGEST_NAME]}-{digest}"
    return f"lm-eval-{name}.json"


def describe_job(scorer: RequestScorer) -> dict[str, Any]:
    """Return the settings of an evaluation and the Monte-Carlo errors of its likelihoods."""
    run = scorer.run
    return {
        "run": str(run.run_dir),
        "step": run.step,
        "weights": "ema" if run.uses_ema else "trained",
        "protocol": describe_protocol(scorer),
        "fingerprints": describe_fingerprints(scorer),
        "monte_carlo": {task: found.to_dict() for task, found in scorer.errors.items()},
    }


def describe_protocol(scorer: RequestScorer) -> dict[str, Any]:
    """Return everything that determines the figures, except the run and the tasks."""
    run = scorer.run
    settings = scorer.settings
    return {
        "likelihood": "exact" if scorer.is_exact else "bound",
        "draws": scorer.conditional.draws,
        "seed": scorer.conditional.seed,
        "window": list(run.recipe.evaluate.window),
        "length": run.recipe.length,
        "tokenizer": run.tokenizer.fingerprint,
        "greedy": settings.greedy,
        "truncate": settings.truncate,
        "truncated_contexts": scorer.num_truncated,
        "texts_that_the_tokenizer_changes": scorer.encoder.num_lossy,
        "conditions": {name: _plain(value) for name, value in settings.conditions.items()},
    }


def describe_fingerprints(scorer: RequestScorer) -> dict[str, str]:
    """Return the fingerprints of weights, tokenizer and vocabulary."""
    run = scorer.run
    return {"weights": fingerprint_weights(run), **component_fingerprints(run.data, run.model)}


def describe_sampler(scorer: RequestScorer) -> dict[str, Any]:
    """Return the sampler of generated texts and its settings."""
    request = scorer.sample_request(())
    run = scorer.run
    sampler = build_sampler(run.recipe, run.model, request.sampler, request.settings, request.steps)
    return {
        "sampler": request.sampler or run.recipe.sampler.component.name,
        "samples": scorer.sampled,
        "steps": sampler.steps,
        "seed": run.recipe.sample.seed if request.seed is None else request.seed,
    }


def make_record(
    scorer: RequestScorer,
    results: Mapping[str, Any],
    price: Price,
    harness: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Return the content of lm-eval-NAME.json.

    Args:
        scorer: scorer that answered the requests.
        results: results of the harness.
        price: price of the job.
        harness: settings of the harness: its version, tasks, few-shot examples and limit.
        seconds: duration of the evaluation.
    """
    job = describe_job(scorer)
    figures = {}
    for name, figure in make_figures(results, job["protocol"], harness):
        figures[name] = figure.model_dump(mode="json")
    monte_carlo = job["monte_carlo"]
    for task, errors in monte_carlo.items():
        errors["metrics"] = monte_carlo_intervals(results["results"].get(task, {}), errors)
    return {
        "schema_version": SCHEMA_VERSION,
        "step": job["step"],
        "weights": job["weights"],
        "figures": figures,
        "protocol": {**job["protocol"], "harness": dict(harness)},
        "fingerprints": job["fingerprints"],
        "components": describe_components(scorer.run),
        "sampler": describe_sampler(scorer) if scorer.sampled else None,
        "monte_carlo": monte_carlo,
        "price": price.to_dict(),
        "results": results["results"],
        "groups": results.get("groups", {}),
        "versions": results.get("versions", {}),
        "n-shot": results.get("n-shot", {}),
        "n-samples": results.get("n-samples", {}),
        "provenance": describe_provenance(scorer.run, seconds),
    }


def make_figures(
    results: Mapping[str, Any], protocol: Mapping[str, Any], harness: Mapping[str, Any]
) -> Iterator[tuple[str, Figure]]:
    """Iterate over the metrics of all tasks as figures, such as `arc_easy: acc`.

    The interval is that of other documents of the same task, from the standard error of the
    harness. Metrics without a finite number are left out.
    """
    likelihood = protocol["likelihood"]
    if likelihood == "bound":
        likelihood += f" of {protocol['draws']} draws"
    limit = harness.get("limit")
    shown = f"lm-eval {harness['version']}, {likelihood}"
    if limit is not None:
        shown += f", limit {limit:g}"
    for task, metrics in results["results"].items():
        shots = results.get("n-shot", {}).get(task, 0)
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not _is_finite(value) or not chosen or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            count = _count_documents(results, task)
            name = f"{task}: {metric}"
            if chosen != "none":
                name += f", {chosen}"
            yield (
                name,
                Figure(
                    value=float(value),
                    interval=_interval(metric, value, error, count),
                    unit=UNITS.get(metric, "metric"),
                    protocol=f"{shown}, {shots} examples",
                ),
            )


def _count_documents(results: Mapping[str, Any], task: str) -> int | None:
    """Return the number of documents of a task or of a group of tasks; None if it is unknown."""
    parts = results.get("group_subtasks", {}).get(task) or ()
    if not parts:
        count = results.get("n-samples", {}).get(task, {}).get("effective")
        return None if count is None else int(count)
    counts = [_count_documents(results, part) for part in parts]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _interval(
    metric: str, value: float, error: Any, count: int | None
) -> tuple[float, float] | None:
    """Return the 95 % interval of a metric for other documents of the same task.

    Shares have the interval of Wilson for `count` documents. Other metrics have the interval of
    Student with count - 1 degrees of freedom, or a normal interval if `count` is unknown. The
    standard error `error` of a perplexity is that of its logarithm times the perplexity. Returns
    None if the harness has no standard error, or if one document shows none.
    """
    if UNITS.get(metric) == "share" and count and 0.0 <= value <= 1.0:
        return wilson95(value * count, count)
    if not _is_finite(error) or count == 1:
        return None
    quantile = NORMAL95 if not count else student95(count - 1)
    half = quantile * float(error)
    if metric in PERPLEXITIES and value > 0.0:
        return _scaled(value, half / value)
    return value - half, value + half


def monte_carlo_intervals(
    metrics: Mapping[str, Any], errors: Mapping[str, Any]
) -> dict[str, tuple[float, float]]:
    """Return the Monte-Carlo intervals (95 %) of the perplexities and the bits of a task.

    `metrics` are the results of the task, and `errors` the output of `TaskErrors.to_dict`. The
    logarithm of a perplexity, and the bits per byte, are the nats of the task divided by a fixed
    number, so their relative error is that of the nats.
    """
    half = errors["half_width_nats"]
    nats = errors["nats"]
    if not half or not nats:
        return {}
    relative = half / abs(nats)
    found = {}
    for key, value in metrics.items():
        metric, _, chosen = key.partition(",")
        if not _is_finite(value) or not chosen:
            continue
        if metric == "bits_per_byte":
            found[key] = (value * (1.0 - relative), value * (1.0 + relative))
        elif metric in PERPLEXITIES and value > 0.0:
            found[key] = _scaled(value, abs(math.log(value)) * relative)
    return found


def _scaled(value: float, half: float) -> tuple[float, float]:
    """Return the interval of a positive value whose logarithm has the half width `half`."""
    ratio = math.exp(min(half, LARGEST_EXPONENT))
    # a larger number has no JSON form
    return value / ratio, min(value * ratio, sys.float_info.max)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """Return a condition as a JSON value."""
    return value.tolist() if hasattr(value, "tolist") else value
