"""Charts of a report: training curves, bounds, and their parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ddiff.runs.report.bands import HealthyBand, Range, find_band
from ddiff.runs.report.charts import Band, Bar, BarChart, Chart, Line, average_bins, smooth
from ddiff.runs.report.run_files import ReportedRun

Point = tuple[float, float]
SMOOTHED_SHARE = 0.04  # window of smoothed curves, as a fraction of the planned training steps
GRAY = 7  # colour of reference lines


def make_charts(runs: Sequence[ReportedRun]) -> list[Chart | BarChart]:
    """Return all charts of the runs. Charts without values are left out."""
    charts: list[Chart | BarChart] = []
    charts += _make_training_charts(runs)
    charts += _make_validation_charts(runs)
    charts += _make_bound_charts(runs)
    charts += _make_time_charts(runs)
    charts += _make_target_charts(runs)
    return charts


# ---------------------------------------------------------------------- training


def _make_training_charts(runs: Sequence[ReportedRun]) -> Iterator[Chart]:
    losses: list[Line] = []
    norms: list[Line] = []
    speeds: list[Line] = []
    for run in runs:
        losses += _draw_smoothed(run, read_losses(run))
        norms += _draw_smoothed(run, _read_points(run, "grad_norm"))
        speeds.append(Line(_compute_speed(run.metrics), run.number, label=run.name))
    if any(line.points for line in losses):
        bands, note = _draw_bands(runs, "train_loss")
        lines = [*losses, *_draw_references(runs)]
        title = f"Training loss, nats per {_name_unit(runs)}"
        yield Chart("training-loss", title, "training step", lines, bands=bands, note=note)
    if any(line.points for line in norms):
        title = "Gradient norm (logarithmic)"
        yield Chart("gradient-norm", title, "training step", norms, is_log=True)
    if any(line.points for line in speeds):
        title = f"Training speed, {_name_unit(runs, 's')} per second"
        yield Chart("speed", title, "training step", speeds)


def _name_unit(runs: Sequence[ReportedRun], ending: str = "") -> str:
    """Return the unit of the bounds with an ending: "token", "symbol", or both if runs differ."""
    units = {run.bound.unit for run in runs if run.bound is not None}
    return " or ".join(f"{unit}{ending}" for unit in sorted(units or {"token"}, reverse=True))


def _read_points(run: ReportedRun, key: str) -> list[Point]:
    return [(line["step"], line[key]) for line in run.metrics if key in line]


def read_losses(run: ReportedRun, smoothed: bool = False) -> list[Point]:
    """Return pairs (step, training loss), or the moving mean that a report draws."""
    points = _read_points(run, "train_loss")
    return smooth(points, _choose_window(run)) if smoothed else points


def _choose_window(run: ReportedRun) -> int:
    """Return the number of steps of a moving mean.

    It depends on the planned steps, so that an unfinished run is as smooth as a finished run.
    """
    return max(1, round(SMOOTHED_SHARE * run.record.recipe["train"]["steps"]))


def _draw_smoothed(run: ReportedRun, points: Sequence[Point]) -> list[Line]:
    """Return a faint line of all values and a line of their moving mean."""
    smoothed = smooth(points, _choose_window(run))
    return [
        Line(average_bins(points), run.number, "faint"),
        Line(average_bins(smoothed), run.number, label=run.name),
    ]


def _draw_bands(
    runs: Sequence[ReportedRun], figure: Literal["train_loss", "validation"]
) -> tuple[list[Band], str]:
    """Return the bands of healthy runs of the recipes, and a text that explains them."""
    bands = []
    drawn: dict[str, HealthyBand] = {}
    for run in runs:
        found = find_band(run)
        if found is None or found.recipe in drawn:
            continue
        drawn[found.recipe] = found
        points = _list_band(getattr(found, figure))
        label = f"healthy runs of {found.recipe}"
        bands.append(Band(points, run.number, label))
    return bands, _explain_bands(list(drawn.values()))


def _list_band(found: Range) -> list[tuple[float, float, float]]:
    points: list[tuple[float, float, float]] = list(zip(found.steps, found.low, found.high))
    if len(points) == 1:
        # the range of a single step is drawn with a small width
        step, low, high = points[0]
        points.insert(0, ((1 - SMOOTHED_SHARE) * step, low, high))
    return points


def _explain_bands(found: Sequence[HealthyBand]) -> str:
    """Explain the bands in one sentence for each rule and number of seeds."""
    recipes: dict[tuple[str, int], list[str]] = {}
    for band in found:
        recipes.setdefault((band.rule, len(band.seeds)), []).append(band.recipe)
    sentences = []
    for (rule, seeds), names in recipes.items():
        sentences.append(f"Band: healthy runs of {', '.join(names)}; {rule}, from {seeds} seeds.")
    return " ".join(sentences)


def _compute_speed(metrics: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return tokens per second in at most 40 intervals of at least 10 steps.

    The speed of a single step is not used: steps are timed only where their figures are read.
    """
    size = max(10, -(-len(metrics) // 40))
    points: list[Point] = []
    for start in range(0, len(metrics), size):
        chosen = metrics[start : start + size]
        seconds = sum(line["seconds"] for line in chosen)
        tokens = sum(line["tokens"] for line in chosen)
        # the last interval may have too few steps for a speed
        if seconds > 0 and (len(chosen) == size or not points):
            points.append((chosen[-1]["step"], tokens / seconds))
    return points


# ---------------------------------------------------------------------- validation


def _make_validation_charts(runs: Sequence[ReportedRun]) -> Iterator[Chart]:
    """Make the chart of the validation bound during training, with lines of simple models."""
    lines = [Line(read_validation(run), run.number, "points", run.name) for run in runs]
    bands, note = _draw_bands(runs, "validation")
    most = max(len(line.points) for line in lines)
    # single bounds are shown as bars, with their intervals
    if most == 0 or (most == 1 and not bands):
        return
    lines += _draw_references(runs)
    title = f"Validation bound, nats per {_name_unit(runs)}"
    yield Chart("validation-bound", title, "training step", lines, bands=bands, note=note)


def read_validation(run: ReportedRun) -> list[Point]:
    """Return pairs (step, validation bound), of evaluations during and after training."""
    points: list[Point] = []
    for line in run.metrics:
        for key, value in line.items():
            is_bound = key.startswith("validation_n") and "_nats_per_" in key
            if is_bound and not run.has_fields:
                points.append((line["step"], value))
    bound = run.bound
    if bound is not None and run.metrics:
        last = run.metrics[-1]["step"]
        points = [point for point in points if point[0] != last]
        points.append((last, bound.nats))
    return points


def _draw_references(runs: Sequence[ReportedRun]) -> Iterator[Line]:
    """Draw the unigram and bigram baselines and the entropy of the source.

    Nothing is drawn for runs with different validation text, whose baselines differ.
    """
    bounds = [run.bound for run in runs if run.bound is not None]
    if not bounds or any(bound.baselines != bounds[0].baselines for bound in bounds):
        return
    last = max([run.metrics[-1]["step"] for run in runs if run.metrics], default=1)
    levels = dict(bounds[0].baselines)
    if bounds[0].entropy_rate is not None:
        levels["entropy of the source"] = bounds[0].entropy_rate
    for name, value in levels.items():
        yield Line([(1, value), (last, value)], GRAY, "dashed", name)


# ---------------------------------------------------------------------- bound


def _make_bound_charts(runs: Sequence[ReportedRun]) -> Iterator[BarChart]:
    bounds = [(run, run.bound) for run in runs if run.bound is not None]
    totals: dict[str, list[Bar]] = {}
    terms: dict[str, list[Bar]] = {}
    parts: dict[str, list[Bar]] = {}
    for run, bound in bounds:
        assert bound is not None
        bar = Bar(run.name, bound.nats, run.number, bound.interval)
        totals.setdefault(run.name, []).append(bar)
        for name, value in bound.terms.items():
            terms.setdefault(name, []).append(Bar(run.name, value, run.number))
        for name, value in bound.parts.items():
            parts.setdefault(_name_part(name), []).append(Bar(run.name, value, run.number))
    for name, value in _common_baselines(bounds).items():
        totals[name] = [Bar(name, value, GRAY)]
    found = {
        "bound": ("Validation bound with 95 % interval", totals),
        "bound-terms": ("Terms of the bound", terms),
        "bound-parts": ("Parts of the diffusion term, such as levels", parts),
    }
    for name, (title, groups) in found.items():
        if groups:
            yield BarChart(name, title, f"nats per {_name_unit(runs)}", list(groups.items()))


def _make_time_charts(runs: Sequence[ReportedRun]) -> Iterator[Chart]:
    """Make the chart of the diffusion term of the bound by information time."""
    lines = []
    count = 0
    for run in runs:
        bins = run.evaluation.get("time_bins", ()) if run.bound is not None else ()
        points = [((each["start"] + each["stop"]) / 2, each["nats"]) for each in bins]
        count = max(count, len(points))
        lines.append(Line(points, run.number, "points", run.name))
    if count:
        note = (
            f"Each point is the part of one of {count} equal intervals of information time; 0 is "
            "clean text, 1 the prior. The parts add up to the diffusion term."
        )
        title = f"Diffusion term by time, nats per {_name_unit(runs)}"
        yield Chart("bound-by-time", title, "information time", lines, note=note)


def _name_part(name: str) -> str:
    """Return the title of a part of the bound: "level1" becomes "level 1"."""
    return re.sub(r"(?<=[a-z])(?=\d)", " ", name.replace("_", " "))


def _common_baselines(bounds: Sequence[tuple[ReportedRun, Any]]) -> Mapping[str, float]:
    if not bounds:
        return {}
    first: Mapping[str, float] = bounds[0][1].baselines
    return first if all(bound.baselines == first for _, bound in bounds) else {}


def _make_target_charts(runs: Sequence[ReportedRun]) -> Iterator[BarChart]:
    """Make the chart of the bounds of runs of several fields, by target."""
    groups: dict[tuple[str, str], list[Bar]] = {}
    for run in runs:
        for target, found in run.evaluation.get("targets", {}).items():
            groups.setdefault((target, ""), []).append(_make_bar(run, run.name, found))
            for control, bound in found.get("controls", {}).items():
                name = f"{run.name}, {target}, given {control}"
                groups.setdefault((target, control), []).append(_make_bar(run, name, bound))
    shown = []
    for target in dict.fromkeys(target for target, _ in groups):
        for (drawn, control), bars in groups.items():
            if drawn == target:
                shown.append((f"· {control}" if control else target, bars))
    if shown:
        title = "Bounds of the targets, and with other given values (·)"
        yield BarChart("targets", title, "nats per sample", shown)


def _make_bar(run: ReportedRun, name: str, found: Mapping[str, Any]) -> Bar:
    low_high = found.get("interval")
    interval = (low_high[0], low_high[1]) if low_high else None
    return Bar(name, found["nats_per_sample"], run.number, interval)
