"""examples/own_loop.py: core with any torch network, in forty lines."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
from scripts import EXAMPLES, code_lines, python

SCRIPT = EXAMPLES / "own_loop.py"


def test_own_loop_takes_at_most_forty_lines_and_neither_recipe_nor_trainer() -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    assert code_lines(SCRIPT) <= 40
    assert not re.search(r"ddiff\.(recipe|training|runs)|read_recipe|ddiff\.run", source)


@pytest.mark.slow
def test_own_loop_learns_and_its_bound_is_not_below_the_entropy_of_its_source(
    tmp_path: Path,
) -> None:
    printed = python(str(SCRIPT), folder=tmp_path)
    nats = float(printed.split()[0])
    # Untrained, six uniform letters cost 6 ln 8 = 12.5 nats. The mean over 40 stratified batches has a standard error of
    # 0.11 (measured, fixed seed); the floor leaves it four of those.
    assert math.log(8) - 0.44 <= nats <= 3.0
    rows = [[int(word) for word in re.findall(r"\d+", line)] for line in printed.splitlines()[1:]]
    follows = [
        (after - before) % 8 == 1 for row in rows for before, after in itertools.pairwise(row)
    ]
    assert len(follows) == 20
    assert sum(follows) >= 10  # by chance 20 / 8 = 2.5
