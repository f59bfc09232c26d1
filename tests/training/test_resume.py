"""A run that is killed and resumed is bitwise identical to an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import toy

from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.training.metrics import WALL_CLOCK

STEPS, EVERY = 40, 5


def start(run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, toy.__file__, str(run_dir), str(STEPS), "0.005"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )


def steps_until_killed(process: subprocess.Popen[str], step: int, number: int) -> list[int]:
    """Read the output of a toy run, send signal `number` in step `step`, and wait for its end.

    Returns the numbers of the steps that had begun.
    """
    assert process.stdout
    begun = []
    for line in process.stdout:
        if line.startswith("step"):
            begun.append(int(line.split()[1]))
            if begun[-1] == step:
                os.kill(process.pid, number)
                process.wait()
    return begun


def records(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in WALL_CLOCK} for line in lines
    ]


def test_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_run(tmp_path: Path) -> None:
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    draw = random.Random(4)
    ends = [draw.randrange(6, 14), draw.randrange(16, 24), draw.randrange(26, 34)]
    went_on_from = 0
    for end, number in zip(ends, (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        process = start(killed)
        begun = steps_until_killed(process, end, number)
        assert begun[0] == went_on_from + 1, "the process did not start after the last checkpoint"
        assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
        went_on_from = max(Checkpoints(killed / "checkpoints").steps(), default=0)
        if number == signal.SIGTERM:
            assert went_on_from in (begun[-1], begun[-1] - 1), (
                "the current step was not finished and saved"
            )
        else:
            # At most one checkpoint, which was being written, may be incomplete.
            assert begun[-1] - 2 * EVERY - 1 <= went_on_from < begun[-1]
    process = start(killed)
    output, _ = process.communicate()
    begun = [int(line.split()[1]) for line in output.splitlines() if line.startswith("step")]
    assert begun == list(range(went_on_from + 1, STEPS + 1))
    assert process.returncode == 0

    assert toy.main(str(straight), str(STEPS)) == 0
    assert [record["step"] for record in records(killed)] == list(range(1, STEPS + 1))
    assert records(killed) == records(straight)
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        places = [run / "checkpoints" / f"step_{STEPS:08d}" / name for run in (killed, straight)]
        assert places[0].read_bytes() == places[1].read_bytes(), name


def test_toy_training_run_depends_on_the_random_state_of_torch(tmp_path: Path) -> None:
    # The test above needs this: otherwise it would not notice a wrong random state of torch.
    runs = []
    for name, seed in (("a", 0), ("b", 1)):
        trainer = toy.toy_trainer(tmp_path / name, 2, dropout=0.2)
        toy.torch.manual_seed(seed)
        trainer.fit()
        runs.append(records(tmp_path / name))
    assert runs[0] != runs[1]
