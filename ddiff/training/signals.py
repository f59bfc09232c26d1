"""SIGINT and SIGTERM during training: the first one ends it cleanly, the second one at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, final

import torch
from torch import Tensor

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class StopSignals:
    """Context manager that records the first SIGINT or SIGTERM in `signal`.

    A second signal raises KeyboardInterrupt or SystemExit(128 + signal). Code that waits for data
    polls `signal` and gives up: nothing is under way then that could be lost.

    Only the main thread can install handlers; in other threads this changes nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def to_counts(self) -> Tensor:
        """Return counts of SIGINT and SIGTERM, [2] float64, to be summed over the ranks."""
        received = [float(self.signal == number) for number in SIGNALS]
        return torch.tensor(received, dtype=torch.float64)

    @staticmethod
    def from_counts(counts: Sequence[float]) -> int | None:
        """Return a signal that some rank received, from the summed `to_counts`."""
        for number, count in zip(SIGNALS, counts):
            if count:
                return int(number)
        return None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)
