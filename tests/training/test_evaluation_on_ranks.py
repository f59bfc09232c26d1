"""Evaluation, sampling and judging by several ranks equal those by one process, bit for bit."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from shared_work import BATCHES, ITEMS, WORK, do_all, fail_on_one_rank

from ddiff.distributed.ranks import Ranks

NUMBERS = (1, 3, 4)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """Number of ranks -> the record that each rank wrote of its work."""
    folder = tmp_path_factory.mktemp("done")
    found = {}
    for world_size in NUMBERS:
        on_ranks(world_size, do_all, str(folder))
        files = [folder / f"{world_size}-{rank}" for rank in range(world_size)]
        found[world_size] = [pickle.loads(file.read_bytes()) for file in files]
    return found


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", WORK)
def test_every_item_is_done_exactly_once_by_any_number_of_ranks(
    done: dict[int, list[Any]], name: str, batch: int
) -> None:
    for world_size, ranks in done.items():
        asked = Counter(item for rank in ranks for item in rank[name, batch]["asked"])
        times = set(asked.values())  # the number of draws
        assert set(asked) == set(range(ITEMS)), world_size
        assert len(times) == 1, world_size
        expected = len(done[1][0][name, batch]["asked"]) // ITEMS
        assert times == {expected}, world_size
        batches = -(-ITEMS // batch)
        idle = [rank for rank in ranks if not rank[name, batch]["asked"]]
        # no rank waits idly while another one has two batches in a draw
        assert len(idle) == max(0, world_size - batches * (expected if name == "fields" else 1))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", WORK)
def test_results_are_bitwise_equal_on_every_rank_of_any_number_of_ranks(
    done: dict[int, list[Any]], name: str, batch: int
) -> None:
    expected = done[1][0][name, batch]["found"]
    for ranks in done.values():
        for rank in ranks:
            assert rank[name, batch]["found"] == expected  # no tolerance


def test_until_makes_the_same_number_of_draws_on_all_ranks(
    done: dict[int, list[Any]],
) -> None:
    found = [rank["likelihood", 2]["found"] for ranks in done.values() for rank in ranks]
    draws = {each["protocol"]["draws"] for each in found}
    assert len(draws) == 1
    assert draws.pop() > 4  # more than the fewest, so that several decisions were made


def test_error_on_one_rank_is_raised_on_all_ranks_without_a_deadlock(tmp_path: Path) -> None:
    on_ranks(3, fail_on_one_rank, str(tmp_path))
    messages = [(tmp_path / str(rank)).read_text().splitlines() for rank in range(3)]
    assert [found[0] for found in messages] == ["ArgumentError: item 4 is broken"] * 3
    # only rank 0 has the exception itself; the others have its text
    assert messages[0][1] == "UnusualError: two parts"
    assert {found[1] for found in messages[1:]} == {"RuntimeError: UnusualError: two parts"}
    assert all("their lists of items differ" in found[2] for found in messages)


def test_single_process_does_all_items_and_keeps_exceptions() -> None:
    ranks = Ranks()
    assert ranks.is_first
    assert list(ranks.share(3)) == [0, 1, 2]
    assert ranks.map(lambda item: 2 * item, [1, 2, 3]) == [2, 4, 6]
    assert ranks.on_first(lambda: "result") == "result"
    assert ranks.gather(["a", "b"]) == ["a", "b"]
    with pytest.raises(ZeroDivisionError):
        ranks.map(lambda item: 1 // item, [1, 0])
