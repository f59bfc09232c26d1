"""SIGINT and SIGTERM: the first asks for a clean end after the step under way, the second ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, final

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class Interruption:
    """While entered, the first signal sets `signal`, and a second raises KeyboardInterrupt or SystemExit(128 + signal).

    Only the main thread can have handlers; elsewhere this does nothing and the signals do what they did before.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)
