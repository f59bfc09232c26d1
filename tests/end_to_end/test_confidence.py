"""Confidence of the network in the states of a trajectory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small import AUTOREGRESSIVE, FLAT, make_autoregressive_recipe, working_in

import ddiff as api
from ddiff.core.times import Noisy
from ddiff.nn.network import as_network
from ddiff.runs.confidence import make_meter
from ddiff.runs.report.trajectories import Trajectory, read_trajectories, to_json
from ddiff.runs.run import Run
from ddiff.runs.trajectory import TrajectoryRecorder, draw_trajectories, find_start


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with three trained runs: `tree` with clusters, `flat`, and the autoregressive `ar`."""
    folder = tmp_path_factory.mktemp("confidence")
    torch.set_num_threads(1)
    with working_in(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        api.run("small.toml", settings=['name="tree"', "train.steps=12"])
        api.run("small.toml", settings=[*FLAT, 'name="flat"', "train.steps=12"])
        Path("ar.toml").write_text(make_autoregressive_recipe())
        api.run("ar.toml", settings=[*AUTOREGRESSIVE, 'name="ar"', "train.steps=12"])
        yield folder / "runs"


def predict(run: Run, states: list[int], time: float, level: int) -> torch.Tensor:
    """Return the predicted probabilities [L,n] of the nodes of a level at all masked positions."""
    zt = torch.tensor([states])
    times = torch.full(zt.shape, time, dtype=torch.float64)
    query = as_network(run.denoiser.eval(), run.process)(
        Noisy(zt, times, torch.zeros_like(zt, dtype=torch.bool))
    )
    rows = torch.arange(zt.shape[1])
    root = torch.full_like(rows, run.vocabulary.root)
    return query(rows, root, lambda dist: dist.log_mass(level)).exp()


@pytest.mark.parametrize(("name", "level"), [("flat", 0), ("tree", 1)])
def test_confidence_is_the_predicted_probability_of_the_first_states(
    place: Path, name: str, level: int
) -> None:
    run = api.load(place / name)
    (trajectory,) = draw_trajectories(run, 1, [None], steps=4)
    expected = predict(run, list(trajectory.start), 1.0, level)
    is_checked = False
    for (position, state), found in zip(trajectory.changes[0], trajectory.confidence[0]):
        node = state - run.vocabulary.offsets[level]
        if 0 <= node < expected.shape[1]:
            # trajectories have three decimals
            assert found == pytest.approx(float(expected[position, node]), abs=6e-4)
            is_checked = True
    assert is_checked or not trajectory.changes[0]


def test_confidences_of_an_autoregressive_sample_multiply_to_its_likelihood(place: Path) -> None:
    run = api.load(place / "ar")
    recorder = TrajectoryRecorder(2, find_start(run), meter=make_meter(run, 2))
    samples = run.sample(2, on_step=recorder)
    for row, sample in zip(recorder.rows, samples):
        values = [value for step in row.confidence for value in step.values()]
        assert len(values) == len(sample["ids"])
        nats = -sum(math.log(value) for value in values)
        batch = _make_batch(sample["ids"])
        times = run.objective.times or api.FlatTimes()
        exact = run.objective.nll(
            batch, api.CounterRng(0, 0, batch.index, len(sample["ids"])), torch.zeros(1), 1, times
        )
        total = sum(float(term.sum()) for term in exact.terms.values())
        # the same sums in float32, in another order
        assert nats == pytest.approx(total, rel=1e-4)


def _make_batch(ids: list[int]) -> api.Batch:
    row = torch.tensor([ids])
    valid = torch.ones_like(row, dtype=torch.bool)
    return api.Batch(row, valid, valid, torch.zeros_like(row), torch.zeros(1, dtype=torch.long))


def test_confidence_is_measured_at_every_refined_position_of_a_tree(place: Path) -> None:
    run = api.load(place / "tree")
    for trajectory in draw_trajectories(run, 2, ["ancestral", "first_hitting"], steps=4):
        changes = [change for step in trajectory.changes for change in step]
        values = [value for step in trajectory.confidence for value in step]
        assert len(values) == len(changes) > 8
        assert all(value is not None and 0.0 <= value <= 1.0 for value in values)


def test_measuring_the_confidence_does_not_change_samples(place: Path) -> None:
    run = api.load(place / "tree")
    (trajectory,) = draw_trajectories(run, 1, [None], steps=4)
    assert trajectory.unfold()[-1] == run.sample(1, steps=4)[0]["ids"]


def test_trajectory_file_keeps_confidences_and_refuses_a_wrong_number(
    place: Path, tmp_path: Path
) -> None:
    (trajectory,) = draw_trajectories(api.load(place / "flat"), 1, [None], steps=2)
    path = tmp_path / "t.json"
    path.write_text(to_json([trajectory]))
    (read,) = read_trajectories(path)
    assert isinstance(read, Trajectory)
    assert read.confidence == trajectory.confidence
    first = str(trajectory.confidence[0]).replace("None", "null")
    path.write_text(path.read_text().replace(first, "[0.5]", 1))
    with pytest.raises(api.DataError, match="but 1 probabilities"):
        read_trajectories(path)
