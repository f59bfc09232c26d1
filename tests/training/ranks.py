"""Training programs that tests run on several ranks.

The ranks are forked from a process that has already imported all modules, to save time.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toy import ROWS, Identify, Net, Rows, row, toy_trainer

from ddiff.distributed.data_parallel import DistributedBackend
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.session import TrainingSession
from ddiff.training.protocols import LossTerms

START = 60.0  # seconds until a rank is killed; a rank that waits for a dead rank would never end
SYMBOLS = Path(__file__).parent / "symbols.toml"
FIELDS = Path(__file__).parent / "fields.toml"


def on_ranks(world_size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(*arguments)` on `world_size` ranks.

    Raises AssertionError with the output of a rank that fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "ddiff.runs.stages",
            "ddiff.distributed.data_parallel",
            "torch._dynamo",
            "ddiff_dit.dit",
            "ddiff.checkpoint.dcp_storage",
        ]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = [str(Path(__file__).parent), *sys.path]
    processes = [
        context.Process(
            target=_rank,
            args=(path, rank, world_size, port, (work.__module__, work.__name__), arguments),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(START)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world_size


def _rank(
    path: list[str],
    rank: int,
    world_size: int,
    port: int,
    work: tuple[str, str],
    arguments: tuple[Any, ...],
) -> None:
    sys.path[:] = path
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        module, name = work
        getattr(importlib.import_module(module), name)(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def train_symbols(settings: list[str], cache: str) -> None:
    """Train the recipe symbols.toml with the given settings; `cache` is the cache folder."""
    train_recipe(SYMBOLS, settings, cache)


def train_fields(settings: list[str], cache: str) -> None:
    """Train the recipe fields.toml, which has a field of vectors and a field of tokens."""
    train_recipe(FIELDS, settings, cache)


def train_recipe(path: Path, settings: list[str], cache: str) -> None:
    """Train a recipe with the given settings; `cache` is the cache folder."""
    os.environ["DDIFF_CACHE"] = cache
    with TrainingSession.open(parse_recipe(path.read_text(), str(path), settings)) as session:
        start = session.run.checkpoints.newest()
        if start is None:
            session.initialize_weights()
        session.fit(start)


class BrokenOn(Identify):
    """Objective of the toy model whose loss is NaN in one step on one rank."""

    def __init__(self, module: torch.nn.Module, rank: int, step: int) -> None:
        super().__init__(module)
        self.broken, self.calls, self.step = int(os.environ["RANK"]) == rank, 0, step

    def __call__(
        self, batch: Rows, noise: Tensor, denominators: dict[str, Tensor], slots: int
    ) -> LossTerms:
        terms = super().__call__(batch, noise, denominators, slots)
        self.calls += 1
        return (
            LossTerms(terms.loss * float("nan"), terms.metrics)
            if self.broken and self.calls == self.step
            else terms
        )


def shares_at(backend: DistributedBackend, accumulate: int) -> Callable[[int, int], Rows]:
    def batch_at(step: int, micro: int) -> Rows:
        size = ROWS // (accumulate * backend.world_size)
        first = (micro * backend.world_size + backend.rank) * size
        index = torch.arange(first, first + size)
        ids, scored = zip(*(row(int(slot), step) for slot in index))
        return Rows(torch.stack(ids), torch.stack(scored), index)

    return batch_at


def train_toys(folder: str) -> None:
    """Train the toy model three times: plain, with micro-batches, with a NaN on the last rank."""
    backend = DistributedBackend("cpu")
    for name, accumulate in (("whole", 1), ("micro", 2)):
        torch.manual_seed(0)
        objective = Identify(backend.wrap(Net().double()))
        place, batch_at = Path(folder, name), shares_at(backend, accumulate)
        trainer = toy_trainer(
            place,
            6,
            objective=objective,
            backend=backend,
            accumulate=accumulate,
            batch_at=batch_at,
            log_every=2,
        )
        trainer.fit()
        _save(backend, objective, place)
    torch.manual_seed(0)
    objective = BrokenOn(backend.wrap(Net().double()), rank=backend.world_size - 1, step=3)
    place = Path(folder, "broken")
    summary = toy_trainer(
        place, 5, objective=objective, backend=backend, batch_at=shares_at(backend, 1)
    ).fit()
    assert (summary.skipped_steps, summary.step) == (1, 5)
    _save(backend, objective, place)
    del objective, trainer
    backend.close()
    backend.close()  # a second call must have no effect


def train_with_dropout(folder: str) -> None:
    """Train the toy model three times: few checkpoints, many checkpoints, and with a signal."""
    backend = DistributedBackend("cpu")
    rows = shares_at(backend, 1)
    for name, checkpoint_every, starts in (("few", 6, 1), ("many", 1, 1), ("stopped", 6, 2)):
        for start in range(starts):

            def batch_at(step: int, micro: int, stops: bool = start + 1 < starts) -> Rows:
                if stops and step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return rows(step, micro)

            torch.manual_seed(0)
            objective = Identify(backend.wrap(Net(dropout=0.3).double()))
            settings = {
                "objective": objective,
                "backend": backend,
                "checkpoint_every": checkpoint_every,
            }
            trainer = toy_trainer(Path(folder, name), 6, batch_at=batch_at, **settings)
            trainer.fit(trainer.checkpoints.newest())
        _save(backend, objective, Path(folder, name))
    del objective, trainer, settings
    backend.close()


def _save(backend: DistributedBackend, objective: Identify, place: Path) -> None:
    place.mkdir(exist_ok=True, parents=True)
    torch.save(backend.unwrap(objective.module).state_dict(), place / f"rank{backend.rank}.pt")


def stop_one(folder: str) -> None:
    """Send SIGTERM to the last rank in the third step; all ranks stop after the fourth step.

    The other ranks learn of the signal from the results of the third step. These results are read
    while the fourth step is computed.
    """
    backend = DistributedBackend("cpu")
    torch.manual_seed(0)
    rows = shares_at(backend, 1)

    def batch_at(step: int, micro: int) -> Rows:
        if step == 2 and backend.rank == backend.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows(step, micro)

    objective = Identify(backend.wrap(Net().double()))
    summary = toy_trainer(folder, 9, objective=objective, backend=backend, batch_at=batch_at).fit()
    assert (summary.step, summary.status, summary.exit_code) == (4, "interrupted", 143)
    backend.close()
