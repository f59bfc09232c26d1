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
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from ddiff.core.elbo import Likelihood
from ddiff.core.rng import CounterRng
from ddiff.core.times import TimeRule
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, NonFiniteError
from ddiff.evaluation.likelihood_sums import PART, TERM, TIME_BIN, BatchSums, DocumentSums, Rows
from ddiff.evaluation.ratio import Error, RatioEstimate
from ddiff.progress import Progress, show_progress

LARGEST_MEAN = 700.0  # exp(700) is still a finite float64
FEWEST_DRAWS = 4  # before evaluation may stop: the width of an interval of fewer is too uncertain
LEAST_FREEDOM = 20.0
"""Degrees of freedom of the Monte-Carlo interval before evaluation may stop at its width.

One document has 20 after 21 draws, and 7 documents of equal length have 21 after 4 draws.
Few draws of few documents often have a width that is too small by chance. To stop there would
select such draws: the interval would cover less than 95 %, and the bound would be too low, because
nats are skewed.
"""
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
class TimeBin:
    """Part of the diffusion term of the bound that belongs to an interval of information time.

    Attributes:
        start, stop: ends of the interval.
        nats: nats per token of the term, from times in the interval.
        share: `nats` divided by the whole diffusion term; 0 if the term is 0.
    """

    start: float
    stop: float
    nats: float
    share: float


@dataclass(frozen=True)
class Evaluation:
    """Likelihood bound in nats per token, with its terms and confidence intervals.

    If the text is a sequence of symbols without bytes, `unit` is "symbol", and all numbers per
    token are numbers per symbol. All intervals use Student's t distribution. That over documents
    is corrected for skewness if all documents have the same length.

    Attributes:
        interval: 95 % confidence interval of the bound for documents from the same source; None for
            one document. The interval includes the differences between documents and the
            Monte-Carlo error of random times and noise.
        monte_carlo_interval: 95 % confidence interval of the bound for exactly these documents,
            which includes only the Monte-Carlo error; None for one draw.
        standard_errors_nats_per_token: "total" and "monte_carlo", the standard errors of both
            intervals, and "documents", the part of "total" due to the differences between
            documents.
        ppl: perplexity; None if the bound is not a likelihood of the text (`mark_own_vectors`,
            `mark_given`).
        terms_nats_per_token: name of each term of the bound -> value. Their sum is the bound.
        parts_nats_per_token: name of each part of the diffusion term, for example a level -> value.
        tokens: number of scored tokens.
        documents: number of documents with scored tokens.
        protocol: settings of the evaluation.
        bound: "NELBO", "NLL" for an exact negative log-likelihood, or "PUBLISHED" for the published
            protocol, which does not bound it (`ddiff.evaluation.protocols`).
        time_bins: parts of the diffusion term by information time, whose sum is the term; empty
            for an exact likelihood.
        num_bytes: number of bytes of the text by which `bits_per_byte` divides; None without bits
            per byte.
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
    time_bins: Sequence[TimeBin] = ()
    num_bytes: int | None = None

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
        if "given" in self.protocol:
            return f"answers given their {self.protocol['given']}: no perplexity of a text"
        own = ", ".join(self.protocol["own_vectors"])
        return f"given its own vector ({own}): no likelihood of the text"

    def mark_given(self, given: str) -> Evaluation:
        """Return the same bound without perplexity and bits per byte.

        `given` names the part of the documents that is given and not scored, such as "prompts". The
        bound is then a conditional one, and not comparable with that of whole documents.
        """
        protocol = {**self.protocol, "given": given}
        return replace(self, ppl=None, bits_per_byte=None, num_bytes=None, protocol=protocol)

    def mark_own_vectors(self, names: Sequence[str]) -> Evaluation:
        """Return the same bound without perplexity and bits per byte.

        `names` are the conditions that are vectors computed from the text itself. They contain the
        text, so that the bound is not a likelihood of the text.
        """
        protocol = {**self.protocol, "own_vectors": list(names)}
        return replace(self, ppl=None, bits_per_byte=None, num_bytes=None, protocol=protocol)

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
            if field.name not in _ADDED:
                values[field.name] = tree[_field_key(field.name, unit, bound)]
        values["num_bytes"] = tree.get("num_bytes")
        values["time_bins"] = tuple(TimeBin(**found) for found in tree.get("time_bins", ()))
        for name in ("interval", "monte_carlo_interval"):
            # JSON has no tuples
            values[name] = tuple(values[name]) if values[name] else None
        return cls(**values)


_ADDED = ("time_bins", "num_bytes")  # fields that files of older versions lack


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
    ranks: Ranks | None = None,
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
            are made, at most `MOST_DRAWS`, until the interval is that narrow and is reliable
            (`LEAST_FREEDOM`). None: exactly `draws` draws. An exact likelihood needs one draw.
        batch: number of rows per batch.
        seed: seed of times and noise.
        unit: unit of the metrics, "token" or "symbol".
        device: device of the batches.
        console: console of the progress bar.
        ranks: processes that divide the batches; all call this function. None: this process.

    Raises ArgumentError if there are no rows or no draws, and NonFiniteError if the bound is not
    finite.
    """
    _check_arguments(len(document), draws, until, unit)
    names, index = np.unique(document, return_inverse=True)
    ranks = ranks or Ranks()
    sums = DocumentSums(len(names))
    scorer = _Scorer(objective, batch_of, index, length, times, seed, device)
    # the number of draws is not known in advance if they stop at a width
    total = _count_share(ranks, len(document), batch) * draws if until is None else None
    with show_progress(total, ranks.label("evaluating"), console=ranks.console(console)) as bar:
        while sums.draws < draws or not _is_narrow(sums, until, objective.bound, unit):
            scorer.add_draw(sums, batch, ranks, bar)
    protocol = _describe_settings(sums.draws, until, seed, length)
    return _make_evaluation(sums, num_bytes, unit, objective.bound, protocol)


