"""Compute the band of healthy runs of a shipped recipe, from runs with several seeds.

    for seed in 0 1 2 3; do
        ddiff run mdlm_small --set seed=$seed --set evaluate.every=125 --set run_dir=runs/mdlm_$seed
    done
    python benchmarks/bands.py mdlm_small runs/mdlm_{0,1,2,3}

The script writes ddiff/runs/report/healthy/RECIPE.json, which `ddiff report` draws behind the
curves of runs of this recipe. The band at a training step is a prediction interval for one more
seed: with the mean m of n seeds and their variance v,

    m - w ... m + w,    w = t_{0.975, n-1} sqrt( v (1 + 1/n) ),

where t is the quantile of Student's distribution. The variance v of the training loss is a mean
over neighbouring steps, and that of the validation bound a mean over all evaluations, because a
variance of few seeds has a large error. The interval assumes normal differences between seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import ddiff.runs.report
from ddiff.evaluation.intervals import student95
from ddiff.runs.report.bands import HealthyBand, Range, select_keys
from ddiff.runs.report.curves import read_losses, read_validation
from ddiff.runs.report.run_files import ReportedRun, read_runs

GRID = 10  # training steps between two points of a band
NEIGHBOURS = 0.1  # of the training steps: window over which the variance is averaged
RULE = "95 % prediction interval for one more seed (Student), variance averaged over steps"
RECORDED = ("ddiff", "torch", "python", "machine", "device")


def make_band(recipe: str, runs: Sequence[ReportedRun]) -> HealthyBand:
    """Compute the band of a recipe. Raises ValueError if the runs are not seeds of one recipe."""
    keys = [select_keys(run.record.recipe) for run in runs]
    if any(other != keys[0] for other in keys):
        raise ValueError("the runs differ in more than their seeds")
    seeds = [run.record.recipe["seed"] for run in runs]
    if len(set(seeds)) < max(3, len(seeds)):
        raise ValueError(f"at least three different seeds are needed; got {seeds}")
    environments = [run.record.environment for run in runs]
    provenance = {
        name: sorted({str(found.get(name)) for found in environments}) for name in RECORDED
    }
    return HealthyBand(
        recipe=recipe,
        keys=keys[0],
        seeds=sorted(seeds),
        rule=RULE,
        train_loss=predict_losses(runs),
        validation=predict_validation(runs),
        provenance=provenance,
    )


def predict_losses(runs: Sequence[ReportedRun]) -> Range:
    """Return the band of the smoothed training loss, at multiples of `GRID`."""
    curves = [dict(read_losses(run, smoothed=True)) for run in runs]
    last = min(max(curve) for curve in curves)
    steps = list(range(GRID, int(last) + 1, GRID))
    values = np.array([[curve[step] for step in steps] for curve in curves])
    half = round(NEIGHBOURS * last / GRID / 2)
    variance = values.var(0, ddof=1)
    averaged = np.empty_like(variance)
    for place in range(len(steps)):
        averaged[place] = variance[max(0, place - half) : place + half + 1].mean()
    return predict_range(steps, values, averaged)


def predict_validation(runs: Sequence[ReportedRun]) -> Range:
    """Return the band of the validation bound, at the steps that several seeds evaluated."""
    curves = [dict(read_validation(run)) for run in runs]
    every = sorted({step for curve in curves for step in curve})
    steps = [step for step in every if sum(step in curve for curve in curves) >= 3]
    means, variances, counts = [], [], []
    for step in steps:
        found = np.array([curve[step] for curve in curves if step in curve])
        means.append(float(found.mean()))
        variances.append(float(found.var(ddof=1)))
        counts.append(len(found))
    variance = float(np.mean(variances))
    widths = [half_width(variance, count) for count in counts]
    return Range(
        steps=[int(step) for step in steps],
        low=[round(mean - width, 5) for mean, width in zip(means, widths)],
        high=[round(mean + width, 5) for mean, width in zip(means, widths)],
    )


def predict_range(
    steps: list[int], values: NDArray[np.float64], variance: NDArray[np.float64]
) -> Range:
    """Return the prediction intervals of values [seeds, steps] with the variance at each step."""
    mean = values.mean(0)
    width = np.array([half_width(value, len(values)) for value in variance])
    low = np.round(mean - width, 5).tolist()
    return Range(steps, low, np.round(mean + width, 5).tolist())


def half_width(variance: float, count: int) -> float:
    """Return w of the prediction interval m - w ... m + w for one more value.

    `variance` is the variance of `count` values with the mean m.
    """
    return student95(count - 1) * float(np.sqrt(variance * (1 + 1 / count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", help="name of a shipped recipe")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, one per seed")
    given = parser.parse_args()
    band = make_band(given.recipe, read_runs(given.runs))
    folder = Path(ddiff.runs.report.__file__).parent / "healthy"
    folder.mkdir(exist_ok=True)
    path = folder / f"{given.recipe}.json"
    path.write_text(band.to_json(), encoding="utf-8")
    print(f"{path.name}: seeds {band.seeds}, validation {band.validation}")


if __name__ == "__main__":
    main()
