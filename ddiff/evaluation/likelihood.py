"""Likelihood bound of a text, with the terms of the bound and confidence intervals.

In each draw, every token is scored at one random diffusion time. The times are drawn in information
time (`ddiff.core.information`): all times then contribute about equally to the bound, so that the
estimator has no heavy tails.

The diffusion term of the bound is an integral over a window of times, [1e-3, 1 - 1e-3] by default.
The decoding term (-ln P of the tokens at the start of the window) accounts for the times before the
window. The prior term (KL to the prior, at the end of the window) accounts for the times after it.
The sum of all terms is therefore a bound for any window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from operator import add
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
from ddiff.progress import Progress, show_progress

Rows = NDArray[np.int64]
"""Array [B] of row indices."""

LARGEST_MEAN = 700.0  # exp(700) is still a finite float64
FEWEST_DRAWS = 4  # before evaluation may stop: the width of an interval of fewer is too uncertain
MOST_DRAWS = 256
"""Largest number of draws if evaluation continues until the interval is narrow."""


class Scored(Protocol):
    """Interface that `evaluate` requires of an objective.

    Attributes:
        bound: "NLL" if `nll` returns the exact negative log-likelihood without randomness, or
            "NELBO" if the expectation of `nll` is an upper bound of the negative log-likelihood.
        times: distribution of the diffusion times in training; None for an objective without times.
    """

    bound: str = "NELBO"
    times: TimeRule | None = None

    def nll(
        self,
        batch: Any,
        rng: CounterRng,
        slot: Tensor,
        slots: Tensor,
        times: TimeRule,
    ) -> Likelihood:
        """Draw an unbiased estimate of the bound (or the exact likelihood) at every position.

        The estimate is in nats.

        Args:
            batch: batch of B rows.
            rng: random generator of the noise and the times.
            slot: [B] time stratum of each row, from 0.
            slots: [B] number of time strata of each row.
            times: rule that draws the diffusion time of a row in its stratum.
        """


@dataclass(frozen=True)
class Evaluation:
    """Likelihood bound in nats per token, with its terms and confidence intervals.

    If the text is a sequence of symbols without bytes, `unit` is "symbol", and all numbers per
    token are numbers per symbol. All intervals use Student's t distribution.

    Attributes:
        interval: 95 % confidence interval of the bound for documents from the same source; None for
            one document. The interval includes the differences between documents and the
            Monte-Carlo error of random times and noise.
        monte_carlo_interval: 95 % confidence interval of the bound for exactly these documents,
            which includes only the Monte-Carlo error; None for one draw.
        standard_errors_nats_per_token: "total" and "monte_carlo", the standard errors of both
            intervals, and "documents", the part of "total" due to the differences between
            documents.
        ppl: perplexity; None if the bound is not a likelihood of the text (`mark_own_vectors`).
        terms_nats_per_token: name of each term of the bound -> value. Their sum is the bound.
        parts_nats_per_token: name of each part of the diffusion term, for example a level -> value.
        tokens: number of scored tokens.
        documents: number of documents with scored tokens.
        protocol: settings of the evaluation.
        bound: "NELBO", "NLL" for an exact negative log-likelihood, or "PUBLISHED" for the published
            protocol, which does not bound it (`ddiff.evaluation.protocols`).
    """

    nelbo_nats_per_token: float
    interval: tuple[float, float] | None
    monte_carlo_interval: tuple[float, float] | None
    standard_errors_nats_per_token: Mapping[str, float | None]
    ppl: float | None
    bits_per_byte: float | None
    terms_nats_per_token: Mapping[str, float]
    parts_nats_per_token: Mapping[str, float]
    tokens: int
    documents: int
    unit: str
    protocol: Mapping[str, Any]
    bound: str = "NELBO"

    def __repr__(self) -> str:
        half = ""
        if self.interval:
            low, high = self.interval
            half = f" ± {(high - low) / 2:.4f}"
        return (
            f"Evaluation({self.bound} {self.nelbo_nats_per_token:.4f}{half} nats per {self.unit}, "
            f"{self.describe_perplexity()}; {self.tokens:,} {self.unit}s in {self.documents:,} "
            "documents)"
        )

    def describe_perplexity(self) -> str:
        """Return the perplexity as text, or the reason why there is none."""
        if self.ppl is not None:
            return f"PPL {self.ppl:.2f}"
        own = ", ".join(self.protocol["own_vectors"])
        return f"given its own vector ({own}): no likelihood of the text"

    def mark_own_vectors(self, names: Sequence[str]) -> Evaluation:
        """Return the same bound without perplexity and bits per byte.

        `names` are the conditions that are vectors computed from the text itself. They contain the
        text, so that the bound is not a likelihood of the text.
        """
        protocol = {**self.protocol, "own_vectors": list(names)}
        return replace(self, ppl=None, bits_per_byte=None, protocol=protocol)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict.

        The keys contain the bound and the unit, as in `nll_nats_per_symbol`.
        """
        tree = {}
        for field, value in asdict(self).items():
            tree[_field_key(field, self.unit, self.bound)] = value
        return tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Evaluation:
        """Build an evaluation from the output of `to_dict`, also after a JSON round trip.

        Raises KeyError if a field is missing.
        """
        # bound and unit decide how the other fields are named
        unit = tree["unit"]
        bound = tree["bound"]
        values = {}
        for field in fields(cls):
            values[field.name] = tree[_field_key(field.name, unit, bound)]
        for name in ("interval", "monte_carlo_interval"):
            # JSON has no tuples
            values[name] = tuple(values[name]) if values[name] else None
        return cls(**values)


