"""Results of a run that `ddiff run` logs to its tracker: which files, how often, and errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from small import FLAT
from small_fields import DIGITS

import ddiff as api
from ddiff.runs.tracking import read_results
from ddiff.training.protocols import RunResults

SHORT = ("train.steps=2", "train.log_every=1", "denoiser.dropout=0.0", *FLAT)


class Metrics:
    """Tracker of a plugin that has only the methods of `Tracker`."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(step)

    def close(self) -> None:
        self.calls.append("close")


class Results(Metrics):
    """Tracker that also receives the results."""

    def log_results(self, step: int, results: RunResults) -> None:
        self.calls.append((step, results))


class Failing(Metrics):
    def log_results(self, step: int, results: RunResults) -> None:
        self.calls.append("results")
        raise ConnectionError("the service is down")


@pytest.fixture
def track(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that runs small.toml with a tracker, and returns the calls of its methods."""

    def run(tracker: Metrics, *settings: str) -> list[Any]:
        monkeypatch.setattr(
            "ddiff.runs.session.TrainingSession.build_tracker", lambda session: tracker
        )
        api.run("small.toml", settings=[*SHORT, *settings])
        return tracker.calls

    return run


def test_results_are_logged_once_after_the_metrics_and_before_close(track: Any) -> None:
    *steps, (step, results), last = track(Results())
    assert (steps, step, last) == ([1, 2], 2, "close")
    written = json.loads(Path("runs/small/evaluation.json").read_text())
    figures = results.figures
    for name, figure in written["figures"].items():
        assert figures[f"evaluation/{name}"] == figure["value"]
    low, high = written["figures"]["nelbo"]["interval"]
    assert (figures["evaluation/nelbo/low"], figures["evaluation/nelbo/high"]) == (low, high)
    lines = [json.loads(line) for line in Path("runs/small/samples.jsonl").read_text().splitlines()]
    assert [sample["text"] for sample in results.samples] == [line["text"] for line in lines]
    assert "ids" not in results.samples[0]
    # the same command trains and evaluates nothing, so nothing is logged again
    assert track(Results()) == ["close"]


def test_new_report_and_further_training_are_logged_by_the_next_command(track: Any) -> None:
    (_, results), _ = track(Results())[2:]
    assert results.report is None
    Path("runs/small/report.html").write_text("<!doctype html>")
    (step, results), _ = track(Results())
    assert (step, results.report) == (2, Path("runs/small/report.html"))
    logged, (step, results), last = track(Results(), "train.steps=3")
    assert (logged, step, last) == (3, 3, "close")


def test_tracker_without_results_keeps_working(track: Any) -> None:
    assert track(Metrics()) == [1, 2, "close"]
    assert not Path("runs/small/tracked.json").exists()


def test_failing_tracker_does_not_fail_the_run_and_is_tried_again(
    track: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert track(Failing()) == [1, 2, "results", "close"]
    message = capsys.readouterr().err
    assert "not logged to the tracker: ConnectionError: the service is down" in message
    assert "The same command logs them again" in message
    assert track(Failing()) == ["results", "close"]


def test_fresh_run_logs_its_results_again(folder: Path, ddiff: Command) -> None:
    settings = [f"--set={setting}" for setting in (*SHORT, 'tracker="tensorboard"')]
    assert ddiff("run", "small.toml", *settings)[0] == 0
    (old,) = Path("runs/small/tensorboard").iterdir()
    assert ddiff("run", "small.toml", *settings)[0] == 0
    assert list(Path("runs/small/tensorboard").iterdir()) == [old]
    assert ddiff("run", "small.toml", "--fresh", *settings)[0] == 0
    (new,) = Path("runs/small/tensorboard").iterdir()
    assert new != old
    assert new.stat().st_size > 1000


def test_results_of_several_fields_have_targets_findings_and_pictures(folder: Path) -> None:
    Path("digits.toml").write_text(DIGITS)
    api.run("digits.toml", settings=["train.steps=1", "evaluate.samples=4", "sample.count=2"])
    run_dir = Path("runs/digits")
    results = read_results(run_dir, 1)
    written = json.loads((run_dir / "evaluation.json").read_text())
    for target, bound in written["targets"].items():
        assert results.figures[f"evaluation/{target}"] == bound["nats_per_sample"]
    judged = json.loads((run_dir / "judged.json").read_text())["targets"]
    for target, findings in judged.items():
        for finding in findings:
            assert results.figures[f"judged/{target}/{finding['name']}"] == finding["value"]
    assert [path.name for path in results.pictures] == [
        "samples-image-given-text.png",
        "samples-joint.png",
    ]
    assert {sample["target"] for sample in results.samples} == {"joint", "image | text"}
    assert len({tuple(sample) for sample in results.samples}) == 1
    assert all(isinstance(sample["fields.text"], str) for sample in results.samples)
    # results of other steps are left out
    assert read_results(run_dir, 2).figures == {}
    assert read_results(run_dir, 2).samples == []
