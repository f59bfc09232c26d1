"""Make the helper modules of this folder and of `tests/core` importable."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE.parent / "core", HERE):
    sys.path.insert(0, str(folder))
