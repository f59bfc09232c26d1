"""Tracker that logs nothing, for runs whose only metrics file is `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final


@final
class NoTracker:
    """Tracker that discards the metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass
