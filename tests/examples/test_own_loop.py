"""examples/own_loop.py trains a plain torch network with a process of ddiff, in a small script."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
from scripts import EXAMPLES, count_tokens, run_python

SCRIPT = EXAMPLES / "own_loop.py"


def test_example_own_loop_is_small_and_uses_no_recipe_or_trainer() -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    assert count_tokens(SCRIPT) <= 450
    assert not re.search(r"ddiff\.(recipe|training|runs)|read_recipe|ddiff\.run", source)


@pytest.mark.slow
def test_example_own_loop_trains_to_a_bound_above_the_entropy(
    tmp_path: Path,
) -> None:
    printed = run_python(str(SCRIPT), folder=tmp_path)
    nats = float(printed.split()[0])
    # Six uniform tokens cost 6 ln 8 = 12.5 nats before training. The mean over 40 stratified
    # batches has a standard error of 0.11 (measured, fixed seed); the lower limit allows four.
    assert math.log(8) - 0.44 <= nats <= 3.0
    rows = [[int(token) for token in re.findall(r"\d+", line)] for line in printed.splitlines()[1:]]
    follows = [
        (after - before) % 8 == 1 for row in rows for before, after in itertools.pairwise(row)
    ]
    assert len(follows) == 20
    assert sum(follows) >= 10  # by chance 20 / 8 = 2.5
