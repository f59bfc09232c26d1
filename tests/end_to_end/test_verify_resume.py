"""`ddiff run --verify-resume K`: replay of recorded steps and report of differences."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Command

from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.errors import CheckpointError
from ddiff.runs.replay import choose_span

RUN = ("run", "small.toml", "--set", "train.steps=6", "--set", "train.checkpoint_every=3")


def contents(run_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_verify_resume_of_an_unchanged_run_reports_no_difference(
    folder: Path, ddiff: Command
) -> None:
    assert ddiff(*RUN)[0] == 0
    before = contents(Path("runs/small"))
    code, out, err = ddiff(*RUN, "--verify-resume", "3")
    assert code == 0, err
    assert out.splitlines() == [
        "runs/small: steps 4 to 6 repeated from step 3, in the recorded layout: bitwise equality "
        "is expected.",
        "losses and other figures: equal",
        "state after step 6: equal",
    ]
    assert contents(Path("runs/small")) == before
    code, out, _ = ddiff(*RUN, "--verify-resume", "2")
    assert code == 0
    assert "steps 4 to 5 repeated from step 3" in out
    assert "state: not compared" in out
    code, out, _ = ddiff(*RUN, "--verify-resume", "5")
    assert code == 0
    assert "steps 1 to 3 repeated from the beginning" in out
    assert "state after step 3: equal" in out


def test_verify_resume_reports_a_changed_loss_with_its_step(folder: Path, ddiff: Command) -> None:
    assert ddiff(*RUN)[0] == 0
    path = Path("runs/small/metrics.jsonl")
    lines = path.read_text().splitlines()
    changed = json.loads(lines[4])
    changed["train_loss"] *= 1.0 + 1e-9
    path.write_text("\n".join([*lines[:4], json.dumps(changed), lines[5], ""]))
    code, out, _ = ddiff(*RUN, "--verify-resume", "3")
    assert code == 1
    assert (
        "losses and other figures: NOT equal; largest relative difference 1e-09, "
        "in train_loss of step 5" in out
    )
    assert "state after step 6: equal" in out


def test_verify_resume_reports_a_changed_checkpoint_state(folder: Path, ddiff: Command) -> None:
    assert ddiff(*RUN)[0] == 0
    checkpoints = Checkpoints("runs/small/checkpoints")
    found = checkpoints.newest()
    assert found is not None
    state = found.read_state()
    state["optimizer"]["muon"]["state"][0]["momentum_buffer"][0, 0] += 1.0
    checkpoints.save(6, found.read_weights(), state)
    code, out, _ = ddiff(*RUN, "--verify-resume", "3")
    assert code == 1
    assert "losses and other figures: equal" in out
    assert "state after step 6: NOT equal" in out
    assert out.rstrip().endswith("in optimizer.muon.state.0.momentum_buffer")


def test_verify_resume_refuses_untrained_and_changed_runs(folder: Path, ddiff: Command) -> None:
    code, _, err = ddiff(*RUN, "--verify-resume", "3")
    assert code == 2
    assert "is not a run directory" in err
    assert ddiff(*RUN)[0] == 0
    code, _, err = ddiff("run", "small.toml", "--set", "train.steps=9", "--verify-resume", "3")
    assert code == 2
    assert "Changed keys:" in err or "train.steps must be 6" in err
    code, _, err = ddiff(*RUN, "--fresh", "--verify-resume", "3")
    assert code == 2
    assert "excludes --fresh" in err


@pytest.mark.parametrize(
    ("checkpoints", "recorded", "steps", "span"),
    [
        ([40, 60], 60, 20, (40, 60, True)),
        ([40, 60], 60, 5, (40, 45, False)),
        ([40, 60], 60, 30, (0, 30, False)),
        ([40, 60], 60, 50, (0, 40, True)),
        (
            [40, 60],
            60,
            100,
            (40, 60, True),
        ),  # 100 steps follow no start: the newest with any step
        ([40, 60], 75, 10, (60, 70, False)),  # killed 15 steps after a checkpoint
        ([40, 60], 75, 20, (40, 60, True)),
        ([60], 60, 20, (0, 20, False)),
        ([60], 60, 60, (0, 60, True)),
    ],
)
def test_verify_resume_replays_steps_up_to_the_last_checkpoint_in_range(
    checkpoints: list[int], recorded: int, steps: int, span: tuple[int, int, bool]
) -> None:
    assert choose_span(checkpoints, recorded, steps) == span


def test_choosing_steps_to_replay_raises_without_recorded_steps() -> None:
    with pytest.raises(CheckpointError, match="records no step"):
        choose_span([5], 0, 3)


@pytest.mark.slow
def test_verify_resume_on_two_processes_allows_rounding_differences(
    folder: Path, ddiff: Command
) -> None:
    run = (*RUN, "--set", "denoiser.dropout=0.0", "--set", "train.optimizer.kind=adamw")
    assert ddiff(*run)[0] == 0
    before = contents(Path("runs/small"))
    several = ("--set", "backend.kind=ddp", "--set", "backend.processes=2", "--verify-resume", "3")
    done = subprocess.run(
        [sys.executable, "-m", "ddiff", *run, *several], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout
    assert "steps 4 to 6 repeated from step 3, in another layout: equality up to" in output
    assert re.search(
        r"losses and other figures: (equal|within 1e-05; largest relative difference)", output
    )
    assert re.search(
        r"weights after step 6: (equal|within 1e-05; largest relative difference)", output
    )
    assert contents(Path("runs/small")) == before
