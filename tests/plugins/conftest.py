"""Lets the tests of this folder import `exact_windows` of the core and the examples."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "core"), str(TESTS.parent / "examples")]
