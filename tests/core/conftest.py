"""Import path: helper modules of this folder, and the module `chains` of tests/laws."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "laws")]
