"""Running what stands in examples/ as its reader would: another process, an empty folder, no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
DDIFF = ("-c", "from ddiff.cli import main; main()")
"""`ddiff` of the interpreter that runs the tests, wherever its scripts are."""


def python(*arguments: str, folder: Path, path: Path | None = None) -> str:
    """What `python ARGUMENTS` prints in `folder`, with `path` as one more place to import from."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DDIFF_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(path or ""),
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def code_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
