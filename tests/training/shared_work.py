"""Work that tests divide among ranks: scores of toy objectives, with a record of the items done."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddiff.core.elbo import Likelihood
from ddiff.core.information import TIME_BINS
from ddiff.core.paths import Leg, LegPath
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, TimeRule
from ddiff.data.batch import Batch
from ddiff.distributed.ranks import Ranks, connect_ranks
from ddiff.errors import ArgumentError
from ddiff.evaluation.fields import evaluate_fields
from ddiff.evaluation.judge_model import Window, plan_windows, score_windows
from ddiff.evaluation.likelihood import evaluate
from ddiff.runs.sampling import draw_batches

ITEMS = 7
LENGTH = 5
BATCHES = (1, 2, 3, 4, 7)
"""Batch sizes: with 4, two batches are fewer than three ranks, and with 7 there is one batch."""


class RandomScores:
    """Objective whose scores are uniforms of the random generator; records the scored rows."""

    bound = "NELBO"
    times = None

    def __init__(self) -> None:
        self.asked: list[int] = []

    def nll(
        self, batch: Batch, rng: CounterRng, slot: Tensor, slots: Tensor, times: TimeRule
    ) -> Likelihood:
        self.asked += batch.index.tolist()
        first = rng.uniform("first") + slot[:, None] / slots[:, None]
        second = rng.uniform("second") / 3
        bins = (rng.uniform("bins") * TIME_BINS).long()
        return Likelihood({"closing": second, "diffusion": first}, {"half": first / 2}, bins)


def evaluate_rows(ranks: Ranks, batch: int) -> dict[str, Any]:
    """Evaluate seven rows of three documents, with draws until the interval is narrow."""
    objective = RandomScores()

    def batch_of(numbers: NDArray[np.int64]) -> Batch:
        index = torch.from_numpy(numbers)
        ids = torch.zeros(len(numbers), LENGTH, dtype=torch.long)
        valid = torch.arange(LENGTH) < 1 + index[:, None] % LENGTH
        return Batch(ids, valid, valid, index[:, None].expand(-1, LENGTH), index)

    found = evaluate(
        objective,
        batch_of,
        np.array([0, 0, 0, 1, 1, 2, 2]),
        length=LENGTH,
        times=FlatTimes(),
        until=0.04,
        batch=batch,
        ranks=ranks,
    )
    return {"asked": objective.asked, "found": found.to_dict()}


class RandomFields:
    """Objective of one field of tokens whose scores are uniforms; records the scored samples."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def counts(self, batch: Any) -> dict[str, Tensor]:
        return {}

    def nll(
        self, batch: Any, rng: CounterRng, slot: Tensor, slots: int | Tensor, path: Any
    ) -> Mapping[str, Likelihood]:
        self.asked += batch.index.tolist()
        scores = rng.uniform("text", LENGTH).reshape(len(batch.index), LENGTH)
        return {"text": Likelihood({"diffusion": scores}, {})}


def evaluate_samples(ranks: Ranks, batch: int) -> dict[str, Any]:
    """Evaluate seven samples with a field of tokens, in two draws."""
    objective = RandomFields()

    def batch_of(numbers: NDArray[np.int64]) -> Any:
        size = (len(numbers), LENGTH)
        field = SimpleNamespace(
            values=torch.zeros(size, dtype=torch.long),
            counted=torch.ones(size, dtype=torch.bool),
            absent=torch.zeros(size[0], dtype=torch.bool),
        )
        return SimpleNamespace(fields={"text": field}, index=torch.from_numpy(numbers))

    path = LegPath({"text": Leg(0.0, 1.0)})
    found = evaluate_fields(objective, batch_of, ITEMS, path, draws=2, batch=batch, ranks=ranks)
    return {"asked": objective.asked, "found": (found, found.scores.tolist())}


def draw_samples(ranks: Ranks, batch: int) -> dict[str, Any]:
    """Draw seven samples, each of which is a random number."""
    asked: list[int] = []
    objective = SimpleNamespace(module=nn.Identity())
    plan: Any = SimpleNamespace(
        model=SimpleNamespace(objective=objective), sampler=SimpleNamespace(steps=1)
    )

    def draw(numbers: slice, report: Any) -> list[dict[str, Any]]:
        index = torch.arange(numbers.start, numbers.stop)
        asked.extend(index.tolist())
        values = CounterRng(0, 0, index, 1, "sample").uniform("value")[:, 0].tolist()
        return [{"index": int(i), "value": value} for i, value in zip(index, values)]

    found = draw_batches(plan, draw, ITEMS, batch, "sampling", None, ranks)
    return {"asked": asked, "found": found}


def score_samples(ranks: Ranks, batch: int) -> dict[str, Any]:
    """Score the windows of three samples of different lengths, seven windows in all."""
    sizes = (9, 0, 22)
    windows: list[Window] = []
    for row, size in enumerate(sizes):
        windows += plan_windows(row, size, 0, 6, 4)
    assert len(windows) == ITEMS
    asked: list[int] = []

    def score(part: Sequence[Window]) -> NDArray[np.float64]:
        asked.extend(windows.index(window) for window in part)
        return np.array([np.sqrt(1.0 + window.start + window.row) for window in part])

    found = score_windows(windows, len(sizes), batch, score, ranks)
    return {"asked": asked, "found": (found.nats.tolist(), found.tokens.tolist())}


WORK = {
    "likelihood": evaluate_rows,
    "fields": evaluate_samples,
    "samples": draw_samples,
    "windows": score_samples,
}


def do_all(folder: str) -> None:
    """Do all work with all batch sizes on this rank, and write what was done to a file."""
    with connect_ranks() as ranks:
        done = {}
        for name, work in WORK.items():
            for batch in BATCHES:
                done[name, batch] = work(ranks, batch)
        place = Path(folder, f"{ranks.world_size}-{ranks.rank}")
    place.write_bytes(pickle.dumps(done))


class UnusualError(Exception):
    """Error that pickle cannot copy, since its constructor takes two arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def fail_on_one_rank(folder: str) -> None:
    """Fail on the rank of item 4, and on rank 0; write the messages that this rank gets."""
    messages = []
    with connect_ranks() as ranks:

        def fail(item: int) -> int:
            if item == 4:
                raise ArgumentError("item 4 is broken")
            return item

        def fail_unusually() -> None:
            raise UnusualError("two", "parts")

        for work in (lambda: ranks.map(fail, range(ITEMS)), lambda: ranks.on_first(fail_unusually)):
            try:
                work()
            except Exception as error:
                messages.append(f"{type(error).__name__}: {error}")
        # the ranks can work together after an error
        assert ranks.map(lambda item: item, range(ITEMS)) == list(range(ITEMS))
        assert ranks.gather([ranks.rank] * len(ranks.share(ITEMS))) == [
            item % ranks.world_size for item in range(ITEMS)
        ]
        try:
            ranks.gather([0] * ranks.rank)
        except RuntimeError as error:
            messages.append(str(error))
        place = Path(folder, str(ranks.rank))
    place.write_text("\n".join(messages))
