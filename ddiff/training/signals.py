"""SIGINT and SIGTERM: the first asks for a clean end after the step under way, the second ends at once."""

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
    """While entered, the first signal sets `signal`, and a second raises KeyboardInterrupt or SystemExit(128 + signal).

    Whoever waits for data looks at `signal` and gives up: nothing is under way then that could be lost.

    Only the main thread can have handlers; elsewhere this does nothing and the signals do what they did before.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def counts(self) -> Tensor:
        """[2] float64: whether each of SIGINT and SIGTERM came; over ranks they are summed."""
        return torch.tensor(
            [float(self.signal == number) for number in SIGNALS], dtype=torch.float64
        )

    @staticmethod
    def received(counts: Sequence[float]) -> int | None:
        """The signal that some rank received, by the sums of `counts`."""
        return next((int(number) for number, count in zip(SIGNALS, counts) if count), None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)
