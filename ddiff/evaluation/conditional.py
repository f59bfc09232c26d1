"""Bound of the likelihood of tokens given the tokens before them, with its Monte-Carlo error.

A row holds a context c and a continuation y, and ends after y. Noise acts on the tokens of y only:
the tokens of c stay clean. The terms of the bound (`ddiff.core.elbo`) at the positions of y add up
to an estimate v whose expectation is an upper bound of -ln p(y | c).

The K draws of a row are stratified in time: two independent draws fall into each of K/2 strata.
Then

    mean = (1/K) sum_k v_k,    error^2 = (1/K^2) sum_j (v_2j - v_2j+1)^2,    j = 0 .. K/2 - 1,

where v_2j and v_2j+1 are the two draws of stratum j. Both are unbiased, because the difference of
two independent draws of one stratum has twice the variance of that stratum.

Continuations with the same key use the same random numbers. Differences between them, for example
between the answers of a question, then vary less than the continuations themselves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddiff.core.rng import CounterRng
from ddiff.core.times import TimeRule
from ddiff.data.batch import Batch
from ddiff.errors import ArgumentError
from ddiff.evaluation.likelihood import Scored
from ddiff.evaluation.ratio import Error
from ddiff.progress import Progress

Floats = NDArray[np.float64]

SHORTEST_ROW = 16
"""Rows are padded to a power of two of at least this length, so that few shapes occur."""


@dataclass(frozen=True)
class Continuation:
    """Tokens to score, and the tokens before them.

    Attributes:
        context: token ids before the scored tokens; may be empty.
        tokens: token ids to score, at least one.
        key: continuations with equal keys use the same noise times and the same uniforms at each
            position of the row.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    key: str

    @property
    def length(self) -> int:
        """Number of tokens of the row."""
        return len(self.context) + len(self.tokens)


@dataclass(frozen=True)
class Shape:
    """Shape of the rows of a question, equal for all continuations with its key.

    Attributes:
        positions: number of positions of the padded row.
        tokens: number of tokens for which the times have the least variance.
    """

    positions: int
    tokens: int


@dataclass(frozen=True)
class RowBatch:
    """Rows that are scored in one call of the objective.

    Attributes:
        numbers: [B] numbers of the continuations.
        draws: [B] numbers of the draws.
        shape: shape of all rows.
    """

    numbers: NDArray[np.int64]
    draws: NDArray[np.int64]
    shape: Shape


