"""Scheduler of the HTTP server: batches, order, cancelled requests, errors and the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest
import torch

from ddiff.errors import ArgumentError
from ddiff.runs.conditioning import SamplingPlan
from ddiff.runs.prompts import Template
from ddiff.serve.engine import Drawn, OnStates
from ddiff.serve.limits import Limits
from ddiff.serve.refusals import Refusal
from ddiff.serve.requests import BatchKey, Row
from ddiff.serve.scheduler import Job, Scheduler

STEPS = 3
SOON = 10.0  # seconds; far more than any step of these tests takes


class Collector:
    """Listener that keeps the results of a request."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []  # (index of the row, step)
        self.drawn: list[int] = []
        self.errors: list[Refusal] = []
        self.changed = threading.Condition()

    def on_states(self, row: Row, step: int, read: Callable[[], list[int]]) -> None:
        self.steps.append((row.index, step))

    def on_drawn(self, row: Row, drawn: Drawn) -> None:
        with self.changed:
            self.drawn.append(row.index)
            self.changed.notify()

    def on_error(self, error: Refusal) -> None:
        with self.changed:
            self.errors.append(error)
            self.changed.notify()

    def wait(self, results: int) -> None:
        with self.changed:
            assert self.changed.wait_for(
                lambda: len(self.drawn) + len(self.errors) >= results, timeout=SOON
            )


