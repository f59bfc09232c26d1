"""Make test helpers importable, and share the fixtures of a tiny run."""

from __future__ import annotations

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent / "evaluation")]

from tiny_run import ddiff, finished, folder, run_dir  # noqa: E402

__all__ = ["ddiff", "finished", "folder", "run_dir"]
