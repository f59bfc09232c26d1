"""The likelihood bound of a text, with all its terms, its parts and an interval over documents.

Every token is scored once. The default window [1e-3, 1 - 1e-3] keeps the weights' variance down (they grow as 1/t at the
clean end); what lies outside is not dropped but charged by the decoding and closing terms, so the sum is a bound for any
window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddiff.core.elbo import Likelihood
from ddiff.core.noise import Noise
from ddiff.core.times import TimeRule
from ddiff.errors import ArgumentError, NonFiniteError
from ddiff.evaluation.intervals import student95
from ddiff.progress import progress

LARGEST_MEAN = 700.0  # nats per token whose exponential is still a float64


class Scored(Protocol):
    """What evaluation asks of an objective.

    An objective whose `nll` is exact, every draw the same, says `bound = "NLL"`; otherwise it is a "NELBO", at least the
    negative log-likelihood in expectation.
    """

    def nll(self, batch: Any, noise: Noise, slot: Tensor, slots: Tensor, times: TimeRule) -> Likelihood:
        """One unbiased draw of nats per position."""


@dataclass(frozen=True)
class Evaluation:
    """A bound in nats per token (per symbol, where that is the `unit`) with what it is made of.

    `bound` is "NELBO", or "NLL" where the figure is the exact negative log-likelihood. `interval` is the 95 % interval over
    documents (None with one document): Student's interval of the ratio estimate with residuals nats_d - mean * tokens_d,
    each document having times of its own. `terms` add up to the mean, `parts` to the diffusion term.
    """

    nelbo_nats_per_token: float
    interval: tuple[float, float] | None
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
        named = cls(0.0, None, 1.0, None, {}, {}, 0, 0, tree["unit"], {}, tree["bound"])
        values = {field.name: tree[named._name(field.name)] for field in fields(cls)}
        return cls(**values | {"interval": tuple(values["interval"]) if values["interval"] else None})

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
) -> Evaluation:
    """Score every row `draws` times. `document` [R] numbers each row's document; `batch_of(rows)` gives their batch.

    The rows of a document share its strata of time, dealt out from a random first row, so that each row's time is uniform
    and a document's times are even. Raises ArgumentError without rows, NonFiniteError when the bound is not a number.
    """
    if len(document) == 0 or draws < 1:
        raise ArgumentError(f"evaluate: need at least one row and one draw; got {len(document)} rows, {draws} draws.")
    names, index = np.unique(document, return_inverse=True)
    nats, tokens = np.zeros(len(names)), np.zeros(len(names))
    means = _Means()
    with progress(len(document) * draws, "evaluating") as bar:
        for rows, slot, slots, draw in _readings(index, draws, batch, seed):
            shown = batch_of(rows)
            noise = Noise(seed, draw, shown.index, length, "evaluate")
            likelihood = objective.nll(shown, noise, slot.to(device), slots.to(device), times)
            total = sum(likelihood.terms.values()).sum(-1).cpu().numpy()  # type: ignore[union-attr]
            counted = shown.scored.sum(-1).cpu().numpy()
            np.add.at(nats, index[rows], total)
            np.add.at(tokens, index[rows], counted)
            means.add(likelihood, float(counted.sum()))
            bar.advance(len(rows))
    mean, half = _ratio(nats, tokens)
    if not mean < LARGEST_MEAN:
        raise NonFiniteError(
            f"evaluate: the bound is {mean} nats per {unit}, no perplexity: some token has (nearly) no probability "
            "under the network. Its weights have exploded; go back to an earlier checkpoint or train more slowly."
        )
    once = float(tokens.sum()) / draws
    return Evaluation(
        nelbo_nats_per_token=mean,
        interval=None if half is None else (mean - half, mean + half),
        ppl=math.exp(mean),
        bits_per_byte=None if not num_bytes else mean * once / math.log(2) / num_bytes,
        terms_nats_per_token=means.compute("term"),
        parts_nats_per_token=means.compute("part"),
        tokens=int(once),
        documents=len(names),
        unit=unit,
        bound=getattr(objective, "bound", "NELBO"),
        protocol={"draws": draws, "seed": seed, "length": length, "interval": "95 %, Student, over documents"},
    )


def _readings(
    index: NDArray[np.int64], draws: int, batch: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor, int]]:
    """(rows, slot, slots, draw) per batch: the slot of a row among its document's strata."""
    counts = np.bincount(index)
    order = np.argsort(index, kind="stable")
    place = np.empty(len(index), np.int64)
    place[order] = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = torch.arange(len(counts))
    turn = Noise(seed, 0, first, 1, "evaluate").uniform("rotation")[:, 0].numpy()
    slots = counts[index] * draws
    for draw in range(draws):
        slot = (place * draws + draw + np.floor(turn[index] * slots).astype(np.int64)) % slots
        for start in range(0, len(index), batch):
            rows = np.arange(start, min(start + batch, len(index)))
            yield rows, torch.from_numpy(slot[rows]), torch.from_numpy(slots[rows]), draw


def _ratio(nats: NDArray[np.float64], tokens: NDArray[np.float64]) -> tuple[float, float | None]:
    """Sum over sum, and the half width of its 95 % interval over documents."""
    mean = float(nats.sum() / tokens.sum())
    count = len(nats)
    if count < 2:
        return mean, None
    residual = nats - mean * tokens
    variance = count / (count - 1) * float((residual**2).sum())
    return mean, student95(count - 1) * math.sqrt(variance) / float(tokens.sum())


class _Means:
    """Nats per token of each term and part, accumulated in float64."""

    def __init__(self) -> None:
        self._metrics: dict[tuple[str, str], Any] = {}

    def add(self, likelihood: Likelihood, tokens: float) -> None:
        from torchmetrics.aggregation import MeanMetric  # imports slowly, and only evaluation needs it

        for kind, values in (("term", likelihood.terms), ("part", likelihood.parts)):
            for name, value in values.items():
                metric = self._metrics.setdefault((kind, name), MeanMetric().set_dtype(torch.float64))
                metric.update(value.sum().cpu().double() / tokens, tokens)

    def compute(self, kind: str) -> dict[str, float]:
        return {name: float(metric.compute()) for (own, name), metric in self._metrics.items() if own == kind}