def score_documents(
    objective: Scored,
    batch_of: Callable[[Rows], Any],
    document: NDArray[np.int64],
    *,
    length: int,
    times: TimeRule,
    draws: int,
    batch: int = 64,
    seed: int = 0,
    device: torch.device | None = None,
    bar: Progress,
) -> DocumentSums:
    """Return the nats of every document and draw, to compare models on equal random numbers.

    `bar` is advanced by one for each row and draw. The other arguments are those of `evaluate`.
    Raises NonFiniteError if the bound is not finite.
    """
    _check_arguments(len(document), draws, None, "token")
    names, index = np.unique(document, return_inverse=True)
    sums = DocumentSums(len(names))
    scorer = _Scorer(objective, batch_of, index, length, times, seed, device)
    for _ in range(draws):
        scorer.add_draw(sums, batch, Ranks(), bar)
    _estimate(sums, "token")  # differences of infinite bounds would be NaN
    return sums


@dataclass(frozen=True)
class _Scorer:
    """Computes the nats of a batch; the attributes are the arguments of `evaluate`.

    `index` [R] is the number of the document of each row, from 0.
    """

    objective: Scored
    batch_of: Callable[[Rows], Any]
    index: NDArray[np.int64]
    length: int
    times: TimeRule
    seed: int
    device: torch.device | None

    def add_draw(self, sums: DocumentSums, batch: int, ranks: Ranks, bar: Progress) -> None:
        """Add the next draw of all rows to `sums`, in batches of at most `batch` rows."""
        draw = sums.draws

        def score_batch(dealt: _Dealt) -> BatchSums:
            found = self.score(draw, dealt)
            bar.advance(len(dealt.rows))
            return found

        batches = list(_deal_strata(self.index, draw, batch, self.seed))
        # every rank adds the batches of all ranks in the same order, so that all sums are equal
        for dealt, found in zip(batches, ranks.map(score_batch, batches), strict=True):
            sums.add_batch(self.index[dealt.rows], draw, found)

    def score(self, draw: int, dealt: _Dealt) -> BatchSums:
        batch = self.batch_of(dealt.rows)
        group = torch.from_numpy(self.index[dealt.rows]).to(batch.index.device)
        rng = CounterRng(self.seed, draw, batch.index, self.length, "evaluate", group)
        slot = dealt.slot.to(self.device)
        slots = dealt.slots.to(self.device)
        likelihood = self.objective.nll(batch, rng, slot, slots, self.times)
        return BatchSums.of(likelihood, batch.tokens)


