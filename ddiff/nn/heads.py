"""Heads: from hidden rows to laws of the clean token, a chunk of rows at a time.

A head never returns a law. It is called back: `fn(law, idx)` sees one chunk of rows that ask below one node, and only
the logits of that node's part of the table exist then, so nothing of shape [positions, V] is ever held. In training the
gradients are formed inside the same chunk (three matrix products, as for a fused cross-entropy) and added in place into
one buffer per table: slicing the table under autograd instead makes a zero-filled [V,d] gradient per slice.

Tables stand in tree order, so that what lies below a node is one range of rows; ids outside keep tokenizer order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddiff.core.prediction import (
    CleanDistribution,
    LogitDistribution,
    SubtreeDistribution,
    segment_logsumexp,
)
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError, NonFiniteError

if TYPE_CHECKING:
    from ddiff.nn.denoiser import Parameterization

HeadCallback = Callable[[CleanDistribution, Tensor], Tensor | tuple[Tensor, ...]]
Logits = Callable[[int, int], Tensor]
TreeKind = Literal["tied", "levelwise"]


class Head(nn.Module, ABC):
    """A linear table over rows `table` [rows, width] with one `bias` per row, read as laws.

    A subclass says how many rows it has, which logits a node needs (`law`) and how many (`logits_per_row`). Table and
    bias start at zero: the first law is uniform among whatever shares a softmax.
    """

    is_table = True  # an optimizer for hidden matrices (Muon) must leave these parameters alone
    chunk_logits: int | None = None  # logits held at once; None: what suits the device
    kind: TreeKind | None = None
    """Layout of the table; None: one row per token or state."""
    levels: int = 1
    """Levels of the tree that have rows in the table."""
    parameterization: Parameterization | None = None
    """How predictions follow from the logits; None: the head predicts a distribution."""
    on_logits: Callable[[int], None] | None = None
    """Called with the number of logits of every product; None: nothing is counted."""

    def __init__(self, vocabulary: Vocabulary, width: int, rows: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.width = width
        self.table = nn.Parameter(torch.zeros(rows, width))
        self.bias = nn.Parameter(torch.zeros(rows))

    @abstractmethod
    def dist(self, logits: Logits, top: int) -> SubtreeDistribution:
        """The law below `top`; `logits(start, stop)` gives [r, stop-start] for those rows of the table."""

    @abstractmethod
    def logits_per_row(self, top: int) -> int:
        """How many logits a row that asks below `top` is expected to need: it bounds the rows of a chunk."""

    @abstractmethod
    def start_from_counts(self, counts: Tensor) -> None:
        """Set the biases so that the first law is the unigram law of `counts` [V], each count raised by one."""

    def total(self, hidden: Tensor, node: Tensor, fn: HeadCallback) -> tuple[Tensor, ...]:
        """Sum of fn's first result over all rows, differentiable in hidden and tables, then all results detached.

        hidden [n,d], node [n]: the subtree in which each row asks, best on the host, where rows are grouped by it.
        `fn(law, idx)` answers for the rows `idx` [k] with [k] or a tuple of [k,...]; what it closes over gets no
        gradient. Returns (sum, *results in row order). With no
        rows, fn is asked once about an empty law and the sum is 0 with zero gradients.
        """
        return _ChunkedSum.apply(
            hidden, self.table, self.bias, self, node, fn, torch.is_grad_enabled()
        )

    @torch.no_grad()
    def query(self, hidden: Tensor, node: Tensor, fn: HeadCallback) -> Tensor | tuple[Tensor, ...]:
        """fn's results in row order, without gradients; NonFiniteError when a logit is NaN or infinite."""
        results, finite = [], torch.ones((), dtype=torch.bool, device=hidden.device)
        grouped, groups = self._grouped(node)
        grouped = grouped.to(hidden.device)
        dtype = _product_dtype(hidden)
        with _outside_autocast(hidden.device):
            for top, first, last in self._chunks(groups):
                idx = grouped[first:last]
                logits = _ChunkLogits(
                    hidden[idx].to(dtype), self.table, self.bias, with_gradient=False
                )
                results.append(_as_tuple(fn(self._law(logits, top), idx)))
                finite &= logits.finite()
        if not bool(finite):
            raise NonFiniteError(
                "Head.visit: the denoiser's logits hold NaN or infinity, so nothing can be drawn or scored. Its weights "
                "or its inputs are not finite: go back to an earlier checkpoint, or train with a smaller learning rate."
            )
        gathered = _gather(results, grouped)
        return gathered[0] if len(gathered) == 1 else gathered

    def _grouped(self, node: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        """Rows sorted by asked node: their indices [n], and (node, how many) per group; words make one group."""
        node = node.clamp(min=self.vocabulary.num_tokens - 1)
        order = torch.argsort(node, stable=True)
        tops, counts = torch.unique_consecutive(node[order], return_counts=True)
        return order, list(zip(tops.tolist(), counts.tolist()))

    def _report_logits(self, logits: Logits, start: int, stop: int) -> Tensor:
        computed = logits(start, stop)
        if self.on_logits is not None:
            self.on_logits(computed.numel())
        return computed

    def _law(self, logits: Logits, top: int) -> SubtreeDistribution:
        if self.on_logits is not None:
            logits = partial(self._report_logits, logits)
        return (
            PointDistribution(self.vocabulary, top)
            if top < self.vocabulary.num_tokens
            else self.dist(logits, top)
        )

    def _chunks(self, groups: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """(node, first, last) of each chunk of the grouped rows; one empty chunk at the root when there are no rows."""
        # a chunk should stay in a CPU's caches (16 MB in float32), while an accelerator wants few and large ones
        most = self.chunk_logits or (2**22 if self.table.device.type == "cpu" else 2**26)
        chunks, first = [], 0
        for top, count in groups:
            size = max(1, most // self.logits_per_row(top))
            size -= size % 16 if size > 16 else 0  # products are fastest at whole tiles
            chunks += [
                (top, first + i, first + min(i + size, count)) for i in range(0, count, size)
            ]
            first += count
        return chunks or [(self.vocabulary.root, 0, 0)]


class TokenHead(Head):
    """One logit per word, in id order; every row asks at the root: P(node) = sum of its words' probabilities."""

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        super().__init__(vocabulary, width, vocabulary.num_tokens)

    def dist(self, logits: Logits, top: int) -> SubtreeDistribution:
        # where there is one level all rows ask below the root; elsewhere some ask further down
        top_is_query_node = self.vocabulary.num_levels == 1
        return LogitDistribution(
            logits(0, self.vocabulary.num_tokens),
            self.vocabulary,
            top_is_query_node=top_is_query_node,
        )

    def logits_per_row(self, top: int) -> int:
        return self.vocabulary.num_tokens

    def start_from_counts(self, counts: Tensor) -> None:
        _set(self.bias, counts.double().add(1).log())

    def _grouped(self, node: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        rows = torch.arange(len(node), device=node.device)
        return rows, [(self.vocabulary.root, len(node))] if len(node) else []


class TreeHead(Head):
    """A head that computes only the part of the tree that a row asks about.

    "tied": one row per word; P(node) is the sum of its words, and a row that asks below a node needs that node's words.
    "levelwise": one row per state except the root, with logits among siblings; a row needs as many logits as its node
    has children, and the levels under them, when they are asked for, follow by the chain rule.
    """

    def __init__(self, vocabulary: Vocabulary, width: int, kind: TreeKind) -> None:
        if kind not in get_args(TreeKind):
            raise ArgumentError(f'TreeHead: kind must be "tied" or "levelwise"; got {kind!r}.')
        levels = max(vocabulary.num_levels, 1) if kind == "levelwise" else 1
        super().__init__(vocabulary, width, sum(vocabulary.level_sizes[:levels]))
        self.kind = kind
        self.levels = levels

    def dist(self, logits: Logits, top: int) -> SubtreeDistribution:
        if self.kind == "tied":
            words = self.vocabulary.subtree(top)[0]
            return LogitDistribution(
                logits(words.start, words.stop), self.vocabulary, top, top_is_query_node=True
            )
        return LevelwiseDistribution(logits, self.vocabulary, top, top_is_query_node=True)

    def logits_per_row(self, top: int) -> int:
        below = [places.stop - places.start for places in self.vocabulary.subtree(top)]
        if not below:  # a word
            return 1
        words, children = below[0], below[-1]
        if self.kind == "tied":
            return words
        return (
            children + words // 16
        )  # a question about words must not break the bound by more than this

    def start_from_counts(self, counts: Tensor) -> None:
        counts = counts.double().cpu().add(1)
        words = torch.arange(self.vocabulary.num_tokens)
        masses = []
        for level, size in enumerate(self.vocabulary.level_sizes[: self.levels]):
            index = self.vocabulary.ancestor(words, level) - self.vocabulary.offsets[level]
            mass = torch.zeros(size, dtype=counts.dtype).index_add(0, index, counts)
            masses.append(mass[self.vocabulary.order(level) - self.vocabulary.offsets[level]])
        _set(self.bias, torch.cat(masses).log())


class LevelwiseDistribution(SubtreeDistribution):
    """A law from logits among siblings: log P(node | top) = sum of log-softmaxes along the path from top to node."""

    def __init__(
        self, logits: Logits, vocabulary: Vocabulary, top: int, top_is_query_node: bool = False
    ) -> None:
        super().__init__(vocabulary, top, top_is_query_node)
        self._logits = logits
        self._levels: dict[int, Tensor] = {}

    def log_below(self, level: int) -> Tensor:
        if level not in self._levels:
            self._levels[level] = self._chain(level)
        return self._levels[level]

    def _chain(self, level: int) -> Tensor:
        vocabulary, places, first = (
            self.vocabulary,
            self._below[level],
            self.vocabulary.offsets[level],
        )
        logits = self._logits(first + places.start, first + places.stop)
        if level + 1 == len(self._below):
            return logits.log_softmax(-1)
        above = self.log_below(level + 1)
        nodes = vocabulary.order(level, logits.device)[places]
        parent = vocabulary.position(level + 1, logits.device)[
            vocabulary.parent(nodes) - vocabulary.offsets[level + 1]
        ]
        parent = parent - self._below[level + 1].start
        return logits + (above - segment_logsumexp(logits, parent, above.shape[-1]))[:, parent]


class PointDistribution(SubtreeDistribution):
    """Rows that ask below words: P(word | word) = 1 and nothing lies below, so no logit is computed."""

    def log_below(self, level: int) -> Tensor:
        raise ArgumentError(
            f"CleanDistribution: level must be below the node that a row asks in; got level {level} for rows at words, "
            "under which nothing is open. Ask at the root (ForwardProcess.scope), or leave these rows out."
        )


class _ChunkLogits:
    """Logits of one chunk, one table slice at a time, each a leaf of fn's graph."""

    def __init__(self, hidden: Tensor, table: Tensor, bias: Tensor, with_gradient: bool) -> None:
        self.hidden, self.table, self.bias = hidden, table, bias
        self.with_gradient = with_gradient
        self.read: list[tuple[slice, Tensor]] = []

    def __call__(self, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        with torch.no_grad():
            if self.with_gradient and self.hidden.device.type == "cpu":
                # word by word in memory: on a CPU all three products are faster, the first by half
                product = (self._weight(rows) @ self.hidden.t()).t()
            else:
                product = F.linear(self.hidden, self._weight(rows))
            # laws are float32 at least, whatever the product was computed in
            logits = product.to(torch.promote_types(self.table.dtype, torch.float32)).add_(
                self.bias[rows]
            )
        self.read.append((rows, logits.requires_grad_(self.with_gradient)))
        return logits

    def finite(self) -> Tensor:
        """[] whether every logit that was read is finite."""
        checks = [logits.isfinite().all() for _, logits in self.read]
        return (
            torch.stack(checks).all()
            if checks
            else torch.ones((), dtype=torch.bool, device=self.hidden.device)
        )

    def push(self, value: Tensor, d_hidden: Tensor, d_table: Tensor, d_bias: Tensor) -> None:
        """Add the gradient of `value` to the buffers, in place; d_hidden holds this chunk's rows only."""
        if not value.requires_grad:
            return
        gradients = torch.autograd.grad(
            value, [logits for _, logits in self.read], allow_unused=True
        )
        for (rows, _), gradient in zip(self.read, gradients):
            if gradient is None:
                continue
            d_bias[rows] += gradient.sum(0)
            gradient = gradient.to(self.hidden.dtype)
            _add_product(d_hidden, gradient, self._weight(rows))
            _add_product(d_table[rows], gradient.t(), self.hidden)

    def _weight(self, rows: slice) -> Tensor:
        return self.table[rows].to(self.hidden.dtype)


class _ChunkedSum(torch.autograd.Function):
    """Head.total: gradients of the sum are formed with it, chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        bias: Tensor,
        head: Head,
        node: Tensor,
        fn: HeadCallback,
        with_gradient: bool,
    ) -> tuple[Tensor, ...]:
        grouped, groups = head._grouped(node)
        grouped = grouped.to(hidden.device, non_blocking=True)
        sorted_hidden = hidden.detach()[grouped].to(_product_dtype(hidden))
        buffers = (
            [torch.zeros_like(tensor) for tensor in (hidden, table, bias)] if with_gradient else []
        )
        results = []
        with _outside_autocast(hidden.device), torch.set_grad_enabled(with_gradient):
            for top, first, last in head._chunks(groups):
                logits = _ChunkLogits(
                    sorted_hidden[first:last], table.detach(), bias.detach(), with_gradient
                )
                prediction = _as_tuple(fn(head._law(logits, top), grouped[first:last]))
                if with_gradient:
                    logits.push(prediction[0].sum(), buffers[0][first:last], *buffers[1:])
                results.append(tuple(tensor.detach() for tensor in prediction))
                del logits, prediction  # before the next chunk is made: one chunk is held at a time
        if with_gradient:
            ctx.save_for_backward(grouped, *buffers)
        rows = _gather(results, grouped)
        ctx.mark_non_differentiable(*rows)
        return rows[0].sum(), *rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grouped, d_hidden, d_table, d_bias = ctx.saved_tensors
        in_row_order = torch.empty_like(d_hidden).index_copy_(0, grouped, d_hidden)
        gradients = [in_row_order, d_table, d_bias]
        # A loss is the sum itself, mostly; to look costs nothing on the CPU, and the table's gradient need not be copied.
        if d_sum.device.type != "cpu" or float(d_sum) != 1.0:
            gradients = [gradient * d_sum.to(gradient.dtype) for gradient in gradients]
        return *gradients, None, None, None, None


def _gather(results: list[tuple[Tensor, ...]], grouped: Tensor) -> tuple[Tensor, ...]:
    """Chunks' results, in grouped order, back in row order."""
    columns = [torch.cat(column) for column in zip(*results)]
    return tuple(torch.empty_like(column).index_copy_(0, grouped, column) for column in columns)


def _add_product(buffer: Tensor, left: Tensor, right: Tensor) -> None:
    if buffer.dtype == left.dtype:
        buffer.addmm_(left, right)
    else:
        buffer += left @ right


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What the products of logits are computed in: the autocast dtype where autocast is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _outside_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def _as_tuple(prediction: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return prediction if isinstance(prediction, tuple) else (prediction,)


def _set(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)
