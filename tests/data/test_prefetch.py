"""Prefetching of batches in threads changes neither batches nor the step of an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from corpora import TOKENIZER, chunks_of, sentences

from ddiff.data.documents import documents_from_texts
from ddiff.data.packing import Rows, batch_rows, pack
from ddiff.data.prefetch import Prefetcher
from ddiff.data.streaming import StreamedRows
from ddiff.errors import ArgumentError

TEXTS = sentences(60)
PACKED = pack(documents_from_texts(TEXTS), TOKENIZER, 16)


def batches_of(rows: Rows) -> Callable[[int, int], list[list[int]]]:
    def batch_at(step: int, micro: int) -> list[list[int]]:
        slots = 8 * step + 4 * micro + np.arange(4)
        return batch_rows(rows, rows.order(0, slots), index=slots).ids.tolist()

    return batch_at


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("source", ["packed", "streamed"])
def test_prefetched_batches_do_not_depend_on_the_number_of_workers(
    source: str, workers: int
) -> None:
    """Batches are requested over several epochs, and then from another step, as after resuming."""
    streamed = StreamedRows(chunks_of(TEXTS), TOKENIZER, 16, head=PACKED, fingerprint="", block=8)
    rows = PACKED if source == "packed" else streamed
    plain = batches_of(PACKED if source == "packed" else rows)
    calls = [(step, micro) for step in [*range(30), *range(7, 12), 3] for micro in range(2)]
    expected = [plain(*call) for call in calls]
    with Prefetcher(batches_of(rows), 3, accumulate=2, workers=workers) as ahead:
        assert [ahead(*call) for call in calls] == expected


def test_prefetcher_reads_the_next_batches_in_advance() -> None:
    calls: list[tuple[int, int]] = []
    ready = threading.Event()

    def batch_at(step: int, micro: int) -> int:
        calls.append((step, micro))
        if (step, micro) == (1, 1):
            ready.set()
        return step

    with Prefetcher(batch_at, 3, accumulate=2) as ahead:
        ahead(0, 0)
        assert ready.wait(5.0)
        assert calls == [(0, 0), (0, 1), (1, 0), (1, 1)]
        ahead(0, 1)
        ahead(1, 0)
    assert len(calls) == len(set(calls))  # nothing is read twice


def test_prefetcher_reads_batches_while_training_steps_run() -> None:
    """Without overlap, twenty reads of 10 ms and twenty steps of 10 ms would take 0.4 s."""

    def batch_at(step: int, micro: int) -> int:
        time.sleep(0.01)
        return step

    spent = []
    for ahead in (0, 2):
        with Prefetcher(batch_at, ahead, workers=2) as read:
            began = time.monotonic()
            for step in range(20):
                read(step, 0)
                time.sleep(0.01)
            spent.append(time.monotonic() - began)
    assert spent[1] < 0.85 * spent[0]


def test_prefetcher_raises_a_read_error_when_the_batch_is_requested() -> None:
    def batch_at(step: int, micro: int) -> int:
        if step == 2:
            raise ValueError("torn row")
        return step

    with Prefetcher(batch_at, 4) as ahead:
        assert [ahead(0, 0), ahead(1, 0)] == [0, 1]
        with pytest.raises(ValueError, match="torn row"):
            ahead(2, 0)
        assert ahead(3, 0) == 3


def test_closed_prefetcher_reads_batches_without_threads() -> None:
    ahead = Prefetcher(lambda step, micro: step, 2)
    before = threading.active_count()
    ahead(0, 0)
    assert threading.active_count() > before
    ahead.close()
    assert threading.active_count() == before
    assert ahead(5, 0) == 5
    with pytest.raises(ArgumentError, match="ahead"):
        Prefetcher(lambda step, micro: step, -1)
