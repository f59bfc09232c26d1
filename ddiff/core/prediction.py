"""Predicted distribution of a clean token x_i, given the states of all other positions.

The prediction P(x_i | z without z_i) excludes the evidence q_t(z_i | x_i) of the position's own
state z_i, because every formula of ddiff multiplies by this evidence. With the full
conditional P(x_i | z) instead, the bound would be wrong by tenths of a nat if tokens that are not
masked may be corrupted.

Some networks predict the full conditional, for example after plain cross-entropy training at
positions that are not masked. They declare `parameterization="all"`, and `drop_own_evidence`
converts their output. A `Score` holds ratios of probabilities and is not a distribution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor

from ddiff.core.numerics import draw_index, find_rows, may_be_true, pick, safe_log, where_or_zero
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError


class CleanDistribution(Protocol):
    """Predicted distribution P(x_i | z without z_i) of the clean token, for r rows (positions).

    It gives probabilities of tokens and of nodes of the vocabulary tree. The probability of a node
    is that of all tokens below it. Every row is conditioned on the event that its token is below
    the node `top`. Probabilities of nodes above `top` are not known.
    """

    vocabulary: Vocabulary
    top: int

    def log_below(self, level: int) -> Tensor:
        """Return log P(node | top) [r,w] for the w nodes of `level` below the node `top`.

        The nodes are in tree order (`Vocabulary.order`).
        """

    def log_prob(self, node: Tensor) -> Tensor:
        """Return the log-probability [r] that the token is below the given node of each row.

        A node is an id of any level. For a token, the result is the token's log-probability.
        """

    def log_child(self, node: Tensor, child: Tensor) -> Tensor:
        """Return log P(child | node) [r] for a child at any depth below the node.

        The result is 0 for a child that equals its node.
        """

    def log_step(self, node: Tensor, child: Tensor) -> Tensor:
        """Return log P(child | node) [r] for children one level below their query nodes.

        `node` holds the query node of each row, the node below which the network predicted the
        distribution. The result is 0 for a child that equals its node.
        """

    def log_mass(self, level: int) -> Tensor:
        """Return the log-probabilities [r,n] of the n nodes of a level, in id order.

        At level 0 the result is [r,V], the log-probabilities of all tokens.
        """

    def draw(self, node: Tensor, level: Tensor, u: Tensor) -> Tensor:
        """Draw a descendant of each node [r] at the target `level` [r], from uniforms u [r].

        A node that is already at its target level or below is returned unchanged.
        """


class Score(NamedTuple):
    """Predicted ratios of probabilities. A token cannot be drawn from a score.

    log_ratio [r,S] is log s_theta(y), the log of the probability of state y relative to z_t. It is
    0 at z_t itself.
    """

    log_ratio: Tensor


Prediction = CleanDistribution | Score
"""Output of a network at r rows."""


def require_distribution(prediction: Prediction, caller: str) -> CleanDistribution:
    """Return the prediction unchanged if it is a distribution.

    Raises ArgumentError, with the name of the caller, if the prediction is a score.
    """
    if isinstance(prediction, Score):
        raise ArgumentError(
            f"{caller}: the prediction must be a distribution of the clean token, since a token is "
            "drawn from it; got a Score, which holds ratios only. Use a sampler made for "
            "scores (tau-leaping, analytic), or a head that predicts a distribution."
        )
    return prediction


class SubtreeDistribution(ABC):
    """Distribution over the tokens below one node `top`. A subclass defines `log_below`.

    `log_prob` and `log_mass` need `top` to be the root, since probabilities of nodes above `top`
    are not known. The query node of a row is the node below which the network predicted the
    distribution. `top_is_query_node` declares that `top` is the query node of every row, which
    makes `log_step` cheaper.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        top: int,
        top_is_query_node: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.top = top
        self.top_is_query_node = top_is_query_node
        # For each level under `top`: the places, in tree order, of the nodes below `top`.
        self._below = vocabulary.subtree(top)

    @abstractmethod
    def log_below(self, level: int) -> Tensor:
        """Return log P(node | top) [r,w] for the w nodes of `level` below the node `top`.

        The nodes are in tree order (`Vocabulary.order`).
        """

    def log_prob(self, node: Tensor) -> Tensor:
        self._require_root("log_prob")
        return self._log_given_top(node)

    def log_child(self, node: Tensor, child: Tensor) -> Tensor:
        log_child = self._log_given_top(child)
        # Level 0 is skipped: below a token there is only the token itself.
        log_node = self._log_given_top(node, lowest=1)
        # A node of probability 0 has children of log-probability -inf; the difference of two
        # infinities would be NaN.
        possible = log_node > -torch.inf
        difference = log_child - torch.where(possible, log_node, 0.0)
        certain = child == node
        if may_be_true(~possible):
            certain = certain | (~possible & self._covers_node(node, child))
        return torch.where(certain, 0.0, where_or_zero(~certain, difference))

    def _covers_node(self, node: Tensor, child: Tensor) -> Tensor:
        """Return for each row whether all tokens below the node are below the child, bool [r].

        In such rows P(child | node) = 1.
        """
        first, last = self.vocabulary.node_range(node, 0)
        child_first, child_last = self.vocabulary.node_range(child, 0)
        return (last - first) == (child_last - child_first)

    def log_step(self, node: Tensor, child: Tensor) -> Tensor:
        if not self.top_is_query_node:
            return self.log_child(node, child)
        # Every child is one level below `self.top`, so other levels are not needed.
        level = len(self._below) - 1
        log_child = self._log_at(level, self._place(child, level))
        return torch.where(child == node, 0.0, log_child)

    def log_mass(self, level: int) -> Tensor:
        self._require_root("log_mass")
        mass = self.log_below(level)
        if self.vocabulary.num_levels <= 1:  # id order is tree order
            return mass
        return _select_columns(mass, self.vocabulary.position(level, mass.device))

    def draw(self, node: Tensor, level: Tensor, u: Tensor) -> Tensor:
        drawn = node.clone()
        own_level = self.vocabulary.level_of(node)
        for target in range(max(self.vocabulary.num_levels, 1)):
            moves = (level == target) & (own_level > target)
            rows = find_rows(moves)
            if len(rows):
                drawn[rows] = self._draw_at(node[rows], target, u[rows], rows)
        return drawn

    def _draw_at(self, node: Tensor, level: int, u: Tensor, rows: Tensor) -> Tensor:
        """Draw for each of k nodes one descendant at `level` by inverse CDF, from uniforms u [k].

        `rows` [k] are the rows of the distribution to which the nodes belong.
        """
        log_p = self.log_below(level)[rows]
        start, stop = self._local_range(node, level)
        place = torch.arange(log_p.shape[1], device=log_p.device)
        is_after_start = place >= start.unsqueeze(-1)
        is_inside = is_after_start & (place < stop.unsqueeze(-1))
        inside = log_p.masked_fill(~is_inside, -torch.inf)
        peak = inside.amax(-1, keepdim=True)
        # If the node has probability 0, the peak is -inf, and -inf - (-inf) would be NaN.
        finite_peak = peak.masked_fill(peak == -torch.inf, 0.0)
        weights = (log_p - finite_peak).exp().masked_fill(~is_inside, 0.0)
        drawn_place = self._below[level].start + draw_index(weights, u)
        return self.vocabulary.order(level, node.device)[drawn_place]

    def _log_at(self, level: int, place: Tensor) -> Tensor:
        """Return log P(node | top) [r] for one node of `level` per row.

        `top` is the node below which the distribution is defined. `place` [r] is the index of each
        node among the nodes at `level` below `top` (`_place`).
        """
        return pick(self.log_below(level), place)

    def _width(self, level: int) -> int:
        """Return the number of nodes that are at `level` and below `self.top`.

        If `level` is the level of `self.top`, the result is 1.
        """
        if level == len(self._below):
            return 1
        return self._below[level].stop - self._below[level].start

    def _place(self, node: Tensor, level: int) -> Tensor:
        """Return the index [r] of each node among the nodes at `level` below `self.top`.

        Indices count in tree order. The index is arbitrary for a node that is not at `level` or not
        below `self.top`.
        """
        start, _ = self._local_range(node, level)
        return start.clamp(0, self._width(level) - 1)

    def _local_range(self, node: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Return the first and one-past-last index [r] of the nodes of `level` below each node.

        Indices count in tree order. Index 0 is the first node of `level` that is below `self.top`.
        """
        start, stop = self.vocabulary.node_range(node, level)
        first = self._below[level].start
        return start - first, stop - first

    def _log_given_top(self, node: Tensor, lowest: int = 0) -> Tensor:
        """Return log P(node | `self.top`) [r] for nodes of any level, one per row.

        The value is 0 for `self.top` and for nodes at levels below `lowest`.
        """
        own_level = self.vocabulary.level_of(node)
        value: Tensor | None = None
        for level in range(lowest, len(self._below)):
            here = own_level == level
            if not may_be_true(here):
                continue
            picked = self._log_at(level, self._place(node, level))
            others = torch.zeros_like(picked) if value is None else value
            value = torch.where(here, picked, others)
        if value is None:
            return torch.zeros(node.shape, device=node.device)
        return value

    def _require_root(self, name: str) -> None:
        if self.top != self.vocabulary.root:
            raise ArgumentError(
                f"CleanDistribution.{name}: the rows were queried below node {self.top} only, so "
                "the distribution above it is not known. Query at the root (ForwardProcess.scope), "
                "or use log_child."
            )


@final
class DenseDistribution(SubtreeDistribution):
    """Distribution given by the log-probabilities of tokens.

    `log_p` [r,V] in id order covers the whole vocabulary. If `top` is given, `log_p` contains only
    the tokens below `top`, in tree order (`Vocabulary.order`) and normalized.
    """

    def __init__(
        self,
        log_p: Tensor,
        vocabulary: Vocabulary,
        top: int | None = None,
    ) -> None:
        super().__init__(vocabulary, vocabulary.root if top is None else top)
        is_in_tree_order = vocabulary.num_levels <= 1 or top is not None
        if not is_in_tree_order:
            log_p = log_p.index_select(-1, vocabulary.order(0, log_p.device))
        self._log_tokens = log_p
        self._levels: dict[int, Tensor] = {0: log_p}

    def log_below(self, level: int) -> Tensor:
        if level not in self._levels:
            self._levels[level] = self._sum_tokens(level)
        return self._levels[level]

    def _sum_tokens(self, level: int) -> Tensor:
        segment = _segments(self.vocabulary, self.top, level, self._log_tokens.device)
        return segment_logsumexp(self._log_tokens, segment, self._width(level))


@final
class LogitDistribution(SubtreeDistribution):
    """Distribution given by logits of tokens. The softmax over all tokens is never stored.

    `logits` [r,w] cover the whole vocabulary in id order. If `top` is given, `logits` cover only
    the tokens below `top`, in tree order (`Vocabulary.order`). The exponentials are computed once.
    Each use of the distribution (for one token, or for the nodes of a level) adds one product with
    the exponentials to the backward pass. Row-major and column-major logits are both supported
    without a copy.
    """

    def __init__(
        self,
        logits: Tensor,
        vocabulary: Vocabulary,
        top: int | None = None,
        top_is_query_node: bool = False,
    ) -> None:
        super().__init__(vocabulary, vocabulary.root if top is None else top, top_is_query_node)
        is_in_tree_order = vocabulary.num_levels <= 1 or top is not None
        if not is_in_tree_order:
            logits = _select_columns(logits, vocabulary.order(0, logits.device))
        self._logits = logits
        self._softmax = _Softmax(logits.detach())
        self._levels: dict[int, Tensor] = {}

    def log_below(self, level: int) -> Tensor:
        if level not in self._levels:
            if level == 0:
                log_p = _LogSoftmax.apply(self._logits, self._softmax.add_reader())
            else:
                log_p = self._log_masses(level)
            self._levels[level] = log_p
        return self._levels[level]

    def _log_at(self, level: int, place: Tensor) -> Tensor:
        if level or level in self._levels:
            return super()._log_at(level, place)
        return _PickToken.apply(self._logits, self._softmax.add_reader(), place)

    def _log_masses(self, level: int) -> Tensor:
        """Return log P(node | top) [r,n] for the n nodes of `level` below `self.top`.

        The mass of a node is the sum of the exponentials of the tokens below the node, which are
        contiguous in tree order.
        """
        nodes = self.vocabulary.order(level)[self._below[level]]
        first, last = self.vocabulary.node_range(nodes, 0)
        sizes = (last - first).tolist()
        parts = self._softmax.exponentials.split(sizes, -1)
        sums = torch.stack([part.sum(-1) for part in parts], -1)
        segment = _segments(self.vocabulary, self.top, level, self._logits.device)
        smallest = torch.finfo(sums.dtype).tiny
        # The mass of a node underflows if it is much smaller than that of the most likely token.
        # The test for underflow would synchronize an accelerator, so training omits the test
        # there, and the log mass is at least the log of the smallest normal number (-87 in
        # float32). On the CPU or without gradients the result is exact.
        may_check = sums.device.type == "cpu" or not torch.is_grad_enabled()
        if may_check and bool((sums < smallest).any()):
            return segment_logsumexp(self.log_below(0), segment, len(nodes))
        softmax = self._softmax.add_reader()
        sums = sums.clamp(min=smallest)
        return _SegmentMasses.apply(self._logits, softmax, sums, segment)


class _Softmax:
    """Exponentials and sums of a softmax of logits [r,w], shared by several autograd functions.

    Autograd treats the attributes as constants.

    Attributes:
        exponentials: [r,w] exp(logit - peak), where peak is the largest logit of each row.
        total: [r,1] sums of the exponentials.
        log_total: [r,1] logs of the sums of exp(logit).
        readers: number of functions that use the softmax and have a gradient. The backward pass
            runs once, so the last of these functions overwrites the exponentials with its gradient,
            to save memory.
    """

    def __init__(self, logits: Tensor) -> None:
        if logits.shape[-1]:
            peak = logits.amax(-1, keepdim=True)
        else:
            # amax raises an error if there are no columns; the sum is then 0.
            peak = logits.sum(-1, keepdim=True)
        self.exponentials = logits.sub(peak).exp_()
        self.total = self.exponentials.sum(-1, keepdim=True)
        self.log_total = peak + self.total.log()
        self.readers = 0

    def add_reader(self) -> _Softmax:
        self.readers += int(torch.is_grad_enabled())
        return self

    def scale_probabilities(self, factor: Tensor, addend: Tensor | None = None) -> Tensor:
        """Return the probabilities [r,w] times `factor` [r], plus `addend` [r,w].

        Gradients with respect to the logits have this form. The result overwrites
        `self.exponentials` to save memory if no other function will use them.
        """
        self.readers -= 1
        scale = factor.unsqueeze(-1) / self.total
        out = self.exponentials if self.readers == 0 else None
        if addend is None:
            return torch.mul(self.exponentials, scale, out=out)
        return torch.addcmul(addend, self.exponentials, scale, out=out)


class _LogSoftmax(torch.autograd.Function):
    """Autograd function from logits [r,w] to the log-probabilities [r,w] of all w tokens."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, softmax: _Softmax) -> Tensor:
        ctx.softmax = softmax
        return logits - softmax.log_total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.softmax.scale_probabilities(-gradient.sum(-1), gradient), None


class _PickToken(torch.autograd.Function):
    """Autograd function from logits [r,w] to the log-probability [r] of one token per row.

    `place` [r] is the column of the token.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, softmax: _Softmax, place: Tensor) -> Tensor:
        ctx.softmax = softmax
        ctx.place = place.unsqueeze(-1)
        picked = logits.gather(-1, ctx.place)
        return (picked - softmax.log_total).squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_logits = ctx.softmax.scale_probabilities(-gradient)
        d_logits = d_logits.scatter_add_(-1, ctx.place, gradient.unsqueeze(-1))
        return d_logits, None, None


class _SegmentMasses(torch.autograd.Function):
    """Autograd function from logits [r,w] to the log-probabilities [r,n] of n segments of tokens.

    `sums` [r,n] holds the sums of the exponentials of each segment, and `segment` [w] the segment
    number of each token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        softmax: _Softmax,
        sums: Tensor,
        segment: Tensor,
    ) -> Tensor:
        ctx.softmax = softmax
        ctx.sums = sums
        ctx.segment = segment
        return (sums / softmax.total).log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        softmax = ctx.softmax
        softmax.readers -= 1
        total = gradient.sum(-1, keepdim=True)
        per_segment = gradient / ctx.sums - total / softmax.total
        per_token = _select_columns(per_segment, ctx.segment, softmax.exponentials)
        return per_token.mul_(softmax.exponentials), None, None, None


def _select_columns(values: Tensor, index: Tensor, like: Tensor | None = None) -> Tensor:
    """Return values[:, index] with the memory layout of `like`, by default that of `values`."""
    template = values if like is None else like
    if template.stride(-1) == 1:
        return values.index_select(-1, index)
    return values.t().index_select(0, index).t()


def _segments(
    vocabulary: Vocabulary,
    top: int,
    level: int,
    device: torch.device,
) -> Tensor:
    """Return the index [w] of the ancestor at `level` of each of the w tokens below `top`.

    Tokens and ancestors are in tree order. Index 0 is the first node of `level` below `top`.
    """
    below = vocabulary.subtree(top)
    tokens = vocabulary.order(0, device)[below[0]]
    if level == len(below):
        return torch.zeros_like(tokens)
    nodes = vocabulary.ancestor(tokens, level) - vocabulary.offsets[level]
    return vocabulary.position(level, device)[nodes] - below[level].start


def segment_logsumexp(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Return the log-sum-exp [r,num_segments] of `values` [r,n] within each segment of columns.

    `segment` [n] holds the segment number of each of the n columns.
    """
    index = segment.expand_as(values)
    constants = values.detach()
    peak = constants.new_full((len(values), num_segments), -torch.inf)
    peak = peak.scatter_reduce(-1, index, constants, "amax")
    peak = torch.where(peak.isfinite(), peak, torch.zeros_like(peak))
    exponentials = (values - peak.gather(-1, index)).exp()
    total = torch.zeros_like(peak).index_add(-1, segment, exponentials)
    # A segment with probability 0, as after `drop_own_evidence`, must send no gradient back.
    return safe_log(total) + peak


def drop_own_evidence(log_p: Tensor, log_likelihood: Tensor) -> Tensor:
    """Convert the full conditional P(x_i | z) to P(x_i | z without z_i), in logs [r,V].

    The result is proportional to P(x_i | z) / q_t(z_i | x_i). `log_p` [r,V] is the log of the full
    conditional, and `log_likelihood` [r,V] the result of `ForwardProcess.log_likelihood(zt, t)`.
    Tokens that cannot have become z_i keep probability 0, since the full conditional carries no
    information on them.
    """
    possible = log_likelihood.isfinite()
    quotient = torch.where(possible, log_p - log_likelihood, -torch.inf)
    return quotient.log_softmax(-1)
