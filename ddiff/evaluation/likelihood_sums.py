"""Sums of a likelihood evaluation, by document, and means of the terms of the bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddiff.core.elbo import Likelihood
from ddiff.core.information import TIME_BINS

Rows = NDArray[np.int64]
"""Array [B] of row indices."""

TERM = "term"
PART = "part"
TIME_BIN = "time bin"
Key = tuple[str, str | int]
"""Kind of a sum (`TERM`, `PART` or `TIME_BIN`), and its name, or the number of the bin."""


@dataclass(frozen=True)
class BatchSums:
    """Nats of one batch, on the host.

    Attributes:
        nats: [B] nats of each row.
        tokens: [B] number of scored tokens of each row.
        sums: nats of the batch, by term, part of the diffusion term and bin of time.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    sums: Mapping[Key, float]

    @classmethod
    def of(cls, likelihood: Likelihood, scored: Tensor) -> BatchSums:
        """Add up the values of B rows, of which the tokens at `scored` [B,L] count."""
        total = reduce(add, likelihood.terms.values())
        named: dict[Key, Tensor] = {}
        for name, value in likelihood.terms.items():
            named[TERM, name] = value.sum().double()
        for name, value in likelihood.parts.items():
            named[PART, name] = value.sum().double()
        if likelihood.time_bins is not None:
            diffusion = likelihood.terms["diffusion"]
            for number in range(TIME_BINS):
                # A sum for each bin: sums by scattered addition on a GPU depend on its timing.
                inside = torch.where(likelihood.time_bins == number, diffusion, 0.0)
                named[TIME_BIN, number] = inside.sum().double()
        # one copy to the host for all sums, since each copy waits for the device
        sums = torch.stack(list(named.values())).tolist()
        return cls(
            total.sum(-1).cpu().numpy(),
            scored.sum(-1).cpu().numpy(),
            dict(zip(named, sums, strict=True)),
        )


class DocumentSums:
    """Sums of a running evaluation of D documents.

    Attributes:
        means: mean nats per token of each term and part of the bound.
    """

    def __init__(self, num_documents: int) -> None:
        self.means = TermMeans()
        self._num_documents = num_documents
        self._nats: list[NDArray[np.float64]] = []  # [D] each
        self._tokens = np.zeros(num_documents, np.int64)  # sums over all draws

    @property
    def draws(self) -> int:
        """Number of draws."""
        return len(self._nats)

    @property
    def nats(self) -> NDArray[np.float64]:
        """Array [D,draws] with the nats of each of D documents in each draw."""
        return np.stack(self._nats, axis=-1)

    @property
    def tokens(self) -> NDArray[np.float64]:
        """Array [D] with the number of scored tokens of each document, averaged over draws."""
        return self._tokens / self.draws

    def add_batch(self, documents: Rows, draw: int, batch: BatchSums) -> None:
        """Add the nats and the numbers of tokens of B rows to the sums of their documents.

        Args:
            documents: [B] index of the document of each row.
            draw: index of the draw.
            batch: sums of the rows.
        """
        if draw == self.draws:
            self._nats.append(np.zeros(self._num_documents))
        # np.add.at, since several rows of a batch may belong to one document
        np.add.at(self._nats[draw], documents, batch.nats)
        np.add.at(self._tokens, documents, batch.tokens)
        self.means.add(batch)


class TermMeans:
    """Mean nats per token of each term of the bound, each part and each bin of time.

    The means are accumulated in float64. Every rank adds the sums of all batches in the order of
    the batches. The metrics do not synchronize themselves: torchmetrics would add one sum per rank,
    so that the last digits would depend on the number of ranks.
    """

    def __init__(self) -> None:
        self._metrics: dict[Key, Any] = {}

    def add(self, batch: BatchSums) -> None:
        """Add the sums of a batch to the means."""
        # imported here, since the import is slow and only evaluation needs torchmetrics
        from torchmetrics.aggregation import MeanMetric

        tokens = float(batch.tokens.sum())
        if tokens == 0:
            return  # a batch without scored tokens has no mean, and adds nothing
        for key, value in batch.sums.items():
            if key not in self._metrics:
                metric = MeanMetric(sync_on_compute=False)
                self._metrics[key] = metric.set_dtype(torch.float64)
            mean = torch.tensor(value, dtype=torch.float64) / tokens
            self._metrics[key].update(mean, tokens)

    def compute(self, kind: str) -> dict[Any, float]:
        """Return mean nats per token by name, for all sums of a kind."""
        found = {}
        for (own, name), metric in self._metrics.items():
            if own == kind:
                found[name] = float(metric.compute())
        return found
