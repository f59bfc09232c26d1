"""Two of the fifty trials of `make soak`, which kills runs at random times."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks/soak.py"


@pytest.mark.slow
def test_runs_killed_at_random_times_equal_uninterrupted_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(SOAK), "--trials", "2", "--seed", "0"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *trials, total = done.stdout.splitlines()
    assert [line.endswith(": equal") for line in trials] == [True] * 2
    killed = re.search(
        r"2 runs, (\d+) times killed \(.*?(\d+) in a save.*, 0 ended differently", total
    )
    assert killed, total
    assert int(killed[1]) >= 2
