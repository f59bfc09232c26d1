"""Tracker of a run that keeps only `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final


@final
class NoTracker:
    """Discard the figures."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass
