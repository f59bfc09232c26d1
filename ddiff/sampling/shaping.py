"""Temperature, filters and guidance, which change predicted distributions before a draw.

A shaper is a function that changes a distribution, for example by a temperature. It is applied to

- the distribution over all tokens, if the vocabulary is flat;
- the distribution over the children of a node, if the vocabulary is a tree. A temperature is then
  applied at every level separately, which differs from a temperature on the tokens.

The predicted distribution of the clean token is changed, not the reverse transition that a sampler
computes from it. Samplers that rank positions by confidence use the original distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.gaussian import PredictedMean
from ddiff.core.network import CountingNetwork, Predicts, count_evaluations
from ddiff.core.numerics import apply_temperature, draw_index
from ddiff.core.prediction import CleanDistribution, DenseDistribution, SubtreeDistribution
from ddiff.core.process import ForwardProcess, Query, RowFunction
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError
from ddiff.sampling.loop import Canvas, Quality, RngAt, Sampler

Shape = Callable[..., Tensor]
Classifier = Callable[[Noisy, Tensor], Tensor]


@final
class ShapedDistribution(SubtreeDistribution):
    """Distribution made from one or several others by a function of their conditionals.

    A conditional is the distribution over the children of a node, given the node.

    Args:
        dists: the original distributions, below the same node of the tree.
        shape: shape(log_p, ...) returns new log-probabilities, which are then normalized. It takes
            one tensor [k,w] for each of the `dists`: in k rows, the log-probabilities of the w
            nodes of a level, with -inf at nodes that are not children of the node of the row.
        plain: distribution by which samplers rank positions. None: this distribution itself.
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
                "ShapedDistribution: all distributions must be over the same subtree; "
                f"got subtrees below the nodes {[dist.top for dist in dists]}."
            )
        self.dists = dists
        self.shape = shape
        self.plain = plain or self
        self._levels: dict[int, Tensor] = {}

    def conditional(self, node: Tensor, level: int, rows: Tensor) -> Tensor:
        """Return log P(child | node) [k,w] of this distribution, for k pairs of row and node.

        `rows` [k] are rows of the distribution, and `node` [k] are nodes one level above `level`.
        The w columns are the nodes of `level` below `self.top`. The value is -inf at nodes that are
        not children of the node.
        """
        conditionals = [next_log_p(dist, node, level, rows) for dist in self.dists]
        return self.shape(*conditionals).log_softmax(-1)

    def draw(self, node: Tensor, level: Tensor, u: Tensor) -> Tensor:
        """Draw a descendant of each node [k] at its target `level` [k], one level after the other.

        All levels use one uniform u [k]. After the draw of a child, the relative position of u in
        the interval of this child is a new uniform for the next level.
        """
        drawn = node.clone()
        remaining = u.clone()
        for below in reversed(range(len(self._below))):
            is_parent = self.vocabulary.level_of(drawn) == below + 1
            rows = (is_parent & (level <= below)).nonzero().squeeze(-1)
            if len(rows):
                p = self.conditional(drawn[rows], below, rows).exp()
                place, remaining[rows] = _invert(p, remaining[rows])
                order = self.vocabulary.order(below, node.device)
                drawn[rows] = order[self._below[below].start + place]
        return drawn

    def log_below(self, level: int) -> Tensor:
        # Cached: samplers that rank positions ask for the same level again.
        if level not in self._levels:
            self._levels[level] = self._multiply_conditionals(level)
        return self._levels[level]

    def _multiply_conditionals(self, level: int) -> Tensor:
        """Return the log-probabilities [r,w] of the w nodes of `level` below `self.top`.

        They are sums of the log-probabilities `conditional` along the path from `top` to the node.
        """
        raw = self.dists[0].log_below(level)
        rows = torch.arange(len(raw), device=raw.device)
        above = level + 1
        if above == len(self._below):
            return self.conditional(torch.full_like(rows, self.top), level, rows).to(raw.dtype)
        joint = torch.full_like(raw, -torch.inf)
        parent_log_p = self.log_below(above)
        first = self._below[level].start
        parents = self.vocabulary.order(above)[self._below[above]]
        # One parent at a time, because the conditional of each parent is as wide as the level.
        for place, parent in enumerate(parents.tolist()):
            start, stop = self.vocabulary.node_range(torch.tensor(parent), level)
            columns = slice(int(start) - first, int(stop) - first)
            conditional = self.conditional(torch.full_like(rows, parent), level, rows)
            log_p = conditional[:, columns].to(raw.dtype)
            joint[:, columns] = parent_log_p[:, place : place + 1] + log_p
        return joint


def next_log_p(dist: CleanDistribution, node: Tensor, level: int, rows: Tensor) -> Tensor:
    """Return log P(child | node) [k,w] for k pairs of a row and a node.

    `rows` [k] are indices of rows of `dist`, and `node` [k] are nodes one level above `level`. The
    w columns are the nodes of `level` below `dist.top`. The value is -inf at nodes that are not
    children of the node.
    """
    # `log_below` starts at the first node below `dist.top`, whose place is therefore subtracted.
    log_p = dist.log_below(level)[rows]
    first = dist.vocabulary.subtree(dist.top)[level].start
    start, stop = (place.unsqueeze(-1) - first for place in dist.vocabulary.node_range(node, level))
    place = torch.arange(log_p.shape[1], device=log_p.device)
    is_outside = (place < start) | (place >= stop)
    return log_p.masked_fill(is_outside, -torch.inf).log_softmax(-1)


def unshaped(dist: CleanDistribution) -> CleanDistribution:
    """Return the distribution without temperature and filters.

    Samplers rank positions by this distribution.
    """
    return dist.plain if isinstance(dist, ShapedDistribution) else dist


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw an index from each row of `weights` [k,w] with uniforms u [k].

    The draw inverts the cumulative sum of the weights. Returns two tensors:

    - the drawn indices [k],
    - new uniforms [k], independent of the indices: the relative position of u in the interval of
      the drawn index.
    """
    place = draw_index(weights, u).unsqueeze(-1)
    cdf = weights.double().cumsum(-1)
    width = weights.double().gather(-1, place)
    fraction = (u.unsqueeze(-1) * cdf[:, -1:] - cdf.gather(-1, place) + width) / width
    # Rounding may give a fraction just outside [0,1).
    return place.squeeze(-1), fraction.squeeze(-1).clamp(0.0, 1.0 - 2.0**-53)


# ---------------------------------------------------------------------- filters


@final
class Temperature:
    """Shaper that changes p to p^(1/T), normalized, with the temperature T >= 0.

    T < 1 sharpens the distribution. T = 0 keeps only the most likely entry, or the first of several
    most likely entries.
    """

    def __init__(self, temperature: float) -> None:
        if not 0.0 <= temperature < float("inf"):
            raise ArgumentError(
                f"Temperature: temperature must be a finite number, 0 or more; got {temperature}. "
                "1 changes nothing, 0 is greedy."
            )
        self.temperature = temperature

    def __call__(self, log_p: Tensor) -> Tensor:
        return apply_temperature(log_p, self.temperature)


@final
class TopK:
    """Filter that keeps the k most likely entries of a distribution."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ArgumentError(f"TopK: k must be at least 1; got {k}.")
        self.k = k

    def __call__(self, log_p: Tensor) -> Tensor:
        kept = log_p.topk(min(self.k, log_p.shape[1]), -1).indices
        empty = torch.full_like(log_p, -torch.inf)
        return empty.scatter(-1, kept, log_p.gather(-1, kept))


@final
class TopP:
    """Filter that keeps the most likely entries, until their total probability is at least p.

    The entry that reaches p is kept too. p is in (0,1], and 1 keeps all entries.
    """

    def __init__(self, p: float) -> None:
        if not 0.0 < p <= 1.0:
            raise ArgumentError(f"TopP: p must be in (0, 1]; got {p}. 1 changes nothing.")
        self.p = p

    def __call__(self, log_p: Tensor) -> Tensor:
        # Stable, so that the choice between equal entries does not depend on the device.
        ranked, order = log_p.sort(dim=-1, descending=True, stable=True)
        p = ranked.double().exp()
        p_before = p.cumsum(-1) - p
        kept = ranked.masked_fill(p_before >= self.p, -torch.inf)
        return torch.full_like(log_p, -torch.inf).scatter(-1, order, kept)


