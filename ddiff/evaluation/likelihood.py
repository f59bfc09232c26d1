"""The likelihood bound of a text, with all its terms, its parts and intervals.

Every token is scored once in each draw. Times are drawn in information time, so that no time is charged more than another
and the estimate is not skewed (`ddiff.core.information`). What lies outside the window, [1e-3, 1 - 1e-3] by default, is
charged by the decoding and closing terms, so the sum is a bound for any window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from ddiff.core.elbo import Likelihood
from ddiff.core.rng import CounterRng
from ddiff.core.times import TimeRule
from ddiff.errors import ArgumentError, NonFiniteError
from ddiff.evaluation.ratio import Error, RatioEstimate
from ddiff.progress import show_progress

LARGEST_MEAN = 700.0  # nats per token whose exponential is still a float64


class Scored(Protocol):
    """Part of an objective that evaluation uses.

    `bound` names the figure: "NLL" if `nll` is exact, every draw the same, or "NELBO" if it is at
    least the negative log-likelihood in expectation. `times` is the rule by which training draws
    times, None if the objective draws none.
    """

    bound: str
    times: TimeRule | None

    def nll(
        self, batch: Any, rng: CounterRng, slot: Tensor, slots: Tensor, times: TimeRule
    ) -> Likelihood:
        """One unbiased draw of nats per position."""


@dataclass(frozen=True)
class Evaluation:
    """A bound in nats per token (per symbol, where that is the `unit`) with what it is made of.

    `bound` is "NELBO", or "NLL" if the figure is the exact negative log-likelihood. `terms` add up to the mean, `parts` to
    the diffusion term.

    `interval` is the 95 % interval of the bound of texts like these documents (None for one document). It holds two errors:
    that of the random times and noise, and the differences between documents. `monte_carlo_interval` is that of the bound
    of these very documents, from the first error alone (None for one draw, which cannot tell the two apart).
    `standard_errors` has their sizes: "total", "monte_carlo", "documents". All intervals are Student's.
    """

    nelbo_nats_per_token: float
    interval: tuple[float, float] | None
    monte_carlo_interval: tuple[float, float] | None
    standard_errors_nats_per_token: Mapping[str, float | None]
    ppl: float
    bits_per_byte: float | None
    terms_nats_per_token: Mapping[str, float]
    parts_nats_per_token: Mapping[str, float]
    tokens: int
    documents: int
    unit: str
    protocol: Mapping[str, Any]
    bound: str = "NELBO"

    def __repr__(self) -> str:
        half = f" ± {(self.interval[1] - self.interval[0]) / 2:.4f}" if self.interval else ""
        return (
            f"Evaluation({self.bound} {self.nelbo_nats_per_token:.4f}{half} nats per {self.unit}, PPL {self.ppl:.2f}; "
            f"{self.tokens:,} {self.unit}s in {self.documents:,} documents)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field, named by what was measured and its unit: `nll_nats_per_symbol`."""
        return {self._name(field): value for field, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` wrote, as JSON gives it back; KeyError when something is missing."""
        named = cls(0.0, None, None, {}, 1.0, None, {}, {}, 0, 0, tree["unit"], {}, tree["bound"])
        values = {field.name: tree[named._name(field.name)] for field in fields(cls)}
        for name in ("interval", "monte_carlo_interval"):
            values[name] = tuple(values[name]) if values[name] else None
        return cls(**values)

    def _name(self, field: str) -> str:
        if field == "tokens":
            return f"{self.unit}s"
        return field.replace("nelbo", self.bound.lower()).replace("per_token", f"per_{self.unit}")


def evaluate(
    objective: Scored,
    batch_of: Callable[[NDArray[np.int64]], Any],
    document: NDArray[np.int64],
    *,
    length: int,
    times: TimeRule,
    num_bytes: int | None = None,
    draws: int = 1,
    batch: int = 64,
    seed: int = 0,
    unit: str = "token",
    device: torch.device | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Score every row `draws` times. `document` [R] numbers each row's document; `batch_of(rows)` gives their batch.

    In each draw the rows of a document share its strata of time, dealt out from a random first row, so that each row's time
    is uniform and a document's times are even. Draws and documents are independent of each other. Raises ArgumentError
    without rows, NonFiniteError when the bound is not a number.
    """
    if len(document) == 0 or draws < 1:
        raise ArgumentError(
            f"evaluate: need at least one row and one draw; got {len(document)} rows, {draws} draws."
        )
    names, index = np.unique(document, return_inverse=True)
    nats = np.zeros((len(names), draws))
    tokens = np.zeros(len(names))
    means = _Means()
    with show_progress(len(document) * draws, "evaluating", console=console) as bar:
        for rows, slot, slots, draw in _readings(index, draws, batch, seed):
            shown = batch_of(rows)
            group = torch.from_numpy(index[rows]).to(shown.index.device)
            rng = CounterRng(seed, draw, shown.index, length, "evaluate", group)
            likelihood = objective.nll(shown, rng, slot.to(device), slots.to(device), times)
            total = sum(likelihood.terms.values()).sum(-1).cpu().numpy()  # type: ignore[union-attr]
            counted = shown.scored.sum(-1).cpu().numpy()
            np.add.at(nats[:, draw], index[rows], total)
            np.add.at(tokens, index[rows], counted / draws)
            means.add(likelihood, float(counted.sum()))
            bar.advance(len(rows))
    estimate = RatioEstimate.of(nats, tokens)
    mean = estimate.mean
    if not mean < LARGEST_MEAN:
        raise NonFiniteError(
            f"evaluate: the bound is {mean} nats per {unit}, no perplexity: some token has (nearly) no probability "
            "under the network. Its weights have exploded; go back to an earlier checkpoint or train more slowly."
        )
    once = float(tokens.sum())
    return Evaluation(
        nelbo_nats_per_token=mean,
        interval=_interval(mean, estimate.total),
        monte_carlo_interval=_interval(mean, estimate.monte_carlo),
        standard_errors_nats_per_token={
            "total": _standard(estimate.total),
            "monte_carlo": _standard(estimate.monte_carlo),
            "documents": estimate.documents,
        },
        ppl=math.exp(mean),
        bits_per_byte=None if not num_bytes else mean * once / math.log(2) / num_bytes,
        terms_nats_per_token=means.compute("term"),
        parts_nats_per_token=means.compute("part"),
        tokens=round(once),
        documents=int((tokens > 0).sum()),
        unit=unit,
        bound=objective.bound,
        protocol={
            "draws": draws,
            "seed": seed,
            "length": length,
            "interval": "95 %, Student, over documents",
        },
    )


def _readings(
    index: NDArray[np.int64], draws: int, batch: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor, int]]:
    """(rows, slot, slots, draw) per batch: the slot of a row among its document's strata."""
    counts = np.bincount(index)
    order = np.argsort(index, kind="stable")
    place = np.empty(len(index), np.int64)
    place[order] = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    documents = torch.arange(len(counts))
    slots = counts[index]
    for draw in range(draws):
        turn = CounterRng(seed, draw, documents, 1, "evaluate").uniform("rotation")[:, 0].numpy()
        slot = (place + np.floor(turn[index] * slots).astype(np.int64)) % slots
        for start in range(0, len(index), batch):
            rows = np.arange(start, min(start + batch, len(index)))
            yield rows, torch.from_numpy(slot[rows]), torch.from_numpy(slots[rows]), draw


def _interval(mean: float, error: Error | None) -> tuple[float, float] | None:
    if error is None:
        return None
    return mean - error.half_width, mean + error.half_width


def _standard(error: Error | None) -> float | None:
    return None if error is None else error.standard


class _Means:
    """Nats per token of each term and part, accumulated in float64."""

    def __init__(self) -> None:
        self._metrics: dict[tuple[str, str], Any] = {}

    def add(self, likelihood: Likelihood, tokens: float) -> None:
        from torchmetrics.aggregation import (
            MeanMetric,
        )  # imports slowly, and only evaluation needs it

        for kind, values in (("term", likelihood.terms), ("part", likelihood.parts)):
            for name, value in values.items():
                metric = self._metrics.setdefault(
                    (kind, name), MeanMetric().set_dtype(torch.float64)
                )
                metric.update(value.sum().cpu().double() / tokens, tokens)

    def compute(self, kind: str) -> dict[str, float]:
        return {
            name: float(metric.compute())
            for (own, name), metric in self._metrics.items()
            if own == kind
        }
