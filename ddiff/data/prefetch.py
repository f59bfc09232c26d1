"""Batches read ahead of the step that asks for them, in threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar, final

from ddiff.errors import ArgumentError

Item = TypeVar("Item")


@final
class Prefetched(Generic[Item]):
    """`batch_at(step, micro)`, a pure function, with the next `ahead` calls under way: the same bits, sooner.

    The next call is taken to be that of the next micro-batch of `accumulate`, then of the next step; any other is answered
    too, and what was read in vain forgotten. `workers` threads read (0: none, and nothing is read ahead): reading waits for
    the disk and copies memory-mapped arrays. What `batch_at` raises is raised by the call that wanted it.
    """

    def __init__(
        self, batch_at: Callable[[int, int], Item], ahead: int = 2, *, accumulate: int = 1, workers: int = 1
    ) -> None:
        if ahead < 0 or accumulate < 1 or workers < 0:
            raise ArgumentError(
                f"Prefetched: ahead and workers must be at least 0 and accumulate at least 1; got {ahead}, {workers} and "
                f"{accumulate}."
            )
        self._batch_at, self._accumulate = batch_at, accumulate
        self._ahead = ahead if workers else 0
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="batches") if self._ahead else None
        self._waiting: dict[tuple[int, int], Future[Item]] = {}

    def __call__(self, step: int, micro: int) -> Item:
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
        return self._waiting.pop(wanted).result()

    def close(self) -> None:
        """End the threads; calls are answered without them from now on."""
        if self._threads is not None:
            self._forget()
            self._threads.shutdown()
            self._threads = None

    def __enter__(self) -> Prefetched[Item]:
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
