"""Lets the tests of this folder import `all_examples`, and the tables and repeats of the evaluation's tests."""

from __future__ import annotations

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent / "evaluation")]
