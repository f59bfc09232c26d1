"""Import path: helpers of the core and network tests, the examples and the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = ("tests/core", "tests/nn", "examples", "benchmarks")
sys.path[:0] = [str(ROOT / place) for place in PLACES]
