"""Shaping and guiding: other laws to draw from, made where they are drawn.

What is reshaped is each conditional that is drawn from: the children of a node, one level at a time, or the words where
the tree is flat. Temperature on words summed to nodes is another law than temperature on nodes. Filters act on the law of
the clean token, before any posterior is formed; samplers that rank positions rank them by the law without filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import CountingNetwork, count_evaluations
from ddiff.core.numerics import apply_temperature, draw_index
from ddiff.core.prediction import CleanDistribution, DenseDistribution, SubtreeDistribution
from ddiff.core.process import ForwardProcess, Query, RowFunction
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError
from ddiff.sampling.loop import (
    Canvas,
    Predicts,
    Quality,
    RngAt,
    Sampler,
)

Shape = Callable[..., Tensor]
Classifier = Callable[[Noisy, Tensor], Tensor]


@final
class ShapedDistribution(SubtreeDistribution):
    """`shape(log_p, ...) -> log_p` of each conditional of one or several laws of the same rows.

    Each argument of `shape` is [k,w], normalised, -inf outside the node; what it gives is normalised again. `plain` is the
    law without filters, which orders positions.
    """

    def __init__(
        self,
        dists: Sequence[CleanDistribution],
        shape: Shape,
        plain: CleanDistribution | None = None,
    ) -> None:
        super().__init__(dists[0].vocabulary, dists[0].top)
        if any(dist.top != self.top for dist in dists):
            raise ArgumentError(
                f"ShapedDistribution: all laws must speak of the same subtree; "
                f"got laws below {[dist.top for dist in dists]}."
            )
        self.dists, self.shape, self.plain = dists, shape, plain or self
        self._levels: dict[int, Tensor] = {}

    def conditional(self, node: Tensor, level: int, rows: Tensor) -> Tensor:
        """[k,w] log P(child | node) over the places of `level` below top; node [k] one level above, rows [k] of the law."""
        parts = [next_log_p(dist, node, level, rows) for dist in self.dists]
        return self.shape(*parts).log_softmax(-1)

    def draw(self, node: Tensor, level: Tensor, u: Tensor) -> Tensor:
        """Down the tree one conditional at a time; what is left of the uniform after a draw serves for the next."""
        drawn, left = node.clone(), u.clone()
        for below in reversed(range(len(self._below))):
            rows = (
                ((self.vocabulary.level_of(drawn) == below + 1) & (level <= below))
                .nonzero()
                .squeeze(-1)
            )
            if len(rows):
                place, left[rows] = _invert(
                    self.conditional(drawn[rows], below, rows).exp(), left[rows]
                )
                drawn[rows] = self.vocabulary.order(below, node.device)[
                    self._below[below].start + place
                ]
        return drawn

    def log_below(self, level: int) -> Tensor:
        if level not in self._levels:
            self._levels[level] = self._multiplied(level)
        return self._levels[level]

    def _multiplied(self, level: int) -> Tensor:
        """Every conditional on the way to `level`, one parent after the other."""
        raw, above = self.dists[0].log_below(level), level + 1
        rows = torch.arange(len(raw), device=raw.device)
        if above == len(self._below):
            return self.conditional(torch.full_like(rows, self.top), level, rows).to(raw.dtype)
        joint, mass = torch.full_like(raw, -torch.inf), self.log_below(above)
        nodes = self.vocabulary.order(above)[self._below[above]]
        for place, node in enumerate(nodes.tolist()):
            start, stop = (
                int(x) - self._below[level].start
                for x in self.vocabulary.node_range(torch.tensor(node), level)
            )
            given = self.conditional(torch.full_like(rows, node), level, rows)[:, start:stop]
            joint[:, start:stop] = mass[:, place : place + 1] + given.to(raw.dtype)
        return joint


def next_log_p(dist: CleanDistribution, node: Tensor, level: int, rows: Tensor) -> Tensor:
    """[k,w] log P(child | node [k]) over the places of `level` below the law's top; -inf outside the node."""
    log_p, first = dist.log_below(level)[rows], dist.vocabulary.subtree(dist.top)[level].start
    start, stop = (place.unsqueeze(-1) - first for place in dist.vocabulary.node_range(node, level))
    place = torch.arange(log_p.shape[1], device=log_p.device)
    return log_p.masked_fill((place < start) | (place >= stop), -torch.inf).log_softmax(-1)


