"""What a denoiser says: the law of the clean token given the REST of the noisy sequence.

The row's own evidence is excluded; every formula of the engine multiplies it in. With the full conditional instead, the
bound is off by tenths of a nat wherever a visible token may be wrong. Networks that give the full conditional (plain
cross-entropy at visible rows) declare `given="all"` and are converted by `drop_own_evidence`. A score is not a law.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor

from ddiff.core.numerics import draw_index, may_be_true, safe_log, where_or_zero
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError


class CleanDistribution(Protocol):
    """r rows of P(x_i | the rest of the sequence), read through the vocabulary's tree.

    All rows of one law ask below the same node `top`; nothing above it is known.
    """

    vocabulary: Vocabulary
    top: int

    def log_below(self, level: int) -> Tensor:
        """[r, w] log P(node | top) for the w nodes of `level` below top, in tree order: what processors reshape."""

    def log_prob(self, node: Tensor) -> Tensor:
        """[r] ids of any level -> [r] log P(token below node)."""

    def log_child(self, node: Tensor, child: Tensor) -> Tensor:
        """[r], [r] -> [r] log P(child | node), child at any depth below node (0 where they are equal)."""

    def log_step(self, node: Tensor, child: Tensor) -> Tensor:
        """log_child for nodes that the rows asked below and children one level down, or equal to their node."""

    def log_mass(self, level: int) -> Tensor:
        """[r, n_level] log P of every node of a level, in id order; level 0 is the dense log_p."""

    def draw(self, node: Tensor, level: Tensor, u: Tensor) -> Tensor:
        """[r] nodes, [r] target levels, [r] uniforms -> [r] a descendant of each node at its level."""


class Score(NamedTuple):
    """log_ratio [r,S]: log s_theta(y) for every state y, 0 at zt itself. Not a law: nothing can be drawn from it."""

    log_ratio: Tensor


Prediction = CleanDistribution | Score
"""What a network says of r rows."""


def require_distribution(prediction: Prediction, asker: str) -> CleanDistribution:
    """The answer as a law; ArgumentError where it is a score, naming who asked."""
    if isinstance(prediction, Score):
        raise ArgumentError(
            f"{asker}: the answer must be a law of the clean token, since a token is drawn from it; got a Score, whose "
            "ratios are no law. Use a sampler made for scores (tau-leaping, analytic), or a head that gives a law."
        )
    return prediction


class SubtreeDistribution(ABC):
    """Rows that all ask below one node `top`; a subclass says the law of each level given `top`.

    Nothing above `top` is known, so `log_prob` and `log_mass` need `top` to be the root.
    `top_is_query_node` says that `top` is the node of the query of every row.
    """

    def __init__(self, vocabulary: Vocabulary, top: int, top_is_query_node: bool = False) -> None:
        self.vocabulary = vocabulary
        self.top = top
        self.top_is_query_node = top_is_query_node
        self._below = vocabulary.subtree(top)  # its places, level by level

    @abstractmethod
    def log_below(self, level: int) -> Tensor:
        """[r, w] log P(node | top) for the w nodes of `level` below top, in tree order."""

    def log_prob(self, node: Tensor) -> Tensor:
        self._needs_root("log_prob")
        return self._log_given_top(node)

    def log_child(self, node: Tensor, child: Tensor) -> Tensor:
        log_child = self._log_given_top(child)
        log_node = self._log_given_top(node, lowest=1)  # below a word is nothing but itself
        # below a node of probability 0 nothing is possible: -inf, not the difference of two infinities
        possible = log_node > -torch.inf
        below = log_child - torch.where(possible, log_node, 0.0)
        only = child == node
        if may_be_true(~possible):
            only = only | (~possible & self._holds_all(node, child))
        return torch.where(only, 0.0, where_or_zero(~only, below))

    def _holds_all(self, node: Tensor, child: Tensor) -> Tensor:
        """bool [r]: every word below the node is below the child, so that P(child | node) = 1 in any law."""
        first, last = self.vocabulary.node_range(node, 0)
        child_first, child_last = self.vocabulary.node_range(child, 0)
        return (last - first) == (child_last - child_first)

    def log_step(self, node: Tensor, child: Tensor) -> Tensor:
        if not self.top_is_query_node:
            return self.log_child(node, child)
        level = (
            len(self._below) - 1
        )  # one below top: known here, so that no other level is computed or looked for
        return torch.where(child == node, 0.0, self._log_at(level, self._place(child, level)))

    def log_mass(self, level: int) -> Tensor:
        self._needs_root("log_mass")
        mass = self.log_below(level)
        if self.vocabulary.num_levels <= 1:  # one order
            return mass
        return _columns(mass, self.vocabulary.position(level, mass.device))

    def draw(self, node: Tensor, level: Tensor, u: Tensor) -> Tensor:
        drawn = node.clone()
        for target in range(max(self.vocabulary.num_levels, 1)):
            rows = (
                ((level == target) & (self.vocabulary.level_of(node) > target))
                .nonzero()
                .squeeze(-1)
            )
            if len(rows):
                drawn[rows] = self._draw_at(node[rows], target, u[rows], rows)
        return drawn

    def _draw_at(self, node: Tensor, level: int, u: Tensor, rows: Tensor) -> Tensor:
        """One descendant at `level` per row, by inverse CDF within the node's range."""
        log_p = self.log_below(level)[rows]
        start, stop = self._local_range(node, level)
        place = torch.arange(log_p.shape[1], device=log_p.device)
        inside = (place >= start.unsqueeze(-1)) & (place < stop.unsqueeze(-1))
        peak = log_p.masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)
        weights = (
            (log_p - peak.masked_fill(peak == -torch.inf, 0.0)).exp().masked_fill(~inside, 0.0)
        )
        return self.vocabulary.order(level, node.device)[
            self._below[level].start + draw_index(weights, u)
        ]

    def _log_at(self, level: int, place: Tensor) -> Tensor:
        """[r] log P(node | top) of one node of `level` per row, by its place below top."""
        return self.log_below(level).gather(-1, place.unsqueeze(-1)).squeeze(-1)

    def _width(self, level: int) -> int:
        """How many nodes of `level` lie below top; top is one itself."""
        if level == len(self._below):
            return 1
        return self._below[level].stop - self._below[level].start

    def _place(self, node: Tensor, level: int) -> Tensor:
        """[r] each node's place among those of `level` below top; of one that is not there some place."""
        return self._local_range(node, level)[0].clamp(0, self._width(level) - 1)

    def _local_range(self, node: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """The node's range of places at `level`, counted from the first place below top."""
        (start, stop), first = self.vocabulary.node_range(node, level), self._below[level].start
        return start - first, stop - first

    def _log_given_top(self, node: Tensor, lowest: int = 0) -> Tensor:
        """[r] log P(node | top); 0 at top itself, and at levels under the lowest that is looked for."""
        own_level = self.vocabulary.level_of(node)
        value: Tensor | None = None
        for level in range(lowest, len(self._below)):
            here = own_level == level
            if not may_be_true(here):
                continue
            picked = self._log_at(level, self._place(node, level))
            value = torch.where(here, picked, torch.zeros_like(picked) if value is None else value)
        return torch.zeros(node.shape, device=node.device) if value is None else value

    def _needs_root(self, name: str) -> None:
        if self.top != self.vocabulary.root:
            raise ArgumentError(
                f"CleanDistribution.{name}: the rows asked below node {self.top} only, so the law above it is not known. "
                "Ask at the root (ForwardProcess.scope), or use log_child."
            )


@final
class DenseDistribution(SubtreeDistribution):
    """A law given by its log-probabilities of words.

    `log_p` [r, V] in id order covers the whole vocabulary; with `top` below the root it holds only the words below top,
    in tree order, normalised there (tied heads).
    """

    def __init__(self, log_p: Tensor, vocabulary: Vocabulary, top: int | None = None) -> None:
        super().__init__(vocabulary, vocabulary.root if top is None else top)
        flat = vocabulary.num_levels <= 1
        self._words = (
            log_p
            if flat or top is not None
            else log_p.index_select(-1, vocabulary.order(0, log_p.device))
        )
        self._levels: dict[int, Tensor] = {0: self._words}

    def log_below(self, level: int) -> Tensor:
        if level not in self._levels:
            self._levels[level] = self._sum_words(level)
        return self._levels[level]

    def _sum_words(self, level: int) -> Tensor:
        segment = _segments(self.vocabulary, self.top, level, self._words.device)
        return segment_logsumexp(self._words, segment, self._width(level))


@final
class LogitDistribution(SubtreeDistribution):
    """A law given by logits of words, exp(logit) / sum of all: what a softmax says, never written out for all words.

    `logits` [r,w] in id order cover the whole vocabulary, with `top` below the root the words below top in tree order. The
    exponentials are formed once; what is read of them (one word, the masses of a level) sends back one product with them,
    in whichever memory order the logits are.
    """

    def __init__(
        self,
        logits: Tensor,
        vocabulary: Vocabulary,
        top: int | None = None,
        top_is_query_node: bool = False,
    ) -> None:
        super().__init__(vocabulary, vocabulary.root if top is None else top, top_is_query_node)
        flat = vocabulary.num_levels <= 1
        self._logits = (
            logits
            if flat or top is not None
            else _columns(logits, vocabulary.order(0, logits.device))
        )
        self._softmax = _Softmax(self._logits.detach())
        self._levels: dict[int, Tensor] = {}

    def log_below(self, level: int) -> Tensor:
        if level not in self._levels:
            self._levels[level] = (
                self._masses(level)
                if level
                else _LogSoftmax.apply(self._logits, self._softmax.read())
            )
        return self._levels[level]

    def _log_at(self, level: int, place: Tensor) -> Tensor:
        if level or level in self._levels:
            return super()._log_at(level, place)
        return _Pick.apply(self._logits, self._softmax.read(), place)

    def _masses(self, level: int) -> Tensor:
        """[r,n] log of the mass of each node of `level`: a segment log-sum-exp over contiguous ranges of words."""
        nodes = self.vocabulary.order(level)[self._below[level]]
        first, last = self.vocabulary.node_range(nodes, 0)
        sizes = (last - first).tolist()
        sums = torch.stack(
            [part.sum(-1) for part in self._softmax.exponentials.split(sizes, -1)], -1
        )
        segment = _segments(self.vocabulary, self.top, level, self._logits.device)
        smallest = torch.finfo(sums.dtype).tiny
        # Beside the likeliest word a node may underflow. On a device training does not wait to see whether one did: its
        # log is then read as that of the smallest number, 87 below, and whatever has no gradient is exact.
        waits = sums.device.type == "cpu" or not torch.is_grad_enabled()
        if waits and bool((sums < smallest).any()):
            return segment_logsumexp(self.log_below(0), segment, len(nodes))
        return _Masses.apply(self._logits, self._softmax.read(), sums.clamp(min=smallest), segment)


class _Softmax:
    """exp(logit - peak) [r,w], their sums [r,1], and the logs of the sums of exp(logit) [r,1]; constants to autograd.

    A chunk's graph is walked once, so the last reader to send its gradient back writes it over the exponentials.
    """

    def __init__(self, logits: Tensor) -> None:
        peak = logits.amax(-1, keepdim=True) if logits.shape[-1] else logits.sum(-1, keepdim=True)
        self.exponentials = logits.sub(peak).exp_()
        self.total = self.exponentials.sum(-1, keepdim=True)
        self.log_total = peak + self.total.log()
        self.readers = 0

    def read(self) -> _Softmax:
        self.readers += int(torch.is_grad_enabled())
        return self

    def scaled(self, factor: Tensor, beside: Tensor | None = None) -> Tensor:
        """[r,w] probabilities times a factor per row [r], plus what is beside: a reader's gradient."""
        self.readers -= 1
        each, place = (
            factor.unsqueeze(-1) / self.total,
            self.exponentials if self.readers == 0 else None,
        )
        if beside is None:
            return torch.mul(self.exponentials, each, out=place)
        return torch.addcmul(beside, self.exponentials, each, out=place)


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, softmax: _Softmax) -> Tensor:
        ctx.softmax = softmax
        return logits - softmax.log_total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.softmax.scaled(-gradient.sum(-1), gradient), None


