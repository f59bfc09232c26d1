"""Likelihood bound of samples of several fields along a path, with confidence intervals.

A path that holds no field gives the bound of the joint sample. A path that holds a field clean
gives the bound of the other fields given this field. Such a conditional bound is not a perplexity
of the text, so no perplexity is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from ddiff.core.elbo import Likelihood
from ddiff.core.field import Field
from ddiff.core.path_coverage import Lacking, require_trained
from ddiff.core.paths import Hold, Leg, Path
from ddiff.core.rate_distortion import RateDistortionPaths, rate_distortion_paths
from ddiff.core.rng import CounterRng
from ddiff.core.training_paths import TrainingPath, require_path
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, NonFiniteError
from ddiff.evaluation.ratio import Error, RatioEstimate, error_of_partners
from ddiff.progress import show_progress

Interval = tuple[float, float]


class ScoredFields(Protocol):
    """Interface that `evaluate_fields` requires of an objective of several fields."""

    def nll(
        self,
        batch: Any,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        path: Path,
    ) -> Mapping[str, Likelihood]:
        """Draw an unbiased estimate of the bound of every sample, by field, in nats."""

    def counts(self, batch: Any) -> Mapping[str, Tensor]:
        """Return the number of items of every field in a batch."""


@dataclass(frozen=True)
class FieldFigures:
    """Part of the bound that belongs to one field.

    Attributes:
        nats_per_item: nats per token, or per number of a vector.
        interval: 95 % confidence interval of `nats_per_item`; None for one sample.
        items: number of tokens, or of numbers.
        terms: nats per item of each term of the bound.
    """

    nats_per_item: float
    interval: Interval | None
    items: int
    terms: Mapping[str, float]


@dataclass(frozen=True)
class JointEvaluation:
    """Bound of samples of several fields along one path.

    Attributes:
        path: text form of the path.
        nats_per_sample: mean of the sum over all fields, in nats per sample.
        interval: 95 % confidence interval of `nats_per_sample` for samples from the same source;
            None for one sample.
        monte_carlo_interval: 95 % confidence interval for exactly these samples, which includes
            only the error of random times and noise; None for one draw.
        samples: number of samples.
        fields: part of every field that the path moves.
        scores: nats [samples, draws] of every sample in every draw.
        partners: number [samples] of the sample from which each sample got its given fields; None
            if no field was replaced.
    """

    path: str
    nats_per_sample: float
    interval: Interval | None
    monte_carlo_interval: Interval | None
    samples: int
    fields: Mapping[str, FieldFigures]
    scores: NDArray[np.float64] = field(repr=False, compare=False)
    partners: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)

    def subtract_from(self, other: JointEvaluation) -> tuple[float, Interval | None]:
        """Return the mean of other - self over the same samples, and its 95 % interval.

        The interval is that of paired samples. Both evaluations must have the same samples and
        draws. If given fields of `other` are those of other samples, the interval includes that
        every given value occurs in two differences.
        """
        differences = other.scores - self.scores
        if other.partners is not None:
            mean = float(differences.mean())
            return mean, _interval(mean, error_of_partners(differences.mean(-1), other.partners))
        estimate = RatioEstimate.of(differences, np.ones(self.samples))
        return estimate.mean, _interval(estimate.mean, estimate.total)


def evaluate_fields(
    objective: ScoredFields,
    batch_of: Callable[[NDArray[np.int64]], Any],
    samples: int,
    path: TrainingPath,
    *,
    draws: int = 16,
    batch: int = 64,
    seed: int = 0,
    volumes: Mapping[str, float] | None = None,
    device: torch.device | None = None,
    console: Console | None = None,
    title: str = "evaluating",
    ranks: Ranks | None = None,
) -> JointEvaluation:
    """Estimate the bound of samples along a path, and its standard errors.

    Args:
        objective: computes the nats of a batch.
        batch_of: function that returns the batch with given sample numbers.
        samples: number of samples.
        path: path with a bound; rules of training are refused.
        draws: number of independent draws of times and noise per sample.
        batch: number of samples per batch.
        seed: seed of times and noise.
        volumes: `Normalizer.log_volume` per vector, by field, to report a field in data units.
        device: device of the batches.
        console: console for the progress bar; standard error by default.
        title: name of the job in the progress bar.
        ranks: processes that divide the batches, all of which call this function with the same
            arguments; None: only this process. The result does not depend on their number.

    Raises ArgumentError for a path without a bound, or if there are no samples or no draws, and
    NonFiniteError if the bound is not finite.
    """
    path = require_path(path, "evaluate_fields")
    _check_numbers("evaluate_fields", samples, draws)
    ranks = ranks or Ranks()
    batches = _divide(samples, batch)
    items = [(draw, numbers) for draw in range(draws) for numbers in batches]
    own = sum(len(items[number][1]) for number in ranks.share(len(items)))
    with show_progress(own, ranks.label(title), console=ranks.console(console)) as bar:

        def score(item: tuple[int, NDArray[np.int64]]) -> dict[str, _FieldNats]:
            draw, numbers = item
            index = torch.from_numpy(numbers).to(device)
            # Every sample is a separate group, so that samples are independent.
            rng = CounterRng(seed, draw, index, 1, "evaluate", index)
            found = batch_of(numbers)
            likelihood = objective.nll(found, rng, torch.zeros_like(index), 1, path)
            bar.advance(len(numbers))
            return _count_nats(likelihood, found, volumes or {})

        scored = ranks.map(score, items)
    scores = _Scores(samples, draws)
    for (draw, numbers), found in zip(items, scored, strict=True):
        scores.add(numbers, draw, found)
    moving = [name for name, leg in path.legs.items() if isinstance(leg, Leg)]
    return scores.result(str(path), moving)


class RatedFields(ScoredFields, Protocol):
    """Interface that `evaluate_rate_distortion` requires of an objective."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """Fields by name."""

    @property
    def path(self) -> TrainingPath:
        """Path or rule of training."""


@dataclass(frozen=True)
class RateDistortion:
    """Bound of a text through a latent vector that is computed from the text.

    All intervals have 95 %, for samples from the same source; None for one sample.

    Attributes:
        nats_per_sample: rate plus distortion, an upper bound of the mean of -ln p(text).
        interval: interval of `nats_per_sample`.
        monte_carlo_interval: interval for exactly these samples, which includes only the error of
            random times and noise; None for one draw.
        nats_per_token: the same bound per counted token of the text.
        token_interval: interval of `nats_per_token`.
        rate: nats per sample of the latent.
        rate_interval: interval of `rate`.
        distortion: nats per sample of the text, given the noisy latent; not a likelihood.
        distortion_interval: interval of `distortion`.
        deviation: deviation s of the noise of the latent, in normalized units.
        time: time of the process with this noise.
        samples: number of samples.
        tokens: number of counted tokens of the text.
    """

    nats_per_sample: float
    interval: Interval | None
    monte_carlo_interval: Interval | None
    nats_per_token: float
    token_interval: Interval | None
    rate: float
    rate_interval: Interval | None
    distortion: float
    distortion_interval: Interval | None
    deviation: float
    time: float
    samples: int
    tokens: int


def evaluate_rate_distortion(
    objective: RatedFields,
    batch_of: Callable[[NDArray[np.int64]], Any],
    samples: int,
    text: str,
    latent: str,
    deviation: float,
    *,
    draws: int = 16,
    batch: int = 64,
    seed: int = 0,
    unnamed: Hold = "prior",
    lacking: Lacking = (),
    device: torch.device | None = None,
    console: Console | None = None,
    ranks: Ranks | None = None,
) -> RateDistortion:
    """Estimate rate plus distortion, a bound of -ln p(text) through the latent of the text.

    The text given its own clean latent has no such bound, since the latent is computed from the
    text. See `ddiff.core.rate_distortion` for the formula.

    Args:
        objective: computes the nats of a batch.
        batch_of: function that returns the batch with given sample numbers.
        samples: number of samples. Every sample has both fields.
        text: name of the field that is scored.
        latent: name of the field of vectors that is computed from the text.
        deviation: deviation s of the noise of the latent, in normalized units. Every s gives a
            valid bound.
        draws: number of independent draws of times and noise per sample.
        batch: number of samples per batch.
        seed: seed of times and noise.
        unnamed: state of all other fields, "prior" or "absent".
        lacking: combinations of fields that some training samples lack.
        device: device of the batches.
        console: console for the progress bar; standard error by default.
        ranks: processes that divide the batches; None: only this process.

    Raises ArgumentError if training did not train these states, for example the text with a noisy
    latent, and NonFiniteError if the bound is not finite.
    """
    caller = "evaluate_rate_distortion"
    _check_numbers(caller, samples, draws)
    paths = rate_distortion_paths(objective.fields, text, latent, deviation, unnamed)
    require_trained(paths.rate, objective.path, f"{caller}, rate", lacking=lacking)
    require_trained(paths.distortion, objective.path, f"{caller}, distortion", lacking=lacking)
    scorer = _RateScorer(objective, batch_of, paths, text, latent, draws, seed, device)
    ranks = ranks or Ranks()
    batches = _divide(samples, batch)
    own = sum(len(batches[number]) for number in ranks.share(len(batches)))
    title = ranks.label(f"{text} through {latent}")
    with show_progress(own, title, console=ranks.console(console)) as bar:

        def score(numbers: NDArray[np.int64]) -> _Parts:
            found = scorer.score(numbers)
            bar.advance(len(numbers))
            return found

        parts = ranks.map(score, batches)
    rate = np.concatenate([part.rate for part in parts])
    distortion = np.concatenate([part.distortion for part in parts])
    tokens = np.concatenate([part.tokens for part in parts]).astype(np.float64)
    return _summarize(rate, distortion, tokens, deviation, paths.time)


class _Parts(NamedTuple):
    """Nats [B,draws] of both parts of a batch, and numbers of counted tokens [B]."""

    rate: NDArray[np.float64]
    distortion: NDArray[np.float64]
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class _RateScorer:
    """Computes both parts of a batch; see `evaluate_rate_distortion` for the attributes."""

    objective: ScoredFields
    batch_of: Callable[[NDArray[np.int64]], Any]
    paths: RateDistortionPaths
    text: str
    latent: str
    draws: int
    seed: int
    device: torch.device | None

    def score(self, numbers: NDArray[np.int64]) -> _Parts:
        """Score the samples `numbers` [B] in all draws."""
        batch = self.batch_of(numbers)
        _require_both(batch, self.text, self.latent, "evaluate_rate_distortion")
        tokens = batch.fields[self.text].counted.sum(-1).cpu().numpy()
        rate = np.zeros((len(numbers), self.draws))
        distortion = np.zeros((len(numbers), self.draws))
        for draw in range(self.draws):
            terms = self._score_part(batch, "rate", draw, self.paths.rate, self.latent)
            # The decoding term belongs to the clean latent, which is not part of the bound.
            rate[:, draw] = terms["diffusion"] + terms["closing"]
            terms = self._score_part(batch, "distortion", draw, self.paths.distortion, self.text)
            distortion[:, draw] = sum(terms.values())
        return _Parts(rate, distortion, tokens)

    def _score_part(
        self, batch: Any, purpose: str, draw: int, path: Path, name: str
    ) -> dict[str, NDArray[np.float64]]:
        """Return the nats [B] of each term of the field `name` along a path."""
        index = batch.index.to(self.device)
        rng = CounterRng(self.seed, draw, index, 1, purpose, index)
        likelihood = self.objective.nll(batch, rng, torch.zeros_like(index), 1, path)
        terms = likelihood[name].terms.items()
        return {term: values.sum(-1).cpu().numpy() for term, values in terms}


def _divide(samples: int, batch: int) -> list[NDArray[np.int64]]:
    """Divide the numbers of samples into batches; the last batch may be smaller."""
    return [np.arange(start, min(start + batch, samples)) for start in range(0, samples, batch)]


def _summarize(
    rate: NDArray[np.float64],
    distortion: NDArray[np.float64],
    tokens: NDArray[np.float64],
    deviation: float,
    time: float,
) -> RateDistortion:
    """Return means and intervals of the nats [samples,draws] of both parts."""
    ones = np.ones(len(tokens))
    both = RatioEstimate.of(rate + distortion, ones)
    _check_finite(both.mean, "evaluate_rate_distortion: the bound")
    per_token = RatioEstimate.of(rate + distortion, tokens)
    of_rate = RatioEstimate.of(rate, ones)
    of_distortion = RatioEstimate.of(distortion, ones)
    return RateDistortion(
        nats_per_sample=both.mean,
        interval=_interval(both.mean, both.total),
        monte_carlo_interval=_interval(both.mean, both.monte_carlo),
        nats_per_token=per_token.mean,
        token_interval=_interval(per_token.mean, per_token.total),
        rate=of_rate.mean,
        rate_interval=_interval(of_rate.mean, of_rate.total),
        distortion=of_distortion.mean,
        distortion_interval=_interval(of_distortion.mean, of_distortion.total),
        deviation=deviation,
        time=time,
        samples=len(tokens),
        tokens=round(float(tokens.sum())),
    )


def _check_numbers(caller: str, samples: int, draws: int) -> None:
    if samples < 1 or draws < 1:
        raise ArgumentError(
            f"{caller} needs at least one sample and one draw; got {samples} samples, {draws} "
            "draws."
        )


def _check_finite(mean: float, subject: str) -> None:
    if not np.isfinite(mean):
        raise NonFiniteError(
            f"{subject} is {mean} nats per sample. The weights have probably diverged: go back to "
            "an earlier checkpoint."
        )


def _require_both(batch: Any, text: str, latent: str, caller: str) -> None:
    """Raise ArgumentError if a sample lacks the text or the latent."""
    for name in (text, latent):
        if bool(batch.fields[name].absent.any()):
            raise ArgumentError(
                f'{caller}: every sample must have the field "{name}"; some samples lack it. Give '
                "the numbers of samples that have both fields."
            )


class _FieldNats(NamedTuple):
    """Numbers of items [B] of a field in a batch, and nats [B] of each term, on the host."""

    items: NDArray[np.int64]
    terms: Mapping[str, NDArray[np.float64]]


def _count_nats(
    likelihood: Mapping[str, Likelihood], batch: Any, volumes: Mapping[str, float]
) -> dict[str, _FieldNats]:
    """Return the items and nats of every field of a batch."""
    counted = {}
    for name, found in likelihood.items():
        values = batch.fields[name]
        present = values.counted & ~values.absent.unsqueeze(-1)
        positions = present.sum(-1).cpu().numpy()
        width = 1 if values.values.dim() == 2 else values.values.shape[-1]
        terms = {term: nats.sum(-1).cpu().numpy() for term, nats in found.terms.items()}
        if name in volumes:
            terms["data units"] = positions * volumes[name]
        counted[name] = _FieldNats(positions * width, terms)
    return counted


class _Scores:
    """Nats of every sample and draw, by field and term."""

    def __init__(self, samples: int, draws: int) -> None:
        self.samples = samples
        self.draws = draws
        self.nats: dict[str, dict[str, NDArray[np.float64]]] = {}
        self.items: dict[str, NDArray[np.float64]] = {}

    def add(self, numbers: NDArray[np.int64], draw: int, found: Mapping[str, _FieldNats]) -> None:
        """Add the nats of one batch of samples in one draw."""
        for name, field_nats in found.items():
            items = self.items.setdefault(name, np.zeros(self.samples))
            items[numbers] = field_nats.items
            terms = self.nats.setdefault(name, {})
            for term, nats in field_nats.terms.items():
                self._table(terms, term)[numbers, draw] = nats

    def _table(self, terms: dict[str, NDArray[np.float64]], term: str) -> NDArray[np.float64]:
        if term not in terms:
            terms[term] = np.zeros((self.samples, self.draws))
        return terms[term]

    def result(self, path: str, moving: list[str]) -> JointEvaluation:
        """Return means and intervals of the fields that a path moves."""
        totals = {name: sum(self.nats[name].values()) for name in moving}
        joint = RatioEstimate.of(np.asarray(sum(totals.values())), np.ones(self.samples))
        _check_finite(joint.mean, f"evaluate_fields: the bound along {path}")
        fields = {}
        for name in moving:
            items = self.items[name]
            if not items.sum():
                continue
            estimate = RatioEstimate.of(np.asarray(totals[name]), items)
            terms = {
                term: float(values.mean(-1).sum() / items.sum())
                for term, values in self.nats[name].items()
            }
            fields[name] = FieldFigures(
                estimate.mean,
                _interval(estimate.mean, estimate.total),
                round(float(items.sum())),
                terms,
            )
        return JointEvaluation(
            path,
            joint.mean,
            _interval(joint.mean, joint.total),
            _interval(joint.mean, joint.monte_carlo),
            self.samples,
            fields,
            scores=np.asarray(sum(totals.values())),
        )


def _interval(mean: float, error: Error | None) -> Interval | None:
    return None if error is None else error.around(mean)
