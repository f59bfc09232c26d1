"""Three of the fifty trials of `make soak`: runs that are killed at random moments end as the one that was left alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks/soak.py"


@pytest.mark.slow
def test_runs_that_are_killed_again_and_again_end_as_if_left_alone() -> None:
    done = subprocess.run(
        [sys.executable, str(SOAK), "--trials", "3", "--seed", "0"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *trials, total = done.stdout.splitlines()
    assert [line.endswith(": equal") for line in trials] == [True] * 3
    killed = re.search(
        r"3 runs, (\d+) times killed \(.*?(\d+) in a save.*, 0 ended differently", total
    )
    assert killed, total
    assert int(killed[1]) >= 3
