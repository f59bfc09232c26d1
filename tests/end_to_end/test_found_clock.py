"""`ddiff clock`: field, path and bounds of a trained tree, use of the found clock, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command, is_refusal
from small import FLAT, working_in

import ddiff as api
from ddiff.core.clock import CdfClock
from ddiff.core.level_paths import tabulate_path
from ddiff.core.schedule import BernsteinSchedule
from ddiff.core.tree import TreeProcess
from ddiff.data.packing import batch_rows
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.evaluation.level_clocks import ReferencedObjective, measure_field
from ddiff.evaluation.likelihood import score_documents
from ddiff.evaluation.ratio import RatioEstimate
from ddiff.progress import show_progress
from ddiff.run_dir.clock_record import ClockRecord, read_clock
from ddiff.runs.clock import ClockSearch, find_clock, log_token_frequencies
from ddiff.runs.evaluation_report import make_report
from ddiff.runs.run import Run

TEXTS = "\n".join(
    f"the {a} {b} sat on the {c}"
    for a in ("old", "red", "wet", "sad")
    for b in ("cat", "hat", "dog")
    for c in "xyzabcd"
)
NEAR = ['objective.times={kind="occupancy"}', "train.steps=12", "denoiser.time=false"]
SEARCH = ClockSearch(cells=4, draws=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with a run `small` of clusters that was trained near its path, and a run `flat`."""
    folder = tmp_path_factory.mktemp("clock")
    with working_in(folder):
        Path("corpus.txt").write_text(TEXTS)
        api.run("small.toml", settings=NEAR)
        api.run("small.toml", settings=[*FLAT, 'name="flat"', "train.steps=2"])
        yield folder


@pytest.fixture(scope="module")
def small(place: Path) -> Run:
    run: Run = api.load("runs/small")
    return run


@pytest.fixture(scope="module")
def record(small: Run) -> ClockRecord:
    return find_clock(small, SEARCH)


def test_chosen_clock_has_the_smallest_bound(record: ClockRecord) -> None:
    bounds = {each.name: each.bound.value for each in record.bounds}
    assert {"diagonal", "recipe"} <= set(bounds)
    assert bounds[record.choice] == min(bounds.values())
    assert record.find_bound(record.choice).minus_diagonal.value <= 0.0
    assert record.trained_near_path


def test_differences_of_bounds_are_those_of_their_values(record: ClockRecord) -> None:
    diagonal = record.find_bound("diagonal").bound.value
    for each in record.bounds:
        assert each.minus_diagonal.value == pytest.approx(each.bound.value - diagonal, abs=1e-9)


def test_documents_of_field_and_comparison_are_different_halves(record: ClockRecord) -> None:
    protocol = record.protocol
    halves = protocol["measured_documents"], protocol["compared_documents"]
    assert abs(halves[0] - halves[1]) <= 1
    assert sum(halves) >= 16


def measure_along(run: Run, edges: torch.Tensor, seed: int) -> float:
    """Return the integral of the measured field along segments between `edges` [n,L]."""
    process = run.process
    assert isinstance(process, TreeProcess)
    with show_progress(None, "test") as bar:
        measured = measure_field(
            process,
            lambda batch: api.as_network(run.denoiser, process, api.build_context(batch)),
            make_batches(run),
            run.data.validation_rows.first_documents(),
            (edges[1:] + edges[:-1]) / 2.0,
            log_p=log_token_frequencies(run),
            length=run.recipe.length,
            draws=2,
            batch=64,
            seed=seed,
            bar=bar,
        )
    return float((measured.means() * edges.diff(dim=0)).sum())


def make_batches(run: Run) -> Callable[[np.ndarray], api.Batch]:
    data = run.data
    return lambda places: batch_rows(
        data.validation_rows, places, conditions=data.validation_conditions
    )


def test_integral_of_the_field_is_the_bound_of_the_recipe_clock(small: Run) -> None:
    """Both estimates are of the same documents, with independent draws.

    The field is measured on the recipe's path, at the middles of 12 segments. The tolerance is five
    Monte-Carlo standard errors.
    """
    process = small.process
    assert isinstance(process, TreeProcess)
    fine = process.clock.cdf(torch.linspace(0.0, 1.0, 1001, dtype=torch.float64))
    edges = tabulate_path(fine, torch.linspace(0.0, 1.0, 13, dtype=torch.float64))
    small.objective.module.eval()
    along = np.array([measure_along(small, edges, seed) for seed in range(5)])
    with show_progress(None, "test") as bar:
        sums = score_documents(
            ReferencedObjective(small.objective, process, log_token_frequencies(small)),
            make_batches(small),
            small.data.validation_rows.first_documents(),
            length=small.recipe.length,
            times=api.FlatTimes(0.0, 1.0, small.recipe.length),
            draws=16,
            seed=9,
            bar=bar,
        )
    bound = RatioEstimate.of(sums.nats, sums.tokens)
    assert bound.monte_carlo is not None
    tolerance = 5.0 * (along.std(ddof=1) / 5**0.5 + bound.monte_carlo.standard)
    assert tolerance < 0.1
    assert along.mean() == pytest.approx(bound.mean, abs=tolerance)


