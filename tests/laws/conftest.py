"""Pytest configuration that lets the tests of this folder import `chains` and `faults`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
