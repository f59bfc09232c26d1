"""Import path of test helpers, and the fixtures of a tiny run."""

from __future__ import annotations

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent / "evaluation"), str(here.parent / "end_to_end")]

from commands import ddiff  # noqa: E402
from tiny_run import finished, folder, run_dir  # noqa: E402

__all__ = ["ddiff", "finished", "folder", "run_dir"]