@final
class MinP:
    """Filter that keeps entries with at least `share` times the probability of the largest entry.

    `share` is in [0,1], and 0 keeps all entries.
    """

    def __init__(self, share: float) -> None:
        if not 0.0 <= share <= 1.0:
            raise ArgumentError(f"MinP: share must be in [0, 1]; got {share}. 0 changes nothing.")
        self.share = share

    def __call__(self, log_p: Tensor) -> Tensor:
        lowest = log_p.amax(-1, keepdim=True).double().exp() * self.share
        return log_p.masked_fill(log_p.double().exp() < lowest, -torch.inf)


# ---------------------------------------------------------------------- networks


class _ComposedNetwork(CountingNetwork):
    """Base class of networks that combine or change the predictions of other networks.

    The number of evaluations is the sum of those of the other networks. `name` is the name of the
    public function that makes the network, for error messages.
    """

    def __init__(self, name: str, *networks: Network) -> None:
        super().__init__()
        self.networks = [count_evaluations(network) for network in networks]
        if any(network.predicts != "distribution" for network in self.networks):
            raise ArgumentError(
                f"{name}: the network must predict a distribution of the clean token, which is "
                "reshaped; this denoiser predicts a score. "
                "Sample without temperature, filters and guidance."
            )

    @property
    def calls(self) -> int:
        return sum(network.calls for network in self.networks)

    @property
    def runs(self) -> Tensor:
        # A network that has not been evaluated has no runs and does not know the batch size.
        batch = max(0 if network.runs is None else len(network.runs) for network in self.networks)
        return torch.stack([network.runs_of_batch(batch) for network in self.networks]).sum(0)


