"""Repeated `ddiff run`: bitwise identical resuming, changed recipes, and option --fresh."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Command, read_evaluation

from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.training.metrics import WALL_CLOCK

STEPS, EVERY = 80, 7
LONG = (
    "--set",
    f"train.steps={STEPS}",
    "--set",
    f"train.checkpoint_every={EVERY}",
    "--set",
    "train.keep=20",
)


def metrics(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK}
        for line in metrics(run_dir)
    ]


def saved(run_dir: Path) -> int:
    return Checkpoints(run_dir / "checkpoints").steps()[-1]


def signalled(run_dir: Path, step: int, number: int) -> subprocess.Popen[str]:
    """Start `ddiff run` in a process, send signal `number` after `step`, and wait for its end."""
    code = "import sys; from ddiff.cli import main; main(sys.argv[1:])"
    command = [
        sys.executable,
        "-c",
        code,
        "run",
        "small.toml",
        *LONG,
        "--set",
        f"run_dir={str(run_dir)!r}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(metrics(run_dir)) < step:
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.wait(timeout=60)
    return process


@pytest.mark.slow
def test_run_resumed_after_signals_equals_uninterrupted_run(folder: Path, ddiff: Command) -> None:
    """The run gets SIGKILL at a random step and SIGINT at a later step.

    The recipe has dropout, so that the random state of torch must be restored too.
    """
    torn, straight = Path("torn"), Path("straight")
    draw = random.Random(5)

    process = signalled(torn, draw.randrange(10, 30), signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    reached, kept = len(metrics(torn)), saved(torn)
    assert reached - 2 * EVERY - 1 <= kept <= reached < STEPS, "more than one checkpoint is missing"
    assert not (torn / "evaluation.json").exists()
    before = metrics(torn)[:kept]

    process = signalled(torn, draw.randrange(40, 60), signal.SIGINT)
    assert process.returncode == 130
    assert "The same command resumes" in (process.stderr.read() if process.stderr else "")
    assert metrics(torn)[:kept] == before, "steps before the checkpoint were repeated"
    assert saved(torn) == len(metrics(torn)) < STEPS, "SIGINT did not save the current step"
    assert not (torn / "evaluation.json").exists()

    before = metrics(torn)
    code, out, _ = ddiff("run", "small.toml", *LONG, "--set", "run_dir='torn'")
    assert code == 0
    assert metrics(torn)[: len(before)] == before
    done_here = re.search(r"this time ([\d,]+) tokens", out)
    assert done_here
    assert int(done_here[1].replace(",", "")) == sum(
        json.loads(line)["tokens"] for line in metrics(torn)[len(before) :]
    )

    assert ddiff("run", "small.toml", *LONG, "--set", "run_dir='straight'")[0] == 0
    assert [record["step"] for record in records(torn)] == list(range(1, STEPS + 1))
    assert records(torn) == records(straight)
    assert read_evaluation(torn) == read_evaluation(straight)
    assert (torn / "samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        place = Path("checkpoints") / f"step_{STEPS:08d}" / name
        assert (torn / place).read_bytes() == (straight / place).read_bytes(), name


SHORT = ("run", "small.toml", "--set", "train.steps=4")


def test_repeated_command_does_not_retrain_a_finished_run(folder: Path, ddiff: Command) -> None:
    assert ddiff(*SHORT)[0] == 0
    run_dir = Path("runs/small")
    before = {
        name: (run_dir / name).stat().st_mtime_ns
        for name in ("metrics.jsonl", "evaluation.json", "samples.jsonl")
    }
    lines = metrics(run_dir)
    code, out, err = ddiff(*SHORT)
    assert code == 0
    assert "All 4 steps are done." in err
    assert "step 4; trained before" in out
    assert metrics(run_dir) == lines
    assert all(
        (run_dir / name).stat().st_mtime_ns == before[name]
        for name in ("evaluation.json", "samples.jsonl")
    )


def test_run_resumes_to_more_steps_and_refuses_fewer_steps(folder: Path, ddiff: Command) -> None:
    assert ddiff(*SHORT)[0] == 0
    run_dir = Path("runs/small")
    first = metrics(run_dir)
    assert ddiff(*SHORT, "--set", "train.steps=6")[0] == 0
    assert metrics(run_dir)[:4] == first
    assert len(metrics(run_dir)) == 6
    assert json.loads((run_dir / "evaluation.json").read_text())["step"] == 6
    assert {
        json.loads(line)["step"] for line in (run_dir / "samples.jsonl").read_text().splitlines()
    } == {6}
    code, _, err = ddiff(*SHORT)
    assert code == 2
    assert "train.steps: was 6, is 4" in err
    assert len(metrics(run_dir)) == 6


def test_resume_with_changed_recipe_lists_the_changed_keys(folder: Path, ddiff: Command) -> None:
    assert ddiff(*SHORT)[0] == 0
    before = Path("runs/small/recipe.toml").read_bytes()
    code, out, err = ddiff(
        *SHORT, "--set", "process.gamma=2.0", "--set", "train.batch=8", "--set", "train.steps=6"
    )
    assert (code, out) == (2, "")
    assert "train.batch: was 4, is 8" in err
    assert "process.gamma: was" in err
    assert "train.steps" not in err.split("Give the new run")[0]
    assert "--fresh" in err
    assert Path("runs/small/recipe.toml").read_bytes() == before
    assert len(metrics(Path("runs/small"))) == 4


def test_option_fresh_deletes_the_old_run_and_trains_again(folder: Path, ddiff: Command) -> None:
    assert ddiff(*SHORT)[0] == 0
    first = records(Path("runs/small"))
    assert ddiff(*SHORT, "--fresh", "--set", "seed=1")[0] == 0
    assert [record["step"] for record in records(Path("runs/small"))] == [1, 2, 3, 4]
    assert records(Path("runs/small")) != first


def test_option_fresh_refuses_a_directory_that_is_not_a_run(folder: Path, ddiff: Command) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    code, out, err = ddiff(*SHORT, "--fresh", "--set", 'run_dir="mine"')
    assert (code, out) == (2, "")
    assert "so the directory is not a run and nothing is deleted" in err
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]
    Path("empty").mkdir()
    assert ddiff(*SHORT, "--fresh", "--set", 'run_dir="empty"')[0] == 0


@pytest.mark.slow
def test_run_resumes_with_other_intervals_of_checkpoints_and_logs(
    folder: Path, ddiff: Command
) -> None:
    constant = ("--set", 'train.schedule="constant"')
    first = ("train.steps=4", "train.checkpoint_every=2", "train.keep=1", "train.log_every=2")
    then = ("train.steps=9", "train.checkpoint_every=3", "train.keep=2", "train.log_every=4")
    for run_dir, parts in (("resumed", (first, then)), ("straight", (then,))):
        for part in parts:
            settings = [text for setting in part for text in ("--set", setting)]
            command = ("run", "small.toml", *constant, "--set", f"run_dir='{run_dir}'", *settings)
            assert ddiff(*command).code == 0
    resumed, straight = Path("resumed"), Path("straight")
    assert records(resumed) == records(straight)
    assert Checkpoints(resumed / "checkpoints").steps() == [6, 9]
    place = Path("checkpoints/step_00000009/model.safetensors")
    assert (resumed / place).read_bytes() == (straight / place).read_bytes()
    # the recipe in the run directory has the new values
    assert "checkpoint_every = 3" in (resumed / "recipe.toml").read_text()


@pytest.mark.slow
def test_run_does_not_resume_with_another_learning_rate(folder: Path, ddiff: Command) -> None:
    assert ddiff("run", "small.toml", "--set", "train.steps=2").code == 0
    refused = ddiff("run", "small.toml", "--set", "train.steps=4", "--set", "train.warmup=2")
    assert refused.code == 2
    assert "train.warmup: was 3, is 2" in refused.err
    assert "train.checkpoint_every" in refused.err
