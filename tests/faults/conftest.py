"""Lets the tests of this folder import `tiny_run` and gives them its fixtures."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tiny_run import ddiff, finished, folder, run_dir

__all__ = ["ddiff", "finished", "folder", "run_dir"]
