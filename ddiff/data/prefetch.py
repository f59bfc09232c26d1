"""Read batches in advance in threads of this process, while training steps compute."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, TypeVar, final

from ddiff.errors import ArgumentError
from ddiff.progress import LINE_EVERY_SECONDS, print_line

Item = TypeVar("Item")
_POLL = 0.05  # seconds between checks whether an awaited batch is still wanted
_GRACE = 1.0  # seconds that `close` gives the threads to finish a read


@final
class Prefetcher(Generic[Item]):
    """Prefetcher of the batches that the pure function `batch_at(step, micro)` returns.

    Each request for a batch starts reading the next `ahead` batches: the remaining micro-batches of
    the step, then those of the next step. If a batch is requested in another order, the prefetched
    batches are discarded and the requested batch is read. An exception of `batch_at` is raised when
    the batch is requested.

    Args:
        ahead: number of batches to read ahead.
        accumulate: number of micro-batches per step.
        workers: number of threads; 0: nothing is read ahead.
        quiet: do not print the line that is otherwise printed every ten seconds while a request
            is blocked.
    """

    def __init__(
        self,
        batch_at: Callable[[int, int], Item],
        ahead: int = 2,
        *,
        accumulate: int = 1,
        workers: int = 1,
        quiet: bool = False,
    ) -> None:
        if ahead < 0 or accumulate < 1 or workers < 0:
            raise ArgumentError(
                "Prefetcher: ahead and workers must be at least 0 and accumulate at least 1; got "
                f"{ahead}, {workers} and {accumulate}."
            )
        self._batch_at = batch_at
        self._accumulate = accumulate
        self._ahead = ahead if workers else 0
        self._quiet = quiet
        self._threads = _ThreadPool(workers) if self._ahead else None
        self._pending: dict[tuple[int, int], Future[Item]] = {}

    def __call__(self, step: int, micro: int) -> Item:
        item = self.fetch(step, micro, lambda: False)
        assert item is not None
        return item

    def fetch(self, step: int, micro: int, stopped: Callable[[], bool]) -> Item | None:
        """Return micro-batch `micro` of a step, or None if `stopped()` becomes true first.

        `stopped` is polled while the batch is being read.
        """
        if self._threads is None:
            return self._batch_at(step, micro)
        wanted = (step, micro)
        if wanted not in self._pending:
            self._discard_pending()
        calls = [wanted]
        for _ in range(self._ahead):
            calls.append(self._following(calls[-1]))
        for call in calls:
            if call not in self._pending:
                self._pending[call] = self._threads.submit(self._batch_at, *call)
        if not self._wait(self._pending[wanted], step, stopped):
            return None
        return self._pending.pop(wanted).result()

    def _wait(self, future: Future[Item], step: int, stopped: Callable[[], bool]) -> bool:
        """Wait until a batch is read; return False if `stopped()` becomes true first.

        `step`: number of the training step, for the line that is printed during a long wait.
        """
        began = time.monotonic()
        last_line = began
        while not _is_done(future, _POLL):
            if stopped():
                return False
            now = time.monotonic()
            if not self._quiet and now - last_line >= LINE_EVERY_SECONDS:
                last_line = now
                print_line(f"waiting for the data of step {step + 1}: {now - began:.0f} s so far")
        return True

    def close(self) -> None:
        """Stop the threads, and wait at most one second for unfinished reads.

        After `close`, a requested batch is read in the calling thread.
        """
        if self._threads is not None:
            self._discard_pending()
            self._threads.close()
            self._threads = None

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _following(self, call: tuple[int, int]) -> tuple[int, int]:
        step, micro = call
        if micro + 1 < self._accumulate:
            return step, micro + 1
        return step + 1, 0

    def _discard_pending(self) -> None:
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()


class _ThreadPool:
    """Pool of daemon threads.

    A ThreadPoolExecutor is not used, because Python waits for the threads of an executor before it
    exits. A run could then not stop while its data source does not respond.
    """

    def __init__(self, size: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        self._size = size
        self._threads: list[threading.Thread] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        while len(self._threads) < self._size:
            name = f"batches_{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        future: Future[Any] = Future()
        self._calls.put((future, partial(function, *arguments)))
        return future

    def close(self) -> None:
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + _GRACE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


def _is_done(future: Future[Any], seconds: float) -> bool:
    """Wait up to `seconds` and return whether `future` has a result or an exception."""
    try:
        future.exception(seconds)
    except TimeoutError:
        # If the call itself has raised the TimeoutError, the call is done.
        return future.done()
    return True