class ConditionalScorer:
    """Scores continuations given their contexts under an objective.

    Args:
        objective: its method `nll` computes the terms of the bound, or the exact likelihood.
        times_for: returns the time rule whose draws have the least variance for a number of tokens.
        longest: largest number of tokens of a row.
        draws: number K of draws per continuation: 1, or an even number. An exact likelihood needs
            one draw, and uses one.
        seed: seed of times and noise.
        batch: largest number of rows in a batch. The scores do not depend on it.
        device: device of the batches.
        conditions: conditions of every row, by name: tensors [1] or [1,d].
    """

    def __init__(
        self,
        objective: Scored,
        times_for: Callable[[int], TimeRule],
        *,
        longest: int,
        draws: int,
        seed: int = 0,
        batch: int = 64,
        device: torch.device | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_draws(draws)
        self.objective = objective
        self.times_for = times_for
        self.longest = longest
        self.draws = 1 if objective.bound == "NLL" else draws
        self.seed = seed
        self.batch = batch
        self.device = device or torch.device("cpu")
        self.conditions = conditions or {}

    def score(self, continuations: Sequence[Continuation], bar: Progress) -> Floats:
        """Return the estimates of -ln p(tokens | context), in nats, [N,K] for N continuations."""
        nats = np.zeros((len(continuations), self.draws))
        for rows in self.plan(continuations):
            nats[rows.numbers, rows.draws] = self.score_rows(continuations, rows)
            bar.advance(len(rows.numbers))
        return nats

    def plan(self, continuations: Sequence[Continuation]) -> Iterator[RowBatch]:
        """Divide all draws of all continuations into batches of rows of one shape."""
        shapes = find_shapes(continuations, self.longest)
        by_shape: dict[Shape, list[int]] = {}
        for number, continuation in enumerate(continuations):
            by_shape.setdefault(shapes[continuation.key], []).append(number)
        for shape, numbers in by_shape.items():
            every_number = np.repeat(numbers, self.draws)
            every_draw = np.tile(np.arange(self.draws), len(numbers))
            for start in range(0, len(every_number), self.batch):
                part = slice(start, start + self.batch)
                yield RowBatch(every_number[part], every_draw[part], shape)

    @torch.no_grad()
    def score_rows(self, continuations: Sequence[Continuation], rows: RowBatch) -> Floats:
        """Return one estimate of -ln p(tokens | context) for each row of a batch, [B]."""
        chosen = [continuations[number] for number in rows.numbers]
        batch = self._make_batch(chosen, rows).to(self.device)
        rng = CounterRng(
            self.seed, 0, batch.index, rows.shape.positions, "conditional", batch.index
        )
        # two draws per stratum; a single draw has the only stratum
        slot = torch.from_numpy(rows.draws // 2).to(self.device)
        slots = torch.full_like(slot, max(1, self.draws // 2))
        found = self.objective.nll(batch, rng, slot, slots, self.times_for(rows.shape.tokens))
        total = torch.stack(list(found.terms.values())).sum(0)
        return total.sum(-1).double().cpu().numpy()

    def _make_batch(self, chosen: Sequence[Continuation], rows: RowBatch) -> Batch:
        size = (len(chosen), rows.shape.positions)
        ids = torch.zeros(size, dtype=torch.long)
        valid = torch.zeros(size, dtype=torch.bool)
        scored = torch.zeros(size, dtype=torch.bool)
        index = []
        for row, continuation in enumerate(chosen):
            tokens = (*continuation.context, *continuation.tokens)
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            valid[row, : len(tokens)] = True
            scored[row, len(continuation.context) : len(tokens)] = True
            index.append(_random_index(continuation.key, int(rows.draws[row])))
        conditions = {}
        for name, value in self.conditions.items():
            conditions[name] = value.expand(len(chosen), *value.shape[1:])
        return Batch(
            ids=ids,
            valid=valid,
            scored=scored,
            document=torch.zeros(size, dtype=torch.long),
            index=torch.tensor(index, dtype=torch.long),
            conditions=conditions,
        )


def check_draws(draws: int) -> None:
    """Raise ArgumentError unless the number of draws is 1 or an even number."""
    if draws < 1 or (draws > 1 and draws % 2 == 1):
        raise ArgumentError(
            "draws must be 1, or an even number, because two draws fall into each stratum of the "
            f"times; got {draws}."
        )


def find_shapes(continuations: Sequence[Continuation], longest: int) -> dict[str, Shape]:
    """Return the shape of the rows of each key.

    The shape depends only on the continuations with this key, so the scores of a question do not
    depend on other questions. `longest` is the largest number of positions of a row.
    """
    groups: dict[str, list[Continuation]] = {}
    for continuation in continuations:
        groups.setdefault(continuation.key, []).append(continuation)
    shapes = {}
    for key, members in groups.items():
        positions = max(continuation.length for continuation in members)
        padded = max(SHORTEST_ROW, 2 ** math.ceil(math.log2(positions)))
        tokens = sum(len(continuation.tokens) for continuation in members) / len(members)
        # a power of two, so that few time rules occur
        shapes[key] = Shape(min(padded, longest), 2 ** round(math.log2(tokens)))
    return shapes


def error_of_draws(nats: Floats) -> Floats:
    """Return the Monte-Carlo standard errors [N] of the means of K draws of N values.

    `nats` [N,K] holds the draws, of which each two neighbours are in one stratum. For one draw, the
    error is unknown, and NaN is returned.
    """
    count = nats.shape[1]
    if count == 1:
        return np.full(len(nats), np.nan)
    differences = nats[:, 0::2] - nats[:, 1::2]
    return np.sqrt((differences**2).sum(-1)) / count


def error_of_sum(nats: Floats) -> Error | None:
    """Return the standard error of the sum of N independent means of K draws each.

    `nats` [N,K] holds the draws. The degrees of freedom are those of Satterthwaite's formula,
    estimated from the differences d of the two draws of each stratum:

        freedom = 3 (sum d^2)^2 / sum d^4 - 2,

    at least 1 and at most the number N K/2 of strata. They are few if most of the variance lies in
    few strata. Returns None for one draw.
    """
    count = nats.shape[1]
    if count == 1 or not len(nats):
        return None
    squares = (nats[:, 0::2] - nats[:, 1::2]).ravel() ** 2
    total = float(squares.sum())
    if not math.isfinite(total):
        return None
    if total == 0.0:
        return Error(0.0, len(squares))
    freedom = 3.0 * total**2 / float((squares**2).sum()) - 2.0
    return Error(math.sqrt(total) / count, min(max(1.0, freedom), float(len(squares))))


def is_undecided(nats: Floats) -> bool:
    """Return whether the Monte-Carlo error leaves the most likely of several answers open.

    `nats` [A,K] are the draws of A answers with the same random numbers. The answer is open if, for
    any other answer, the 95 % interval of the difference to the best answer contains 0.
    """
    if nats.shape[1] == 1 or len(nats) < 2:
        return False
    best = int(nats.mean(-1).argmin())
    for other in np.delete(nats, best, axis=0):
        difference = other - nats[best]
        error = error_of_sum(difference[np.newaxis])
        if error is None or difference.mean() <= error.half_width:
            return True
    return False


def _random_index(key: str, draw: int) -> int:
    """Return the index in [0, 2^63) that selects the random numbers of a key and a draw.

    A hash, so that the numbers depend neither on the order nor on the number of the questions.
    """
    digest = hashlib.sha256(f"{key}\0{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
