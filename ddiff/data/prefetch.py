"""Batches read ahead of the step that asks for them, in threads of this process."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar, final

from ddiff.errors import ArgumentError
from ddiff.progress import LINE_EVERY_SECONDS, print_line

Item = TypeVar("Item")
_POLL = 0.05  # seconds between looks at whether a batch that is waited for is still wanted
_GRACE = 1.0  # seconds that `close` gives the threads to finish what they read


@final
class Prefetcher(Generic[Item]):
    """`batch_at(step, micro)`, a pure function, with the next `ahead` calls under way: the same bits, sooner.

    The next call is taken to be that of the next micro-batch of `accumulate`, then of the next step; any other is answered
    too, and what was read in vain forgotten. `workers` threads read (0: none, and nothing is read ahead): reading waits for
    the disk and copies memory-mapped arrays. What `batch_at` raises is raised by the call that wanted it. While a call
    waits, a line is printed every ten seconds, unless `quiet`.
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
                f"Prefetcher: ahead and workers must be at least 0 and accumulate at least 1; got {ahead}, {workers} and "
                f"{accumulate}."
            )
        self._batch_at, self._accumulate = batch_at, accumulate
        self._ahead = ahead if workers else 0
        self._quiet = quiet
        self._threads = _Threads(workers) if self._ahead else None
        self._waiting: dict[tuple[int, int], Future[Item]] = {}

    def __call__(self, step: int, micro: int) -> Item:
        item = self.fetch(step, micro, lambda: False)
        assert item is not None
        return item

    def fetch(self, step: int, micro: int, stopped: Callable[[], bool]) -> Item | None:
        """The same batch, or None as soon as `stopped()` is true while it is waited for."""
        if self._threads is None:
            return self._batch_at(step, micro)
        wanted = (step, micro)
        if wanted not in self._waiting:
            self._forget()
        due = [wanted]
        for _ in range(self._ahead):
            due.append(self._after(due[-1]))
        for call in due:
            if call not in self._waiting:
                self._waiting[call] = self._threads.submit(self._batch_at, *call)
        if not self._waits(self._waiting[wanted], step, stopped):
            return None
        return self._waiting.pop(wanted).result()

    def _waits(self, future: Future[Item], step: int, stopped: Callable[[], bool]) -> bool:
        """Wait until the batch is there; False when it is given up."""
        began = told = time.monotonic()
        while not _is_done(future, _POLL):
            if stopped():
                return False
            now = time.monotonic()
            if not self._quiet and now - told >= LINE_EVERY_SECONDS:
                told = now
                print_line(f"waiting for the data of step {step + 1}: {now - began:.0f} s so far")
        return True

    def close(self) -> None:
        """End the threads; calls are answered without them from now on. One that still reads is not waited for long."""
        if self._threads is not None:
            self._forget()
            self._threads.close()
            self._threads = None

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _after(self, call: tuple[int, int]) -> tuple[int, int]:
        step, micro = call
        return (step, micro + 1) if micro + 1 < self._accumulate else (step + 1, 0)

    def _forget(self) -> None:
        for future in self._waiting.values():
            future.cancel()
        self._waiting.clear()


class _Threads:
    """Threads that work off calls. The interpreter does not wait for them at its end, as it does for those of an executor:
    a source that stands still would keep a run that was told to stop."""

    def __init__(self, number: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._number = number
        self._threads: list[threading.Thread] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        while len(self._threads) < self._number:
            thread = threading.Thread(
                target=self._work, name=f"batches_{len(self._threads)}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        future: Future[Any] = Future()
        self._calls.put((future, lambda: function(*arguments)))
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
    """Whether a call has ended, well or not, within so many seconds."""
    try:
        future.exception(seconds)
    except TimeoutError:
        return future.done()
    return True
