"""Put `scripts` of this folder and `code_count` of the packaging tests on the import path."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "packaging")]
