"""Let the tests of this folder import `toy`, which is also a program that they start and kill."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
