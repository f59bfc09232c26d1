"""Tracker for wandb: its mode, its import, its run id, and what it writes in offline mode."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ddiff_core import trackers
from ddiff_core.trackers import Disabled, WeightsAndBiases, has_login
from wandb_files import read_rows, read_run

from ddiff.data.pictures import write_grid
from ddiff.errors import PluginError
from ddiff.training.protocols import ResultTracker, RunResults, Tracker
from ddiff.training.tracker import NoTracker


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment of a user who never logged in to wandb."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def chosen(monkeypatch: pytest.MonkeyPatch, mode: str) -> str:
    """Return the mode in which the tracker starts wandb, or "off"."""
    monkeypatch.setattr(trackers, "WandbTracker", lambda mode, *rest: mode)
    tracker = WeightsAndBiases.build(
        WeightsAndBiases.Config(mode=mode), run_dir="unused", recipe={}
    )  # type: ignore[arg-type]
    return "off" if isinstance(tracker, NoTracker) else tracker  # type: ignore[return-value]


def test_wandb_auto_mode_is_off_without_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "auto") == "off"
    assert isinstance(Disabled.build(Disabled.Config(), run_dir="unused", recipe={}), NoTracker)


def test_wandb_auto_mode_depends_on_api_key_login_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert chosen(monkeypatch, "auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert chosen(monkeypatch, "auto") == "off"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password x\n")
    assert not has_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert chosen(monkeypatch, "auto") == "online"
    (tmp_path / "netrc").write_text("no netrc at all")
    assert not has_login()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert chosen(monkeypatch, "auto") == "online"


def test_wandb_mode_of_the_recipe_overrides_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    assert chosen(monkeypatch, "offline") == "offline"
    assert chosen(monkeypatch, "off") == "off"


def test_wandb_is_imported_only_by_runs_that_use_the_tracker(tmp_path: Path) -> None:
    program = """
import sys
from ddiff_core.trackers import WeightsAndBiases
WeightsAndBiases.build(WeightsAndBiases.Config(), run_dir=".", recipe={}).log(1, {"loss": 1.0})
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_wandb_tracker_reuses_its_run_id_and_explains_a_missing_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    started = []

    class Run:
        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            pass

        def log(self, metrics: dict[str, float]) -> None:
            started.append(metrics)

        def finish(self) -> None:
            started.append("finished")

    def init(**settings: object) -> Run:
        json.dumps(settings)
        started.append(settings)
        if settings["mode"] == "online":
            raise wandb.errors.UsageError("No API key configured.")
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    config = WeightsAndBiases.Config(mode="offline", project="novels")
    for _ in range(2):
        tracker = WeightsAndBiases.build(
            config, run_dir=str(tmp_path), recipe={"name": "small", "seed": 1}
        )
        tracker.log(3, {"loss": 1.5})
        tracker.close()
    first, logged, finished, second = started[:4]
    assert first["id"] == second["id"]
    assert (first["project"], first["name"], first["config"]["seed"]) == ("novels", "small", 1)
    assert (logged, finished) == ({"step": 3, "loss": 1.5}, "finished")
    with pytest.raises(
        PluginError, match=r'mode "online": No API key configured.*mode = "offline"'
    ):
        WeightsAndBiases.build(
            WeightsAndBiases.Config(mode="online"), run_dir=str(tmp_path), recipe={}
        )


RECIPE = {"name": "small", "seed": 3, "train": {"steps": 5, "lr": 0.01}}


def start_offline(run_dir: Path) -> Tracker:
    config = WeightsAndBiases.Config(mode="offline")
    return WeightsAndBiases.build(config, run_dir=str(run_dir), recipe=RECIPE)


def test_resumed_wandb_run_continues_by_id_and_logs_every_step_once(tmp_path: Path) -> None:
    """The second part starts at a checkpoint, and repeats steps that the first part logged."""
    for steps in (range(1, 5), range(3, 7)):
        tracker = start_offline(tmp_path)
        for step in steps:
            tracker.log(step, {"train_loss": 1.0 / step})
        # figures of a validation, at the last step of the part
        tracker.log(steps[-1], {"nelbo": 2.0 / steps[-1]})
        tracker.close()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    runs = [read_run(file) for file in files]
    assert runs[0][0] == runs[1][0] == (tmp_path / "wandb_id").read_text()
    # the config is the resolved recipe
    assert [{key: config[key] for key in RECIPE} for _, config in runs] == [RECIPE, RECIPE]
    rows = [row for file in files for row in read_rows(file)]
    losses = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    assert losses == [(step, 1.0 / step) for step in range(1, 7)]
    assert [(row["step"], row["nelbo"]) for row in rows if "nelbo" in row] == [
        (4, 2.0 / 4),
        (6, 2.0 / 6),
    ]


def test_wandb_run_contains_figures_samples_pictures_and_report(tmp_path: Path) -> None:
    picture = tmp_path / "samples-image.png"
    write_grid(str(picture), [np.full((4, 4, 3), 200, np.uint8)], ["one"])
    report = tmp_path / "report.html"
    report.write_text("<!doctype html><title>the report</title>")
    samples = [{"index": 0, "text": "| a \n b"}, {"index": 1, "text": 'c "d"'}]
    results = RunResults({"evaluation/ppl": 8.5}, samples, [picture], report)
    tracker = start_offline(tmp_path)
    assert isinstance(tracker, ResultTracker)
    tracker.log(5, {"train_loss": 1.5})
    tracker.log_results(5, results)
    tracker.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    row = read_rows(file)[-1]
    assert (row["step"], row["evaluation/ppl"]) == (5, 8.5)
    folder = file.parent / "files"
    table = json.loads((folder / row["samples.path"]).read_text())
    assert table["columns"] == ["index", "text"]
    assert table["data"] == [[0, "| a \n b"], [1, 'c "d"']]
    assert (folder / row["samples-image.path"]).read_bytes() == picture.read_bytes()
    assert (folder / row["report.path"]).read_text() == report.read_text()