class _Pick(torch.autograd.Function):
    """[r] log-probability of one word per row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, softmax: _Softmax, place: Tensor) -> Tensor:
        ctx.softmax, ctx.place = softmax, place.unsqueeze(-1)
        return (logits.gather(-1, ctx.place) - softmax.log_total).squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_logits = ctx.softmax.scaled(-gradient)
        return d_logits.scatter_add_(-1, ctx.place, gradient.unsqueeze(-1)), None, None


class _Masses(torch.autograd.Function):
    """[r,n] log-probability of each segment of words."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, softmax: _Softmax, sums: Tensor, segment: Tensor
    ) -> Tensor:
        ctx.softmax, ctx.sums, ctx.segment = softmax, sums, segment
        return (sums / softmax.total).log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        softmax = ctx.softmax
        softmax.readers -= 1
        each = gradient / ctx.sums - gradient.sum(-1, keepdim=True) / softmax.total
        return (
            _columns(each, ctx.segment, softmax.exponentials).mul_(softmax.exponentials),
            None,
            None,
            None,
        )


def _columns(values: Tensor, index: Tensor, like: Tensor | None = None) -> Tensor:
    """values[:, index] in the memory order of `like` (of `values`)."""
    if (values if like is None else like).stride(-1) == 1:
        return values.index_select(-1, index)
    return values.t().index_select(0, index).t()


