"""Tracker for wandb: its mode, its import and its run id."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ddiff_core import trackers
from ddiff_core.trackers import Disabled, WeightsAndBiases, has_login

from ddiff.errors import PluginError
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
        def log(self, metrics: dict[str, float], step: int) -> None:
            started.append((step, metrics))

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
    assert (logged, finished) == ((3, {"loss": 1.5}), "finished")
    with pytest.raises(
        PluginError, match=r'mode "online": No API key configured.*mode = "offline"'
    ):
        WeightsAndBiases.build(
            WeightsAndBiases.Config(mode="online"), run_dir=str(tmp_path), recipe={}
        )