def test_clock_command_writes_a_record_that_evaluation_and_samples_use(
    place: Path, ddiff: Command
) -> None:
    done = ddiff("clock", "runs/small", "--cells", "4", "--draws", "1")
    assert "Chosen clock" in done.out
    found = read_clock("runs/small")
    assert found.run == "small"
    before = Path("runs/small/evaluation.json").read_text()
    ddiff("eval", "runs/small", "--clock", "found")
    written = json.loads(Path("runs/small/evaluation-found-clock.json").read_text())
    assert written["protocol"]["clock"] == "found"
    assert Path("runs/small/evaluation.json").read_text() == before
    done = ddiff("sample", "runs/small", "--clock", "found", "--count", "1")
    assert json.loads(done.out.splitlines()[-1])["nfe"] > 0
    done = ddiff("eval", "runs/small", "--clock", "found", "--generate", "--count", "2")
    assert "found clock" in done.out
    figures = json.loads(Path("runs/small/generation-found-clock.json").read_text())
    assert figures["sampling"]["clock"] == "found"
    assert not Path("runs/small/generation.json").exists()


def test_records_name_the_clock_of_a_run_with_another_clock(place: Path, small: Run) -> None:
    schedules = [BernsteinSchedule([0.0, middle, 1.0]) for middle in (0.8, 0.2)]
    given = small.with_clock(CdfClock(schedules))
    assert make_report(given).written["protocol"]["clock"] == "given"
    assert "clock" not in make_report(small).written["protocol"]
    assert api.evaluate_generation(given, count=2).written["sampling"]["clock"] == "given"
    assert "clock" not in api.evaluate_generation(small, count=2).written["sampling"]


def test_loaded_run_has_the_chosen_clock(place: Path, small: Run, record: ClockRecord) -> None:
    path = Path("runs/small/clock.json")
    chosen = record.model_copy(update={"choice": "diagonal"})
    path.write_text(chosen.to_json())
    found = api.load("runs/small", clock="found")
    t = torch.tensor([0.5], dtype=torch.float64)
    assert not torch.allclose(found.process.clock.cdf(t), small.process.clock.cdf(t))
    path.write_text(record.model_copy(update={"choice": "recipe"}).to_json())
    found = api.load("runs/small", clock="found")
    assert torch.equal(found.process.clock.cdf(t), small.process.clock.cdf(t))


def test_clock_of_other_weights_is_refused(place: Path, record: ClockRecord) -> None:
    path = Path("runs/small/clock.json")
    path.write_text(record.model_copy(update={"step": 3}).to_json())
    with pytest.raises(CheckpointError, match="step 3"):
        api.load("runs/small", clock="found")
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        api.load("runs/small", clock="found")
    path.unlink()
    with pytest.raises(CheckpointError, match="ddiff clock"):
        api.load("runs/small", clock="found")
    with pytest.raises(ArgumentError, match='"recipe" or "found"'):
        api.load("runs/small", clock="best")


def test_clock_needs_a_tree_and_eight_documents(place: Path, small: Run, ddiff: Command) -> None:
    assert is_refusal(ddiff("clock", "runs/flat"))
    assert not Path("runs/flat/clock.json").exists()
    with pytest.raises(ArgumentError, match="two or more levels"):
        find_clock("runs/flat")
    few = api.load("runs/small", settings=["evaluate.rows=5"])
    with pytest.raises(ArgumentError, match="at least 8 documents"):
        find_clock(few)
    with pytest.raises(ArgumentError, match="draws must be at least 1"):
        ClockSearch(draws=0)
    with pytest.raises(ArgumentError, match="cells must be at least 4"):
        ClockSearch(cells=3)
    schedules = [BernsteinSchedule([0.0, middle, 1.0]) for middle in (0.8, 0.2)]
    with pytest.raises(ArgumentError, match='clock_source = "given"'):
        find_clock(small.with_clock(CdfClock(schedules)))