def _segments(vocabulary: Vocabulary, top: int, level: int, device: torch.device) -> Tensor:
    """[w] for each word below top, in tree order, the place below top of the node of `level` above it."""
    below = vocabulary.subtree(top)
    words = vocabulary.order(0, device)[below[0]]
    if level == len(below):
        return torch.zeros_like(words)
    nodes = vocabulary.ancestor(words, level) - vocabulary.offsets[level]
    return vocabulary.position(level, device)[nodes] - below[level].start


def segment_logsumexp(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """[r,n] values, [n] segment of each column -> [r,num_segments] log of the sum of exponentials per segment."""
    index = segment.expand_as(values)
    peak = (
        values.detach()
        .new_full((len(values), num_segments), -torch.inf)
        .scatter_reduce(-1, index, values.detach(), "amax")
    )
    peak = torch.where(peak.isfinite(), peak, torch.zeros_like(peak))
    total = torch.zeros_like(peak).index_add(-1, segment, (values - peak.gather(-1, index)).exp())
    return (
        safe_log(total) + peak
    )  # a segment without mass (`drop_own_evidence` makes them) sends nothing back


def drop_own_evidence(log_p: Tensor, log_likelihood: Tensor) -> Tensor:
    """Turn the full conditional P(x | z) into the rest-law, proportional to p(x) / q_t(z_i | x).

    log_p [r,V], log_likelihood [r,V] = `ForwardProcess.log_likelihood(zt, t)` -> [r,V]. Tokens that cannot have become
    z_i keep probability 0: the full conditional says nothing about them.
    """
    quotient = torch.where(log_likelihood.isfinite(), log_p - log_likelihood, -torch.inf)
    return quotient.log_softmax(-1)