def _count_share(ranks: Ranks, rows: int, batch: int) -> int:
    """Return the number of rows in the batches of this rank."""
    starts = range(0, rows, batch)
    return sum(min(batch, rows - starts[number]) for number in ranks.share(len(starts)))


def _estimate(sums: DocumentSums, unit: str) -> RatioEstimate:
    """Return the estimate from all draws. Raises NonFiniteError if it is not finite."""
    estimate = RatioEstimate.of(sums.nats, sums.tokens)
    _check_finite(estimate.mean, unit)
    return estimate


def _describe_settings(draws: int, until: float | None, seed: int, length: int) -> dict[str, Any]:
    """Return the settings of an evaluation that are part of its protocol (see `evaluate`)."""
    settings: dict[str, Any] = {
        "draws": draws,
        "seed": seed,
        "length": length,
        "interval": "95 %, Student with Hall's correction, over documents",
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
            f"evaluate: until, half the width of the Monte-Carlo interval in nats per {unit}, must "
            f"be positive and finite, such as 0.002; got {until}."
        )


def _is_narrow(sums: DocumentSums, until: float | None, bound: str, unit: str) -> bool:
    """Return whether to stop adding draws (see `until` of `evaluate`)."""
    error = _estimate(sums, unit).monte_carlo
    if until is None or bound == "NLL" or sums.draws >= MOST_DRAWS:
        return True
    if sums.draws < FEWEST_DRAWS or error is None or error.freedom < LEAST_FREEDOM:
        return False
    return error.half_width <= until


def _check_finite(mean: float, unit: str) -> None:
    if not mean < LARGEST_MEAN:  # also for NaN
        raise NonFiniteError(
            f"evaluate: the bound is {mean} nats per {unit}, which is too large for a perplexity: "
            "the network assigns almost zero probability to a token. The weights have probably "
            "diverged. Go back to an earlier checkpoint, or train with a smaller learning rate."
        )


def _make_evaluation(
    sums: DocumentSums,
    num_bytes: int | None,
    unit: str,
    bound: str,
    protocol: Mapping[str, Any],
) -> Evaluation:
    estimate = _estimate(sums, unit)
    mean = estimate.mean
    num_tokens = float(sums.tokens.sum())
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
        terms_nats_per_token=sums.means.compute(TERM),
        parts_nats_per_token=sums.means.compute(PART),
        tokens=round(num_tokens),
        documents=int((sums.tokens > 0).sum()),
        unit=unit,
        bound=bound,
        protocol=protocol,
        time_bins=_make_time_bins(sums.means.compute(TIME_BIN)),
        num_bytes=num_bytes or None,
    )


def _make_time_bins(nats: Mapping[int, float]) -> tuple[TimeBin, ...]:
    """Return the bins of time, from the nats per token of each bin by its number."""
    count = len(nats)
    total = sum(nats.values())
    return tuple(
        TimeBin(number / count, (number + 1) / count, value, value / total if total else 0.0)
        for number, value in sorted(nats.items())
    )


class _Dealt(NamedTuple):
    """Batch of B rows with their time strata.

    Attributes:
        rows: [B] row indices.
        slot: [B] stratum of each row, from 0.
        slots: [B] number of strata, which is the number of rows in the row's document.
    """

    rows: Rows
    slot: Tensor
    slots: Tensor


def _deal_strata(
    index: NDArray[np.int64],
    draw: int,
    batch: int,
    seed: int,
) -> Iterator[_Dealt]:
    """Assign a time stratum to each row, and yield the rows in batches.

    In each draw, the strata of a document are assigned to its rows in order, beginning with a
    random stratum. `index` [R] is the document of each of R rows, `draw` the number of the draw,
    and `batch` the largest number of rows in a batch.
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
        yield _Dealt(rows, slot[rows], torch.from_numpy(slots[rows]))


def _interval(mean: float, error: Error | None) -> tuple[float, float] | None:
    return None if error is None else error.around(mean)


def _standard_error(error: Error | None) -> float | None:
    return None if error is None else error.standard
