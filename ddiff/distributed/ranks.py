"""Ranks: the processes that divide the work of an evaluation, of sampling or of judging.

The work is a list of items, such as batches, that is the same on every rank. Of W ranks, rank r
does the items r, r + W, r + 2W and so on. The results of all items are then gathered on every rank,
in the order of the items. An item is never divided, padded, repeated or left out, and sums are
added in the order of the items. Figures are therefore bitwise equal for every number of ranks, if
the processes use the same number of threads.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from rich.console import Console
from torch import nn

from ddiff.distributed.launcher import check_address, get_rank_info

Item = TypeVar("Item")
Result = TypeVar("Result")

_WAITING = timedelta(days=7)  # timeout of ranks that wait for the results of a slower rank


class Ranks:
    """Processes that divide a list of items; this base class is a single process.

    Attributes:
        rank: number of this process, from 0 to `world_size` - 1.
        world_size: number of processes.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size

    @property
    def is_first(self) -> bool:
        """True on rank 0, the only rank that prints results and writes files."""
        return self.rank == 0

    def console(self, console: Console | None = None) -> Console | None:
        """Return the console of progress bars: `console` on rank 0, and a quiet one elsewhere."""
        return console if self.is_first else Console(quiet=True, force_terminal=False)

    def label(self, title: str) -> str:
        """Return the title of a progress bar, which shows the items of rank 0."""
        if self.world_size == 1:
            return title
        return f"{title} (rank {self.rank} of {self.world_size})"

    def share(self, count: int) -> range:
        """Return the numbers of the items of this rank, out of `count` items."""
        return range(self.rank, count, self.world_size)

    def gather(self, own: Sequence[Result]) -> list[Result]:
        """Return the results of all items in order, on every rank.

        `own` are the results of the items of this rank (`share`). Every rank must call this method.
        """
        return _interleave(self._exchange(list(own)))

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Call `function` on each item, on the rank of the item, and return all results in order.

        Every rank must call this method with the same list. If `function` raises an exception on
        one rank, the exception is raised on every rank, after the other ranks have done their
        items. Results are copied between processes by pickle, so tensors must be on the CPU.
        """
        return _interleave(
            self._run(lambda: [function(items[number]) for number in self.share(len(items))])
        )

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Call `function` on rank 0, and return its result on every rank.

        The other ranks wait. An exception is raised on every rank. If the result is a decision that
        depends on files, all ranks decide alike.
        """

        def work() -> list[Result]:
            return [function()] if self.is_first else []

        return self._run(work)[0][0]

    def _exchange(self, value: Result) -> list[Result]:
        """Return the values of all ranks, by rank."""
        return [value]

    def _run(self, work: Callable[[], Result]) -> list[Result]:
        """Call `work` on every rank, and return the results by rank."""
        return [work()]


class DistributedRanks(Ranks):
    """Ranks of an initialized process group of torch.distributed.

    Results travel through a separate gloo group, which needs no GPU memory and waits for days: the
    shares of two ranks may take different times. All ranks must build the object together.
    """

    def __init__(self) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size())
        self._group = dist.new_group(backend="gloo", timeout=_WAITING)

    def _exchange(self, value: Result) -> list[Result]:
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def _run(self, work: Callable[[], Result]) -> list[Result]:
        failure: Exception | None = None
        outcome: _Outcome
        try:
            outcome = _Outcome(work())
        except Exception as error:
            failure = error
            outcome = _Outcome.of_failure(error)
        outcomes = self._exchange(outcome)
        failed = [rank for rank, found in enumerate(outcomes) if found.error is not None]
        if not failed:
            return [found.result for found in outcomes]
        # The same exception on every rank: the launcher then prints one message, of any rank.
        if failed[0] == self.rank and failure is not None:
            raise failure
        first = outcomes[failed[0]]
        assert first.error is not None
        raise first.error from _RankError(failed[0], first.trace)


class _Outcome(NamedTuple):
    """Result of a rank, or the exception that ended its work, with the text of its traceback."""

    result: Any = None
    error: Exception | None = None
    trace: str = ""

    @classmethod
    def of_failure(cls, error: Exception) -> _Outcome:
        trace = "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            # The constructor of the exception takes other arguments than its message.
            return cls(error=RuntimeError(f"{type(error).__name__}: {error}"), trace=trace)
        return cls(error=error, trace=trace)


class _RankError(Exception):
    """Cause of an exception that another rank raised, with the traceback of that rank."""

    def __init__(self, rank: int, trace: str) -> None:
        super().__init__(f"on rank {rank}:\n{trace}")


def _interleave(parts: Sequence[Sequence[Result]]) -> list[Result]:
    """Return the results of all items in order, from those of each rank."""
    world_size = len(parts)
    count = sum(len(part) for part in parts)
    sizes = [len(range(rank, count, world_size)) for rank in range(world_size)]
    if [len(part) for part in parts] != sizes:
        raise RuntimeError(
            f"the ranks did {[len(part) for part in parts]} items in place of {sizes}: their lists "
            "of items differ"
        )
    return [parts[number % world_size][number // world_size] for number in range(count)]


@contextmanager
def connect_ranks() -> Iterator[Ranks]:
    """Connect the processes that a `ddiff` command or torchrun started, for a `with` block.

    Without a launcher, the block runs in this process only. After an exception the connection stays
    open, because closing it would wait for the other ranks.
    """
    info = get_rank_info()
    if info is None:
        yield Ranks()
        return
    check_address()
    dist.init_process_group("gloo", rank=info.rank, world_size=info.world_size, timeout=_WAITING)
    yield DistributedRanks()
    dist.destroy_process_group()


def ranks_in_training(world_size: int, module: nn.Module) -> Ranks:
    """Return the ranks that evaluate `module` together between two training steps.

    Sharded weights are gathered in each forward pass by all ranks together. All ranks must then run
    the network equally often, so every rank evaluates all batches, as a single process.
    """
    from torch.distributed.tensor import DTensor  # slow import

    is_sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    if world_size == 1 or is_sharded:
        return Ranks()
    return DistributedRanks()
