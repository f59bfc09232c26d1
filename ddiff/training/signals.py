"""Handling of SIGINT and SIGTERM during training.

After the first signal, the current step is finished and a checkpoint is saved. A second signal ends
training immediately.
"""

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

    A second signal raises KeyboardInterrupt or SystemExit(128 + signal). Code that waits for the
    data of the next step polls `signal` and returns after the first signal: the step has not begun,
    so no work is lost.

    Python installs signal handlers only in the main thread. In other threads this context manager
    has no effect.
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
        """Return [SIGINT count, SIGTERM count] of this process, each 0 or 1, as float64 [2]."""
        received = [float(self.signal == number) for number in SIGNALS]
        return torch.tensor(received, dtype=torch.float64)

    @staticmethod
    def from_counts(counts: Sequence[float]) -> int | None:
        """Return a signal that at least one rank received, or None.

        `counts` is the sum of `to_counts` over the ranks.
        """
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
