"""Import path: `exact_windows` of the core tests, the examples and the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "core"), str(ROOT / "examples"), str(ROOT / "benchmarks")]
