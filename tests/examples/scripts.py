"""Run scripts of examples/ as a user would: in a separate process and in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from code_count import code_tokens

EXAMPLES = Path(__file__).parents[2] / "examples"
DDIFF = ("-c", "from ddiff.cli import main; main()")
"""Arguments that run the `ddiff` command with the interpreter of the tests."""


def run_python(*arguments: str, folder: Path, path: Path | None = None) -> str:
    """Run `python ARGUMENTS` offline in `folder`, with `path` on the import path.

    Returns the output of the script.
    """
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


def count_tokens(path: Path) -> int:
    """Count the code tokens of a file, without comments, docstrings and layout."""
    return len(code_tokens(path.read_text(encoding="utf-8")))