def _field_key(field: str, unit: str, bound: str) -> str:
    """Return the key of a field in the result of `Evaluation.to_dict`.

    For unit "symbol" and bound "NLL", the field nelbo_nats_per_token has the key
    nll_nats_per_symbol.
    """
    if field == "tokens":
        return f"{unit}s"
    named = field.replace("nelbo", bound.lower())
    return named.replace("per_token", f"per_{unit}")


def evaluate(
    objective: Scored,
    batch_of: Callable[[Rows], Any],
    document: NDArray[np.int64],
    *,
    length: int,
    times: TimeRule,
    num_bytes: int | None = None,
    draws: int = 1,
    until: float | None = None,
    batch: int = 64,
    seed: int = 0,
    unit: str = "token",
    device: torch.device | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Estimate the likelihood bound of a text and its standard errors.

    The text is split into R rows. The bound of each row is estimated `draws` times, with new
    diffusion times and noise. Times are stratified within a document: in each draw, the n rows of a
    document get n different strata. Consecutive rows get consecutive strata, beginning with a
    random stratum. A row is therefore in every stratum with the same probability, and the times of
    a document are evenly spread. Draws and documents are independent.

    Args:
        objective: object whose method `nll` computes the terms of the bound of a batch, in nats.
        batch_of: function that maps row indices [B] to the batch of these rows.
        document: array [R] with the index of the document of each row.
        length: number of positions per row.
        times: rule that draws the diffusion times.
        num_bytes: number of bytes of the text; None if bits per byte have no meaning.
        draws: number of independent draws of times and noise per row.
        until: half width of the Monte-Carlo interval, in nats per token. More than `draws` draws
            are made until the interval is that narrow, at least 4 and at most `MOST_DRAWS`. None:
            exactly `draws` draws. An exact likelihood needs one draw.
        batch: number of rows per batch.
        seed: seed of times and noise.
        unit: unit of the metrics, "token" or "symbol".
        device: device of the batches.
        console: console of the progress bar.

    Raises ArgumentError if there are no rows or no draws, and NonFiniteError if the bound is not
    finite.
    """
    _check_arguments(len(document), draws, until, unit)
    names, index = np.unique(document, return_inverse=True)
    scores = _Scores(len(names))

    def score_draw(draw: int, bar: Progress) -> None:
        for rows, slot, slots in _deal_strata(index, draw, batch, seed):
            rows_batch = batch_of(rows)
            group = torch.from_numpy(index[rows]).to(rows_batch.index.device)
            rng = CounterRng(seed, draw, rows_batch.index, length, "evaluate", group)
            likelihood = objective.nll(rows_batch, rng, slot.to(device), slots.to(device), times)
            scores.add_batch(index[rows], draw, likelihood, rows_batch.scored)
            bar.advance(len(rows))

    # the number of draws is not known in advance if they stop at a width
    total = len(document) * draws if until is None else None
    with show_progress(total, "evaluating", console=console) as bar:
        for draw in range(draws):
            score_draw(draw, bar)
        estimate = scores.estimate(unit)
        while not _is_narrow(estimate, scores.draws, until, objective.bound):
            score_draw(scores.draws, bar)
            estimate = scores.estimate(unit)
    protocol = _describe_settings(scores.draws, until, seed, length)
    return _make_evaluation(estimate, scores, num_bytes, unit, objective.bound, protocol)


def _describe_settings(draws: int, until: float | None, seed: int, length: int) -> dict[str, Any]:
    """Return the settings of an evaluation that are part of its protocol (see `evaluate`)."""
    settings: dict[str, Any] = {
        "draws": draws,
        "seed": seed,
        "length": length,
        "interval": "95 %, Student, over documents",
    }
    if until is not None:
        settings["until"] = until
    return settings


def _check_arguments(num_rows: int, draws: int, until: float | None, unit: str) -> None:
    """Raise ArgumentError for invalid arguments of `evaluate`."""
    if num_rows == 0 or draws < 1:
        raise ArgumentError(
            f"evaluate needs at least one row and one draw; got {num_rows} rows, {draws} draws."
        )
    if until is not None and not 0.0 < until < math.inf:
        raise ArgumentError(
            f"evaluate: until must be a positive half width in nats per {unit}, such as 0.002; got "
            f"{until}."
        )


def _is_narrow(estimate: RatioEstimate, draws: int, until: float | None, bound: str) -> bool:
    """Return whether no more draws are needed after `draws` draws (see `evaluate`)."""
    if until is None or bound == "NLL" or draws >= MOST_DRAWS:
        return True
    error = estimate.monte_carlo
    return draws >= FEWEST_DRAWS and error is not None and error.half_width <= until


def _check_finite(mean: float, unit: str) -> None:
    if not mean < LARGEST_MEAN:  # also for NaN
        raise NonFiniteError(
            f"evaluate: the bound is {mean} nats per {unit}, which is too large for a perplexity: "
            "the network assigns almost zero probability to a token. The weights have probably "
            "diverged. Go back to an earlier checkpoint, or train with a smaller learning rate."
        )


def _make_evaluation(
    estimate: RatioEstimate,
    scores: _Scores,
    num_bytes: int | None,
    unit: str,
    bound: str,
    protocol: Mapping[str, Any],
) -> Evaluation:
    mean = estimate.mean
    num_tokens = float(scores.tokens.sum())
    bits_per_byte = None
    if num_bytes:
        bits_per_byte = mean * num_tokens / math.log(2) / num_bytes
    return Evaluation(
        nelbo_nats_per_token=mean,
        interval=_interval(mean, estimate.total),
        monte_carlo_interval=_interval(mean, estimate.monte_carlo),
        standard_errors_nats_per_token={
            "total": _standard_error(estimate.total),
            "monte_carlo": _standard_error(estimate.monte_carlo),
            "documents": estimate.documents,
        },
        ppl=math.exp(mean),
        bits_per_byte=bits_per_byte,
        terms_nats_per_token=scores.means.compute("term"),
        parts_nats_per_token=scores.means.compute("part"),
        tokens=round(num_tokens),
        documents=int((scores.tokens > 0).sum()),
        unit=unit,
        bound=bound,
        protocol=protocol,
    )


def _deal_strata(
    index: NDArray[np.int64],
    draw: int,
    batch: int,
    seed: int,
) -> Iterator[tuple[Rows, Tensor, Tensor]]:
    """Assign a time stratum to each row, and yield the rows in batches.

    In each draw, the strata of a document are assigned to its rows in order, beginning with a
    random stratum. `index` [R] is the document of each of R rows, `draw` the number of the draw,
    and `batch` the largest number of rows in a batch. For a batch of B rows, the function yields

    - `rows` [B], the row indices,
    - `slot` [B], the stratum of each row, from 0,
    - `slots` [B], the number of strata, which is the number of rows in the row's document.
    """
    counts = np.bincount(index)
    order = np.argsort(index, kind="stable")
    first = np.cumsum(counts) - counts  # first row of each document, in the order of documents
    place = np.empty(len(index), np.int64)  # index of a row within its document
    place[order] = np.arange(len(index)) - np.repeat(first, counts)
    documents = torch.arange(len(counts))
    slots = counts[index]
    uniforms = CounterRng(seed, draw, documents, 1, "evaluate").uniform("rotation")
    turn = uniforms[:, 0].numpy()[index]
    rotation = np.floor(turn * slots).astype(np.int64)
    slot = torch.from_numpy((place + rotation) % slots)
    for start in range(0, len(index), batch):
        stop = min(start + batch, len(index))
        rows = np.arange(start, stop)
        yield rows, slot[rows], torch.from_numpy(slots[rows])


def _interval(mean: float, error: Error | None) -> tuple[float, float] | None:
    if error is None:
        return None
    half = error.half_width
    return mean - half, mean + half


def _standard_error(error: Error | None) -> float | None:
    return None if error is None else error.standard


class _Scores:
    """Sums of a running evaluation.

    Attributes:
        means: mean nats per token of each term and part of the bound.
    """

    def __init__(self, num_documents: int) -> None:
        self.means = _Means()
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

    def estimate(self, unit: str) -> RatioEstimate:
        """Return the estimate from all draws. Raises NonFiniteError if it is not finite.

        `unit`: unit of the metrics, for the message.
        """
        estimate = RatioEstimate.of(self.nats, self.tokens)
        _check_finite(estimate.mean, unit)
        return estimate

    def add_batch(self, documents: Rows, draw: int, likelihood: Likelihood, scored: Tensor) -> None:
        """Add the nats and the numbers of tokens of B rows to the sums of their documents.

        Args:
            documents: [B] index of the document of each row.
            draw: index of the draw.
            likelihood: terms of the bound at each position.
            scored: bool [B,L], True at scored tokens.
        """
        total = reduce(add, likelihood.terms.values())
        row_nats = total.sum(-1).cpu().numpy()
        row_tokens = scored.sum(-1).cpu().numpy()
        if draw == self.draws:
            self._nats.append(np.zeros(self._num_documents))
        # np.add.at, since several rows of a batch may belong to one document
        np.add.at(self._nats[draw], documents, row_nats)
        np.add.at(self._tokens, documents, row_tokens)
        self.means.add(likelihood, float(row_tokens.sum()))


class _Means:
    """Mean nats per token of each term of the bound and each part of its diffusion term.

    The means are accumulated in float64.
    """

    def __init__(self) -> None:
        self._metrics: dict[tuple[str, str], Any] = {}

    def add(self, likelihood: Likelihood, tokens: float) -> None:
        """Add the values of a batch with `tokens` scored tokens to the means."""
        # imported here, since the import is slow and only evaluation needs torchmetrics
        from torchmetrics.aggregation import MeanMetric

        figures = {("term", name): value for name, value in likelihood.terms.items()}
        for name, value in likelihood.parts.items():
            figures["part", name] = value
        for key, value in figures.items():
            if key not in self._metrics:
                self._metrics[key] = MeanMetric().set_dtype(torch.float64)
            mean = value.sum().cpu().double() / tokens
            self._metrics[key].update(mean, tokens)

    def compute(self, kind: str) -> dict[str, float]:
        """Return mean nats per token by name, for all terms or all parts.

        `kind` is "term" or "part".
        """
        found = {}
        for (own, name), metric in self._metrics.items():
            if own == kind:
                found[name] = float(metric.compute())
        return found