def unfiltered(dist: CleanDistribution) -> CleanDistribution:
    """The law by which positions are ranked: no temperature, no filter."""
    return dist.plain if isinstance(dist, ShapedDistribution) else dist


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The place that u [k] falls on among weights [k,w], and how far into it, in [0,1)."""
    place, cdf = draw_index(weights, u).unsqueeze(-1), weights.double().cumsum(-1)
    own = weights.double().gather(-1, place)
    share = (u.unsqueeze(-1) * cdf[:, -1:] - cdf.gather(-1, place) + own) / own
    return place.squeeze(-1), share.squeeze(-1).clamp(0.0, 1.0 - 2.0**-53)


# ---------------------------------------------------------------------- filters


@final
class Temperature:
    """p^(1/T) for T >= 0: T < 1 sharpens, 0 is greedy (the likeliest entry alone, the first of equal ones)."""

    def __init__(self, temperature: float) -> None:
        if not 0.0 <= temperature < float("inf"):
            raise ArgumentError(
                f"Temperature: must be a finite number of at least 0; got {temperature}. 1 changes nothing, 0 is greedy."
            )
        self.temperature = temperature

    def __call__(self, log_p: Tensor) -> Tensor:
        return apply_temperature(log_p, self.temperature)


@final
class TopK:
    """The k likeliest entries."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ArgumentError(f"TopK: k must be at least 1; got {k}.")
        self.k = k

    def __call__(self, log_p: Tensor) -> Tensor:
        kept = log_p.topk(min(self.k, log_p.shape[1]), -1).indices
        return torch.full_like(log_p, -torch.inf).scatter(-1, kept, log_p.gather(-1, kept))


@final
class TopP:
    """The smallest set of likeliest entries that holds mass p in (0,1]; the entry that crosses p is kept."""

    def __init__(self, p: float) -> None:
        if not 0.0 < p <= 1.0:
            raise ArgumentError(f"TopP: p must be in (0, 1]; got {p}. 1 changes nothing.")
        self.p = p

    def __call__(self, log_p: Tensor) -> Tensor:
        ranked, order = log_p.sort(dim=-1, descending=True, stable=True)
        mass = ranked.double().exp()
        before = mass.cumsum(-1) - mass
        return torch.full_like(log_p, -torch.inf).scatter(
            -1, order, ranked.masked_fill(before >= self.p, -torch.inf)
        )


@final
class MinP:
    """Entries of at least `share` in [0,1] of the likeliest one's probability."""

    def __init__(self, share: float) -> None:
        if not 0.0 <= share <= 1.0:
            raise ArgumentError(f"MinP: share must be in [0, 1]; got {share}. 0 changes nothing.")
        self.share = share

    def __call__(self, log_p: Tensor) -> Tensor:
        lowest = log_p.amax(-1, keepdim=True).double().exp() * self.share
        return log_p.masked_fill(log_p.double().exp() < lowest, -torch.inf)


# ---------------------------------------------------------------------- asks


class _Composed(CountingNetwork):
    """An ask made of others: their calls and runs add up."""

    def __init__(self, name: str, *parts: Network) -> None:
        super().__init__()
        self.parts = [count_evaluations(part) for part in parts]
        if any(part.predicts != "distribution" for part in self.parts):
            raise ArgumentError(
                f"{name}: the network must predict a distribution of the clean token, which is what is "
                "reshaped; this denoiser predicts a score. Sample without it."
            )

    @property
    def calls(self) -> int:
        return sum(part.calls for part in self.parts)

    @property
    def runs(self) -> Tensor:
        batch = max(0 if part.runs is None else len(part.runs) for part in self.parts)
        return torch.stack([part.runs_of_batch(batch) for part in self.parts]).sum(0)


