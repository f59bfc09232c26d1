"""The tracker of a run that keeps `metrics.jsonl` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final


@final
class NoTracker:
    """Sends the figures nowhere."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing to send to."""

    def close(self) -> None:
        """Nothing to close."""
