"""Queue of rows, and the thread that draws them in batches.

Only this thread evaluates the network. It takes the oldest row and the next rows with the same
key. A batch is never extended while it is drawn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ddiff.errors import explain_error
from ddiff.serve.engine import Drawn, OnStates
from ddiff.serve.limits import Limits
from ddiff.serve.refusals import Refusal
from ddiff.serve.requests import Row

DrawRows = Callable[[Sequence[Row], OnStates], list[Drawn]]


class Listener(Protocol):
    """Receiver of the results of a request. The thread of the scheduler calls its methods."""

    def on_states(self, row: Row, step: int, read: Callable[[], list[int]]) -> None:
        """Receive the states of a row after a step. `read` copies them from the device."""

    def on_drawn(self, row: Row, drawn: Drawn) -> None:
        """Receive the sample of a row."""

    def on_error(self, error: Refusal) -> None:
        """Receive an error, after which the request has no further results."""


@dataclass(eq=False)
class Job:
    """Request in the scheduler.

    Attributes:
        rows: samples to draw.
        listener: receiver of the results.
        is_cancelled: True after `Scheduler.cancel`, or after an error.
        sent: rows whose sample was sent to the listener.
    """

    rows: Sequence[Row]
    listener: Listener
    is_cancelled: bool = False
    sent: int = 0


@dataclass
class Counts:
    """Numbers of rows and batches since the start.

    Attributes:
        drawn: rows whose sample was sent.
        cancelled: rows that were cancelled by the client or after an error.
        failed: rows of requests that received an error.
        batches: batches that were started.
        stopped: batches that were stopped because all of their rows were cancelled.
        largest: rows of the largest batch.
    """

    drawn: int = 0
    cancelled: int = 0
    failed: int = 0
    batches: int = 0
    stopped: int = 0
    largest: int = 0


class _Stop(Exception):
    """Raised from a step of a batch in which every request is cancelled."""


class Scheduler:
    """Queue of rows with one thread that draws them.

    Args:
        draw: draws rows with equal keys.
        limits: largest batch and longest queue.
    """

    def __init__(self, draw: DrawRows, limits: Limits) -> None:
        self.counts = Counts()
        self._draw = draw
        self._limits = limits
        self._queue: deque[tuple[Job, Row]] = deque()
        self._running: list[tuple[Job, Row]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="ddiff-serve", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Number of rows in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of rows in the batch that is drawn."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """True if no row is queued or drawn."""
        with self._changed:  # a batch moves from the queue to the running rows in one step
            return not self._queue and not self._running

    @property
    def is_alive(self) -> bool:
        """True if the thread accepts rows."""
        return self._thread.is_alive() and not self._is_closed

    def submit(self, job: Job) -> None:
        """Append the rows of a job to the queue.

        Raises Refusal with status 429 if the queue has no room for all of them.
        """
        with self._changed:
            if not self.is_alive:
                raise Refusal("The server is stopping.", status=503, code="stopping")
            if len(job.rows) > self._limits.queue - len(self._queue):
                raise Refusal(
                    f"The queue has {len(self._queue)} samples and room for {self._limits.queue}; "
                    f"got {len(job.rows)} more. Send the request again later.",
                    status=429,
                    code="queue_full",
                )
            self._queue.extend((job, row) for row in job.rows)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Remove the rows of a job from the queue, and ignore its rows in the current batch.

        The batch stops after the current step if all of its jobs are cancelled.
        """
        with self._changed:
            if job.is_cancelled:
                return
            job.is_cancelled = True
            self._queue = deque(entry for entry in self._queue if entry[0] is not job)
            # a response cancels its job after the last sample, when the batch may still be running
            self.counts.cancelled += len(job.rows) - job.sent

    def close(self, timeout: float = 30.0) -> None:
        """Refuse all rows of the queue and stop the thread after the current step."""
        with self._changed:
            self._is_closed = True
            jobs = {id(job): job for job, _ in [*self._queue, *self._running]}
            self._changed.notify()
        for job in jobs.values():
            self._fail([job], Refusal("The server was stopped.", status=503, code="stopping"))
        self._thread.join(timeout)

    # ------------------------------------------------------------------ the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    return
                self._running = self._take_batch()
            try:
                self._draw_batch(self._running)
            finally:
                with self._changed:
                    self._running = []

    def _take_batch(self) -> list[tuple[Job, Row]]:
        """Remove the oldest row and the next rows with the same key from the queue."""
        key = self._queue[0][1].key
        batch: list[tuple[Job, Row]] = []
        others: deque[tuple[Job, Row]] = deque()
        for entry in self._queue:
            if len(batch) < self._limits.batch and entry[1].key == key:
                batch.append(entry)
            else:
                others.append(entry)
        self._queue = others
        return batch

    def _draw_batch(self, batch: Sequence[tuple[Job, Row]]) -> None:
        counts = self.counts
        counts.batches += 1
        counts.largest = max(counts.largest, len(batch))

        def on_states(step: int, states: Callable[[int], list[int]]) -> None:
            if all(job.is_cancelled for job, _ in batch):
                raise _Stop
            for number, (job, row) in enumerate(batch):
                if not job.is_cancelled:
                    job.listener.on_states(row, step, partial(states, number))

        try:
            found = self._draw([row for _, row in batch], on_states)
        except _Stop:
            counts.stopped += 1
            return
        # SystemExit too, which a plugin may raise: the other requests must get their results
        except BaseException as error:
            self._fail([job for job, _ in batch], _explain(error))
            return
        for (job, row), drawn in zip(batch, found, strict=True):
            if not job.is_cancelled:
                counts.drawn += 1
                job.sent += 1
                job.listener.on_drawn(row, drawn)

    def _fail(self, jobs: Sequence[Job], error: Refusal) -> None:
        """Send an error to the requests of jobs, and cancel them."""
        for job in dict.fromkeys(jobs):
            if not job.is_cancelled:
                self.cancel(job)
                self.counts.failed += len(job.rows)
                job.listener.on_error(error)


def _explain(error: BaseException) -> Refusal:
    message = explain_error(error) or f"{type(error).__name__}: {error}. This is a defect of ddiff."
    return Refusal(f"The batch of this request failed. {message}", status=500, code="failed")
