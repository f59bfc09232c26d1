"""Test of the command that writes docs/samplers.md, on one process with few draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_sampler_matrix_command_writes_the_docs_page_on_samplers(tmp_path: Path) -> None:
    page = tmp_path / "samplers.md"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "sampler_matrix.py"),
        "--only",
        "mdlm",
        "--points",
        "64",
    ]
    done = subprocess.run(
        [*command, "--steps", "1", "2", "--out", str(page)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    _, table = page.read_text().split("\n## mdlm\n")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 17 + 3, (
        "expected a heading, the 17 samplers that support masks, and three rows for scores"
    )
    assert "| first_hitting | exact |" in page.read_text()
    assert "> SAMPLER: process must train the prediction at tokens" in table
    assert "- mdlm: acs, self_correction" in table.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ["samplers.md"]
