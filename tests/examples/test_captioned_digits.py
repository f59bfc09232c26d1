"""The example with captioned digits runs, and prints bounds and shares of right samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import EXAMPLES, run_python

PLUGINS = EXAMPLES.parent / "plugins"


@pytest.mark.slow
def test_captioned_digits_prints_bounds_and_shares_in_all_directions(tmp_path: Path) -> None:
    script = str(EXAMPLES / "captioned_digits.py")
    sizes = ["--steps", "2", "--samples", "10", "--draws", "1"]
    path = Path(f"{EXAMPLES.parent}:{PLUGINS}")
    output = run_python(script, *sizes, folder=tmp_path, path=path)
    for line in (
        "image and word, together:",
        "image and word, word first:",
        "image given the word:",
        "word given the image:",
        "image given the word, right:",
        "word given the image, right:",
        "image and word agree:",
    ):
        assert f"\n{line}" in output, line