class SteppedModel:
    """Model whose batches take STEPS steps. A test lets the steps go by `go`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []  # seeds of the rows of each batch
        self.started = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.failure: BaseException | None = None

    def draw(self, rows: Sequence[Row], on_states: OnStates) -> list[Drawn]:
        self.batches.append([row.seed for row in rows])
        self.started.release()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        for step in range(1, STEPS + 1):
            assert self.go.acquire(timeout=SOON)
            on_states(step, lambda row: [row])
        return [Drawn([], STEPS) for _ in rows]

    def wait_for_batch(self) -> None:
        assert self.started.acquire(timeout=SOON)

    def finish_batches(self, count: int = 1) -> None:
        self.go.release(count * STEPS)


@pytest.fixture
def model() -> SteppedModel:
    return SteppedModel()


@pytest.fixture
def scheduler(model: SteppedModel) -> Iterator[Scheduler]:
    scheduler = Scheduler(model.draw, Limits(batch=3, queue=6))
    yield scheduler
    model.go.release(1000)
    scheduler.close(SOON)
    assert not scheduler.is_alive


def make_job(seed: int, count: int = 1, steps: int = 8) -> tuple[Job, Collector]:
    """Return a job of `count` rows. Rows with equal `steps` may share a batch."""
    ids = torch.zeros(0, dtype=torch.long)
    template = Template("", ids, ids.bool(), whole=False)
    key = BatchKey(None, (), steps, (), 1.0, False)
    plan = cast(SamplingPlan, None)
    collector = Collector()
    return Job([Row(template, seed, n, plan, key) for n in range(count)], collector), collector


def test_batch_has_the_oldest_row_and_later_rows_with_the_same_key(
    scheduler: Scheduler, model: SteppedModel
) -> None:
    scheduler.submit(make_job(0)[0])
    model.wait_for_batch()  # the others are queued while this batch is drawn
    jobs = [make_job(seed, steps=steps) for seed, steps in ((1, 8), (2, 9), (3, 8), (4, 8), (5, 8))]
    for job, _ in jobs:
        scheduler.submit(job)
    model.finish_batches(4)
    for _, collector in jobs:
        collector.wait(1)
    assert model.batches == [[0], [1, 3, 4], [2], [5]]


def test_rows_of_a_long_request_are_divided_into_batches(
    scheduler: Scheduler, model: SteppedModel
) -> None:
    job, collector = make_job(7, count=5)
    scheduler.submit(job)
    model.finish_batches(2)
    collector.wait(5)
    assert model.batches == [[7, 7, 7], [7, 7]]
    assert sorted(collector.drawn) == [0, 1, 2, 3, 4]
    assert collector.steps == [
        (row, step) for first in ((0, 1, 2), (3, 4)) for step in (1, 2, 3) for row in first
    ]


def test_full_queue_refuses_a_request_with_status_429(
    scheduler: Scheduler, model: SteppedModel
) -> None:
    scheduler.submit(make_job(0)[0])
    model.wait_for_batch()
    scheduler.submit(make_job(1, count=5)[0])
    with pytest.raises(Refusal) as caught:
        scheduler.submit(make_job(2, count=2)[0])
    assert caught.value.status == 429
    scheduler.submit(make_job(3)[0])  # fits
    assert scheduler.queued == 6


def test_cancelled_request_leaves_the_queue(scheduler: Scheduler, model: SteppedModel) -> None:
    first, of_first = make_job(0)
    scheduler.submit(first)
    model.wait_for_batch()
    job, collector = make_job(1, count=4)
    last, of_last = make_job(2)
    scheduler.submit(job)
    scheduler.submit(last)
    scheduler.cancel(job)
    scheduler.cancel(job)  # no effect
    assert scheduler.queued == 1
    model.finish_batches(2)
    of_first.wait(1)
    of_last.wait(1)
    assert model.batches == [[0], [2]]
    assert collector.drawn == []
    assert scheduler.counts.cancelled == 4


def test_request_with_all_samples_is_not_counted_as_cancelled(
    scheduler: Scheduler, model: SteppedModel
) -> None:
    job, collector = make_job(0)
    ended = threading.Event()

    def end_response(row: Row, drawn: Drawn) -> None:
        scheduler.cancel(job)  # before the thread has left the batch
        ended.set()

    collector.on_drawn = end_response  # type: ignore[method-assign]
    scheduler.submit(job)
    model.finish_batches()
    assert ended.wait(SOON)
    assert (scheduler.counts.drawn, scheduler.counts.cancelled) == (1, 0)


def test_batch_stops_after_the_current_step_if_all_requests_are_cancelled(
    scheduler: Scheduler, model: SteppedModel
) -> None:
    job, collector = make_job(0, count=2)
    scheduler.submit(job)
    model.wait_for_batch()
    scheduler.cancel(job)
    later, of_later = make_job(1)
    scheduler.submit(later)
    model.go.release(1)  # one step of the cancelled batch, and none of its other steps
    model.wait_for_batch()
    model.finish_batches()
    of_later.wait(1)
    assert (collector.steps, collector.drawn) == ([], [])
    assert scheduler.counts.stopped == 1


def test_cancelled_request_in_a_batch_gets_no_results_and_the_others_do(
    scheduler: Scheduler, model: SteppedModel
) -> None:
    scheduler.submit(make_job(0)[0])
    model.wait_for_batch()
    job, collector = make_job(1)
    other, of_other = make_job(2)
    scheduler.submit(job)
    scheduler.submit(other)
    model.finish_batches()
    model.wait_for_batch()
    scheduler.cancel(job)
    model.finish_batches()
    of_other.wait(1)
    assert (collector.steps, collector.drawn) == ([], [])
    assert of_other.steps == [(0, 1), (0, 2), (0, 3)]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ArgumentError("too much"), "too much"),
        (RuntimeError("out of memory"), "Out of memory"),
        (KeyError("x"), "defect of ddiff"),
        (SystemExit(0), "defect of ddiff"),
    ],
    ids=["user", "memory", "defect", "exit"],
)
def test_failed_batch_is_an_error_of_its_requests_and_not_of_later_ones(
    scheduler: Scheduler, model: SteppedModel, failure: BaseException, message: str
) -> None:
    model.failure = failure
    job, collector = make_job(0, count=2)
    scheduler.submit(job)
    collector.wait(1)
    assert [error.status for error in collector.errors] == [500]
    assert message in collector.errors[0].message
    later, of_later = make_job(1)
    scheduler.submit(later)
    model.finish_batches()
    of_later.wait(1)
    assert of_later.drawn == [0]


def test_close_sends_an_error_to_every_open_request_and_refuses_new_ones(
    model: SteppedModel,
) -> None:
    scheduler = Scheduler(model.draw, Limits(batch=1))
    running, of_running = make_job(0)
    queued, of_queued = make_job(1)
    scheduler.submit(running)
    model.wait_for_batch()
    scheduler.submit(queued)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    of_running.wait(1)
    model.go.release(1)  # the batch stops after this step
    closing.join(SOON)
    assert not scheduler.is_alive
    assert [error.status for error in of_running.errors + of_queued.errors] == [503, 503]
    with pytest.raises(Refusal, match="stopping"):
        scheduler.submit(make_job(2)[0])