@final
class _ShapedNetwork(_ComposedNetwork):
    """Network whose predicted distributions are changed by the functions in `shapers`."""

    def __init__(self, network: Network, shapers: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__("shape_network", network)
        self.shapers = shapers

    def __call__(self, noisy: Noisy) -> Query:
        query = self.networks[0](noisy)

        def shaped_query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            def on_shaped(dist: CleanDistribution, *values: Tensor) -> Any:
                return fn(ShapedDistribution([dist], self._shape, unshaped(dist)), *values)

            return query(rows, node, on_shaped, *per_row)

        return shaped_query

    def _shape(self, log_p: Tensor) -> Tensor:
        for shaper in self.shapers:
            # Normalized after each shaper, since the next one may compare probabilities with p.
            log_p = shaper(log_p).log_softmax(-1)
        return log_p


@final
class _GuidedNetwork(_ComposedNetwork):
    """Network with classifier-free guidance, returned by `guide_network`."""

    def __init__(self, network: Network, null_network: Network, weight: float) -> None:
        super().__init__("guide_network", network, null_network)
        check_weight("guide_network", weight)
        self.weight = weight

    def __call__(self, noisy: Noisy) -> Query:
        query, null_query = (network(noisy) for network in self.networks)
        return guide_query(query, null_query, self.weight)


def guide_query(query: Query, null_query: Query, weight: float) -> Query:
    """Return a query whose predictions are guided by those of `null_query`, without a condition.

    Distributions of tokens are mixed as `guide_network` states. Means of vectors are mixed linearly
    (arXiv 2207.12598): x_hat = null + weight (x_hat with condition - null).
    """

    def guided_query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        def with_null(prediction: Any, rows: Tensor, node: Tensor, *values: Tensor) -> Any:
            def guided(null: Any, place: Tensor, *chunk: Tensor) -> Any:
                part = place if len(place) < len(rows) else None
                return fn(_guide_prediction(prediction, null, part, weight), *chunk)

            # The unconditional head may split these rows into chunks; `place` holds the numbers of
            # the rows in a chunk.
            place = torch.arange(len(rows), device=rows.device)
            return null_query(rows, node, guided, place, *values)

        return query(rows, node, with_null, rows, node, *per_row)

    return guided_query


def _guide_prediction(prediction: Any, null: Any, part: Tensor | None, weight: float) -> Any:
    """Guide the rows `part` of a prediction (None: all) by the prediction `null` of these rows."""
    if isinstance(prediction, PredictedMean):
        mean = prediction.mean if part is None else prediction.mean[part]
        return PredictedMean(null.mean + weight * (mean - null.mean))
    dist = prediction if part is None else _RowSubsetDistribution(prediction, part)
    return ShapedDistribution([dist, null], partial(_guide_log_probs, weight))


def _guide_log_probs(weight: float, log_p: Tensor, log_null: Tensor) -> Tensor:
    """Return (1 - weight) log_null + weight log_p up to a constant, -inf at impossible entries."""
    is_impossible = log_p.isneginf() | log_null.isneginf()
    if abs(weight) <= 1.0:
        guided = (1.0 - weight) * log_null + weight * log_p
    else:
        # The sum is divided by the weight. `apply_temperature` subtracts the largest entry and then
        # multiplies by the weight, so that no weight causes an overflow.
        guided = (log_p - log_null) + log_null / weight
        if weight < 0.0:
            guided = -guided
        guided = guided.masked_fill(is_impossible, -torch.inf)
        guided = apply_temperature(guided, 1.0 / abs(weight))
    # -inf - (-inf) is NaN, and a weight of 0 times -inf too.
    return guided.masked_fill(is_impossible, -torch.inf)


@final
class _RowSubsetDistribution(SubtreeDistribution):
    """Distribution that consists of some rows of another distribution, `dist`."""

    def __init__(self, dist: CleanDistribution, rows: Tensor) -> None:
        super().__init__(dist.vocabulary, dist.top)
        self.dist = dist
        self.rows = rows

    def log_below(self, level: int) -> Tensor:
        return self.dist.log_below(level)[self.rows]


@final
class _ClassifierGuidedNetwork(_ComposedNetwork):
    """Network with classifier guidance, returned by `guide_by_classifier`."""

    def __init__(self, network: Network, log_likelihood: Classifier, weight: float) -> None:
        super().__init__("guide_by_classifier", network)
        check_weight("guide_by_classifier", weight)
        self.log_likelihood = log_likelihood
        self.weight = weight

    def __call__(self, noisy: Noisy) -> Query:
        query = self.networks[0](noisy)

        def guided_query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            def on_guided(dist: CleanDistribution, rows: Tensor, *values: Tensor) -> Any:
                return fn(self._guide(dist, noisy, rows), *values)

            return query(rows, node, on_guided, rows, *per_row)

        return guided_query

    def _guide(self, dist: CleanDistribution, noisy: Noisy, rows: Tensor) -> CleanDistribution:
        """Add weighted log-likelihoods of the classifier to the log of `dist`, and normalize.

        `rows` [k] are the flat positions b * L + i of the rows of `dist`.
        """
        log_p = dist.log_below(0)
        vocabulary = dist.vocabulary
        tokens = vocabulary.order(0, log_p.device)[vocabulary.subtree(dist.top)[0]]
        evidence = self.log_likelihood(noisy, rows)
        if evidence.shape != (len(rows), vocabulary.num_tokens):
            raise ArgumentError(
                "guide_by_classifier: log_likelihood must return a tensor "
                f"[{len(rows)}, {vocabulary.num_tokens}] with log p(y | x_i = v) for each queried "
                f"row i and each token v; got a tensor of shape {tuple(evidence.shape)}."
            )
        guided = log_p + self.weight * evidence.to(log_p)[:, tokens]
        # The host waits here for the device. Without this check, NaN would become some token.
        if bool(guided.isnan().any()) or not bool(guided.isfinite().any(-1).all()):
            raise ArgumentError(
                "guide_by_classifier: log p + weight * log_likelihood must not be NaN, and some "
                "token of every row must have a finite value; log_likelihood returned values in "
                f"[{float(evidence.min())}, {float(evidence.max())}], and the weight is "
                f"{self.weight}. Fix log_likelihood, or use a smaller weight."
            )
        return DenseDistribution(guided.log_softmax(-1), vocabulary, dist.top)


def check_weight(name: str, weight: float) -> None:
    """Raise ArgumentError if a guidance weight is not finite."""
    if not math.isfinite(weight):
        raise ArgumentError(
            f"{name}: weight must be a finite number; got {weight}. "
            "weight = 1 is the distribution without guidance."
        )


def shape_network(network: Network, shapers: Sequence[Callable[[Tensor], Tensor]]) -> Network:
    """Return a network whose predictions are changed by `shapers`, applied in this order.

    A shaper maps the log-probabilities [k,w] of k distributions to new log-probabilities [k,w].
    `Temperature`, `TopK`, `TopP` and `MinP` are shapers. On a tree they are applied to the
    distribution over the children of each node.
    """
    return _ShapedNetwork(network, shapers) if shapers else network


def guide_network(network: Network, null_network: Network, weight: float) -> Network:
    """Return a network with classifier-free guidance: log p ~ (1-w) log p_null + w log p.

    `network` predicts p with the condition, `null_network` predicts p_null without the condition,
    and w is `weight`. The result is normalized, on a tree over the children of each node. w = 0 is
    unconditional, w = 1 is conditional, and w > 1 follows the condition more closely. A step
    evaluates both networks once.

    This is guidance of the logits (arXiv 2207.12598; for masked tokens 2301.00704). The guided
    distribution replaces the predicted distribution of the clean token. The rate at which masks are
    revealed therefore does not depend on w, as 2507.08965 recommends. This rate would depend on w
    with guidance of the reverse transition, p(z_s|z_t)^w p_null(z_s|z_t)^(1-w) (2412.10193), or of
    the reverse rates (2406.01572).
    """
    return _GuidedNetwork(network, null_network, weight)


def guide_by_classifier(
    network: Network,
    log_likelihood: Classifier,
    weight: float = 1.0,
) -> Network:
    """Return a network with classifier guidance: p(x_i) p(y | x_i)^weight, normalized.

    p(x_i) is the prediction of `network` for token x_i at position i, and p(y | x_i) the
    probability that the classifier gives to the desired property y. `log_likelihood(noisy, rows)`
    returns ln p(y | x_i = v) [k,V] for each of the V tokens v, at the k flat positions
    rows = b * L + i of the noisy sequences. For example, to prefer the tokens of a list at every
    position:

        bonus = torch.zeros(num_tokens)
        bonus[preferred] = 2.0  # nats

        def log_likelihood(noisy, rows):
            return bonus.expand(len(rows), -1)

        guided = guide_by_classifier(network, log_likelihood)
        samples = generate(sampler, process, guided, index=index, length=64, seed=0)

    Raises ArgumentError if the result is NaN, or if a row has no possible token.
    """
    return _ClassifierGuidedNetwork(network, log_likelihood, weight)


@final
class ShapedSampler(Sampler):
    """Sample with `inner` from predictions that are changed by `shapers` (see `shape_network`).

    The sampler has the `quality` (see `Sampler`) of `inner`, relative to the changed distribution.
    """

    def __init__(self, inner: Sampler, shapers: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.inner = inner
        self.shapers = shapers
        self.quality: Quality = inner.quality
        self.order = inner.order
        self.cached = inner.cached
        self.looks_ahead = inner.looks_ahead

    @property
    def steps(self) -> int | None:
        return self.inner.steps

    def start_at(self, time: float) -> ShapedSampler:
        return ShapedSampler(self.inner.start_at(time), self.shapers)

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        if predicts == "mean":
            raise ArgumentError(
                "ShapedSampler: temperature, top_k, top_p and min_p reshape distributions of "
                "tokens; this denoiser predicts the mean of a vector. Remove these settings."
            )
        if predicts != "distribution":
            raise ArgumentError(
                "ShapedSampler: temperature, top_k, top_p and min_p reshape distributions of "
                "tokens; this denoiser predicts a score. Remove these settings, or use a head that "
                "predicts a distribution."
            )
        self.inner.check_supported(process, predicts)

    def run(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        rng_at: RngAt,
    ) -> Iterator[Canvas]:
        return self.inner.run(process, shape_network(network, self.shapers), canvas, rng_at)


def shape_sampler(
    sampler: Sampler, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> Sampler:
    """Apply a temperature and filters to the predictions that a sampler receives.

    Returns `sampler` itself if temperature, top_p and min_p are 1, 1 and 0, and top_k is None.
    """
    shapers: list[Callable[[Tensor], Tensor]] = []
    # The order matters: filters act on the distribution after temperature.
    if temperature != 1.0:
        shapers.append(Temperature(temperature))
    if top_k is not None:
        shapers.append(TopK(top_k))
    if top_p < 1.0:
        shapers.append(TopP(top_p))
    if min_p > 0.0:
        shapers.append(MinP(min_p))
    return ShapedSampler(sampler, shapers) if shapers else sampler
