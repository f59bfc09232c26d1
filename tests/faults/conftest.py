"""Lets the tests of this folder import the known tables and repeated evaluations of the evaluation's tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