@final
class _Shaped(_Composed):
    def __init__(self, network: Network, shapers: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__("shape_network", network)
        self.shapers = shapers

    def __call__(self, noisy: Noisy) -> Query:
        query = self.parts[0](noisy)

        def reshaped(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            def on_shaped(dist: CleanDistribution, *values: Tensor) -> Any:
                return fn(ShapedDistribution([dist], self._shape, unfiltered(dist)), *values)

            return query(rows, node, on_shaped, *per_row)

        return reshaped

    def _shape(self, log_p: Tensor) -> Tensor:
        for shaper in self.shapers:
            log_p = shaper(log_p).log_softmax(-1)
        return log_p


@final
class _Guided(_Composed):
    def __init__(self, network: Network, null_network: Network, weight: float) -> None:
        super().__init__("guide_network", network, null_network)
        self.weight = _finite("guide_network", weight)

    def __call__(self, noisy: Noisy) -> Query:
        query, null_query = (part(noisy) for part in self.parts)

        def both(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            def with_null(
                dist: CleanDistribution, rows: Tensor, node: Tensor, *values: Tensor
            ) -> Any:
                def mixed(null: CleanDistribution, place: Tensor, *part: Tensor) -> Any:
                    whole = len(place) == len(rows)
                    conditional = dist if whole else _RowSubset(dist, place)
                    return fn(ShapedDistribution([conditional, null], self._shape), *part)

                # The unconditional head may split these rows again; `place` says which rows a chunk
                # of it holds.
                place = torch.arange(len(rows), device=rows.device)
                return null_query(rows, node, mixed, place, *values)

            return query(rows, node, with_null, rows, node, *per_row)

        return both

    def _shape(self, log_p: Tensor, log_null: Tensor) -> Tensor:
        impossible = log_p.isneginf() | log_null.isneginf()
        if abs(self.weight) <= 1.0:
            mixed = (1.0 - self.weight) * log_null + self.weight * log_p
        else:
            # in units of the weight, and the largest subtracted before it multiplies: no weight overflows
            mixed = (log_p - log_null) + log_null / self.weight
            mixed = mixed if self.weight > 0.0 else -mixed
            mixed = apply_temperature(
                mixed.masked_fill(impossible, -torch.inf), 1.0 / abs(self.weight)
            )
        return mixed.masked_fill(impossible, -torch.inf)


@final
class _RowSubset(SubtreeDistribution):
    """Some rows of a law."""

    def __init__(self, dist: CleanDistribution, rows: Tensor) -> None:
        super().__init__(dist.vocabulary, dist.top)
        self.dist, self.rows = dist, rows

    def log_below(self, level: int) -> Tensor:
        return self.dist.log_below(level)[self.rows]


@final
class _Steered(_Composed):
    def __init__(self, network: Network, log_likelihood: Classifier, weight: float) -> None:
        super().__init__("guide_by_classifier", network)
        self.log_likelihood, self.weight = log_likelihood, _finite("guide_by_classifier", weight)

    def __call__(self, noisy: Noisy) -> Query:
        query = self.parts[0](noisy)

        def steered(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            def on_steered(dist: CleanDistribution, rows: Tensor, *values: Tensor) -> Any:
                return fn(self._law(dist, noisy, rows), *values)

            return query(rows, node, on_steered, rows, *per_row)

        return steered

    def _law(self, dist: CleanDistribution, noisy: Noisy, rows: Tensor) -> CleanDistribution:
        log_p, vocabulary = dist.log_below(0), dist.vocabulary
        words = vocabulary.order(0, log_p.device)[vocabulary.subtree(dist.top)[0]]
        evidence = self.log_likelihood(noisy, rows)
        if evidence.shape != (len(rows), vocabulary.num_tokens):
            raise ArgumentError(
                f"guide_by_classifier: log_likelihood must give "
                f"[{len(rows)}, {vocabulary.num_tokens}], log p(y | x_i = v) for each "
                f"asked row and word; got {tuple(evidence.shape)}."
            )
        steered = log_p + self.weight * evidence.to(log_p)[:, words]
        if bool(steered.isnan().any()) or not bool(steered.isfinite().any(-1).all()):
            raise ArgumentError(
                f"guide_by_classifier: log p + weight * log_likelihood must not be NaN, and must be "
                f"finite for some token of every row; "
                f"the classifier's values are in [{float(evidence.min())}, {float(evidence.max())}], the weight is "
                f"{self.weight}. Fix log_likelihood, or take a smaller weight."
            )
        return DenseDistribution(steered.log_softmax(-1), vocabulary, dist.top)


def _finite(name: str, weight: float) -> float:
    if not math.isfinite(weight):
        raise ArgumentError(
            f"{name}: weight must be a finite number; got {weight}. 1 follows the condition as trained."
        )
    return weight


def shape_network(network: Network, shapers: Sequence[Callable[[Tensor], Tensor]]) -> Network:
    """The same network, each conditional passed through `shapers` in turn, [k,w] log_p -> log_p each."""
    return _Shaped(network, shapers) if shapers else network


def guide_network(network: Network, null_network: Network, weight: float) -> Network:
    """Guide the distribution of the clean token, classifier-free: log p ~ (1-w) log p_null + w log p, normalised.

    On each conditional. w = 1 is the conditional law, 0 the unconditional one, above 1 more of the condition. Two network
    calls a step. It is guidance of the logits (arXiv 2207.12598; on masked tokens 2301.00704). The chain then steps with
    the guided distribution as with any other, so that masks come off at the rate of the process whatever w is, which
    2507.08965 argues for. Not the same: 2412.10193 guides the reverse transition, p(z_s|z_t)^w p_null(z_s|z_t)^(1-w), and
    2406.01572 the reverse rates. There the mass that w takes from tokens or gives them is a rate of leaving the mask, too.
    """
    return _Guided(network, null_network, weight)


def guide_by_classifier(
    network: Network, log_likelihood: Classifier, weight: float = 1.0
) -> Network:
    """Classifier guidance: p(x) p(y | x_i = x)^w over words; `log_likelihood(noisy, rows[k]) -> [k,V]`, rows flat."""
    return _Steered(network, log_likelihood, weight)


@final
class ShapedSampler(Sampler):
    """A sampler whose every conditional passes through `shapers`; of the quality of the sampler, for the reshaped law."""

    def __init__(self, inner: Sampler, shapers: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.inner, self.shapers = inner, shapers
        self.quality: Quality = inner.quality
        self.order = inner.order
        self.cached = inner.cached
        self.looks_ahead = inner.looks_ahead

    @property
    def steps(self) -> int | None:
        return self.inner.steps

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        if predicts != "distribution":
            raise ArgumentError(
                "ShapedSampler: temperature, top_k, top_p and min_p reshape distributions of tokens; this "
                "denoiser predicts a score. Leave them out, or use a head that predicts a distribution."
            )
        self.inner.check_supported(process, predicts)

    def run(
        self, process: ForwardProcess, network: Network, canvas: Canvas, rng_at: RngAt
    ) -> Iterator[Canvas]:
        return self.inner.run(process, shape_network(network, self.shapers), canvas, rng_at)
