"""Heads: from hidden states to predictions of the clean token, one chunk of rows at a time.

A row is one position at which a prediction is needed. Its query node is the node of the tree below
which the row needs the predicted distribution; with a flat vocabulary this is always the root.

A head never returns a prediction. For each chunk of rows with the same query node it calls
`fn(prediction, idx)`, where idx are the indices of these rows. Only the logits below the query node
are computed, and only for one chunk at a time, so that no tensor [positions, V] is made.

In training the gradients are computed chunk by chunk too (as in a fused cross-entropy), and added
in place to one buffer for the whole output matrix (the attribute `table`). Autograd would make a
zero-filled gradient [V,d] for every slice of the matrix.

The rows of an output matrix are sorted such that the states below a node are adjacent (tree order).
Ids outside of heads keep the order of the tokenizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddiff.core.prediction import (
    LogitDistribution,
    SubtreeDistribution,
    segment_logsumexp,
)
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError, NonFiniteError
from ddiff.nn.parameterization import HeadCallback, Parameterization

Logits = Callable[[int, int], Tensor]
"""logits(start, stop) -> logits [r, stop-start] of the table's rows from `start` to `stop`."""

TreeKind = Literal["tied", "levelwise"]


class Head(nn.Module, ABC):
    """Base class of linear heads: logits = `table` @ hidden state + `bias`, per position.

    `table` [rows,width] is the output matrix. A subclass passes its number of rows to the
    constructor, and defines `dist`, `logits_per_row` and `start_from_counts`. Output matrix and
    biases start at zero, so that the first prediction is uniform within each softmax.
    """

    is_table = True  # Muon, an optimizer for hidden matrices, must not update these parameters
    chunk_logits: int | None = None
    """Logits that are held at a time; None: a number that suits the device."""
    kind: TreeKind | None = None
    """Layout of the table; None: one row per token or state."""
    levels: int = 1
    """Levels of the tree that have rows in the table."""
    parameterization: Parameterization | None = None
    """Parameterization of the logits; None: they give a distribution."""
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
        """Return the predicted distribution over the tokens and nodes below the node `top`.

        `logits(start, stop)` computes the logits of the rows start..stop-1 of the output matrix.
        """

    @abstractmethod
    def logits_per_row(self, top: int) -> int:
        """Return the number of logits that a row with query node `top` usually needs.

        This number determines how many rows form a chunk.
        """

    @abstractmethod
    def start_from_counts(self, counts: Tensor) -> None:
        """Set the biases so that the first prediction is the unigram distribution.

        `counts` [V] are the counts of the tokens. One is added to each count.
        """

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits [n,V] of all tokens in id order, from hidden states [n,width].

        Their softmax is the predicted distribution. A head with another parameterization returns
        its output [n,S] for all states. Training and sampling never make this tensor: they call
        `total` and `query`.
        """
        logits = F.linear(hidden, self.table.to(hidden.dtype))
        dtype = torch.promote_types(self.table.dtype, torch.float32)
        return self.sort_by_id(logits.to(dtype) + self.bias)

    def sort_by_id(self, logits: Tensor) -> Tensor:
        """Convert the logits [n,rows] of all rows of the table to logits of tokens in id order.

        The default returns the logits unchanged.
        """
        return logits

    def total(self, hidden: Tensor, node: Tensor, fn: HeadCallback) -> tuple[Tensor, ...]:
        """Evaluate a function of the predictions, and sum its first result over all rows.

        Args:
            hidden: [n,d] hidden states of the rows.
            node: [n] query nodes, preferably on the CPU, where the rows are grouped by node.
            fn: fn(prediction, idx) returns a tensor [k] or a tuple of tensors [k,...] for the rows
                idx [k]. Tensors of an enclosing function that `fn` uses get no gradient.

        Returns a tuple: first the sum of the first result of `fn`, with gradients for `hidden`,
        output matrix and biases; then every result of `fn`, in row order and without gradients. If
        there are no rows, `fn` is called once with an empty prediction, and the sum is 0.
        """
        return _ChunkedSum.apply(
            hidden, self.table, self.bias, self, node, fn, torch.is_grad_enabled()
        )

    @torch.no_grad()
    def query(self, hidden: Tensor, node: Tensor, fn: HeadCallback) -> Tensor | tuple[Tensor, ...]:
        """Evaluate the function `fn` of the predictions; return its results in row order.

        The rows have the hidden states `hidden` and the query nodes `node` (see `total`). No
        gradients are computed. Raises NonFiniteError if a logit is NaN or infinite.
        """
        results = []
        is_finite = torch.ones((), dtype=torch.bool, device=hidden.device)
        order, groups = self._group_rows(node)
        order = order.to(hidden.device)
        dtype = _product_dtype(hidden)
        with _disable_autocast(hidden.device):
            for top, first, last in self._split_into_chunks(groups):
                idx = order[first:last]
                logits = _ChunkLogits(
                    hidden[idx].to(dtype), self.table, self.bias, with_gradient=False
                )
                results.append(_as_tuple(fn(self._predict(logits, top), idx)))
                # Checked once after the loop: reading it here would synchronize in every chunk.
                is_finite &= logits.are_finite()
        if not bool(is_finite):
            raise NonFiniteError(
                "Head.query: the denoiser's logits contain NaN or infinity, so nothing can be "
                "drawn or scored. Its weights or its inputs are not finite: resume from an earlier "
                "checkpoint, or train with a smaller learning rate."
            )
        gathered = _to_row_order(results, order)
        return gathered[0] if len(gathered) == 1 else gathered

    def _group_rows(self, node: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        """Sort the rows by their query node `node` [n].

        Returns the row numbers [n] in sorted order, and a list of (node, number of rows).
        """
        # Rows whose query node is a token form one group, since they need no logits.
        node = node.clamp(min=self.vocabulary.num_tokens - 1)
        order = torch.argsort(node, stable=True)
        tops, counts = torch.unique_consecutive(node[order], return_counts=True)
        return order, list(zip(tops.tolist(), counts.tolist()))

    def _report_logits(self, logits: Logits, start: int, stop: int) -> Tensor:
        computed = logits(start, stop)
        if self.on_logits is not None:
            self.on_logits(computed.numel())
        return computed

    def _predict(self, logits: Logits, top: int) -> SubtreeDistribution:
        if self.on_logits is not None:
            logits = partial(self._report_logits, logits)
        if top < self.vocabulary.num_tokens:
            return PointDistribution(self.vocabulary, top)
        return self.dist(logits, top)

    def _split_into_chunks(self, groups: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """Split groups of rows with the same query node into chunks.

        The rows are sorted by query node. Each group is a pair (node, number of rows). Each chunk
        is a triple (node, first, last), and consists of the sorted rows from `first` to `last` - 1.
        If there are no rows, the result is one empty chunk at the root.
        """
        limit = self.chunk_logits
        if limit is None:
            # A chunk should fit a CPU's caches (16 MB in float32); a GPU wants few large chunks.
            limit = 2**22 if self.table.device.type == "cpu" else 2**26
        chunks = []
        first = 0
        for top, count in groups:
            size = max(1, limit // self.logits_per_row(top))
            if size > 16:
                size -= size % 16  # matrix products are fastest with whole tiles
            for i in range(0, count, size):
                chunks.append((top, first + i, first + min(i + size, count)))
            first += count
        return chunks or [(self.vocabulary.root, 0, 0)]


class TokenHead(Head):
    """Head with one logit per token, which computes the logits of all tokens in every row.

    The rows of the output matrix `table` are in the order of token ids. The probability of a tree
    node is the sum over the tokens below the node.
    """

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        super().__init__(vocabulary, width, vocabulary.num_tokens)

    def dist(self, logits: Logits, top: int) -> SubtreeDistribution:
        # With one level the query node of all rows is the root; with more it may be a lower node.
        has_one_level = self.vocabulary.num_levels == 1
        all_logits = logits(0, self.vocabulary.num_tokens)
        return LogitDistribution(all_logits, self.vocabulary, top_is_query_node=has_one_level)

    def logits_per_row(self, top: int) -> int:
        return self.vocabulary.num_tokens

    def start_from_counts(self, counts: Tensor) -> None:
        _set(self.bias, counts.double().add(1).log())

    def _group_rows(self, node: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        rows = torch.arange(len(node), device=node.device)
        groups = [(self.vocabulary.root, len(node))] if len(node) else []
        return rows, groups


class TreeHead(Head):
    """Head for trees, which computes only logits below the query node of a position.

    `kind` selects the logits:

    - "tied": the output matrix has one row per token. The probability of a node is the sum over the
      tokens below it. A position needs the logits of the tokens below its query node.
    - "levelwise": the output matrix has one row per state except the root, and the children of a
      node share a softmax. A position needs one logit per child of its query node. If the loss uses
      probabilities of lower levels, the head also computes their logits, and multiplies the
      probabilities along the path (chain rule).
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
            tokens = self.vocabulary.subtree(top)[0]
            token_logits = logits(tokens.start, tokens.stop)
            return LogitDistribution(token_logits, self.vocabulary, top, top_is_query_node=True)
        return LevelwiseDistribution(logits, self.vocabulary, top, top_is_query_node=True)

    def sort_by_id(self, logits: Tensor) -> Tensor:
        if self.kind == "tied":
            return logits[:, self.vocabulary.position(0, logits.device)]

        def select(start: int, stop: int) -> Tensor:
            return logits[:, start:stop]

        root = self.vocabulary.root
        return LevelwiseDistribution(select, self.vocabulary, root).log_mass(0)

    def logits_per_row(self, top: int) -> int:
        widths = [places.stop - places.start for places in self.vocabulary.subtree(top)]
        if not widths:  # a token
            return 1
        tokens = widths[0]
        children = widths[-1]
        if self.kind == "tied":
            return tokens
        # A callback may also use probabilities of tokens, whose logits then exceed the limit by a
        # factor of at most 16.
        return children + tokens // 16

    def start_from_counts(self, counts: Tensor) -> None:
        counts = counts.double().cpu().add(1)
        tokens = torch.arange(self.vocabulary.num_tokens)
        masses = []
        for level, size in enumerate(self.vocabulary.level_sizes[: self.levels]):
            first = self.vocabulary.offsets[level]
            index = self.vocabulary.ancestor(tokens, level) - first
            mass = torch.zeros(size, dtype=counts.dtype).index_add(0, index, counts)
            masses.append(mass[self.vocabulary.order(level) - first])
        _set(self.bias, torch.cat(masses).log())


class LevelwiseDistribution(SubtreeDistribution):
    """Distribution below a node `top`, from a softmax over the children of every node.

    log P(node | top) is the sum of the log-softmaxes along the path from `top` to the node.
    """

    def __init__(
        self, logits: Logits, vocabulary: Vocabulary, top: int, top_is_query_node: bool = False
    ) -> None:
        super().__init__(vocabulary, top, top_is_query_node)
        self._logits = logits
        self._levels: dict[int, Tensor] = {}

    def log_below(self, level: int) -> Tensor:
        if level not in self._levels:
            self._levels[level] = self._apply_chain_rule(level)
        return self._levels[level]

    def _apply_chain_rule(self, level: int) -> Tensor:
        vocabulary = self.vocabulary
        places = self._below[level]
        first = vocabulary.offsets[level]
        logits = self._logits(first + places.start, first + places.stop)
        if level + 1 == len(self._below):
            return logits.log_softmax(-1)
        log_parent = self.log_below(level + 1)
        nodes = vocabulary.order(level, logits.device)[places]
        position = vocabulary.position(level + 1, logits.device)
        parent = position[vocabulary.parent(nodes) - vocabulary.offsets[level + 1]]
        parent = parent - self._below[level + 1].start
        # log_softmax among siblings, plus the parent's log-probability.
        log_sum = segment_logsumexp(logits, parent, log_parent.shape[-1])
        return logits + (log_parent - log_sum)[:, parent]


class PointDistribution(SubtreeDistribution):
    """Distribution below a node that is a token: P(token | token) = 1, without logits."""

    def log_below(self, level: int) -> Tensor:
        raise ArgumentError(
            "CleanDistribution: level must be below the node of the rows; "
            f"got level {level} for rows at tokens, below which there is nothing. "
            "Query at the root (ForwardProcess.scope), or leave these rows out."
        )


class _ChunkLogits:
    """Function logits(start, stop), which computes logits of one chunk of rows.

    Logits are computed for the rows start..stop-1 of the output matrix `table`.

    Each result is a leaf of an autograd graph, so that a backward pass through a function
    of the logits ends at the logits.
    """

    def __init__(self, hidden: Tensor, table: Tensor, bias: Tensor, with_gradient: bool) -> None:
        self.hidden = hidden
        self.table = table
        self.bias = bias
        self.with_gradient = with_gradient
        self.computed: list[tuple[slice, Tensor]] = []

    def __call__(self, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        with torch.no_grad():
            weight = self._weight(rows)
            if self.with_gradient and self.hidden.device.type == "cpu":
                # Token-major in memory: all three products of training are faster on a CPU.
                product = (weight @ self.hidden.t()).t()
            else:
                product = F.linear(self.hidden, weight)
            # Distributions are at least float32, also if the product has a smaller dtype.
            dtype = torch.promote_types(self.table.dtype, torch.float32)
            logits = product.to(dtype).add_(self.bias[rows])
        self.computed.append((rows, logits.requires_grad_(self.with_gradient)))
        return logits

    def are_finite(self) -> Tensor:
        """Return a bool tensor []: True if all logits computed so far are finite."""
        if not self.computed:
            return torch.ones((), dtype=torch.bool, device=self.hidden.device)
        return torch.stack([logits.isfinite().all() for _, logits in self.computed]).all()

    def add_gradients(
        self, value: Tensor, d_hidden: Tensor, d_table: Tensor | None, d_bias: Tensor | None
    ) -> None:
        """Add the gradients of the scalar `value` to three buffers in place.

        The buffers are the gradients of the hidden states of this chunk (`d_hidden`), of the whole
        output matrix (`d_table`) and of all biases (`d_bias`); None for frozen parameters.
        """
        if not value.requires_grad:
            return
        leaves = [logits for _, logits in self.computed]
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        for (rows, _), gradient in zip(self.computed, gradients):
            if gradient is None:
                continue
            if d_bias is not None:
                d_bias[rows] += gradient.sum(0)
            gradient = gradient.to(self.hidden.dtype)
            _add_product(d_hidden, gradient, self._weight(rows))
            if d_table is not None:
                _add_product(d_table[rows], gradient.t(), self.hidden)

    def _weight(self, rows: slice) -> Tensor:
        return self.table[rows].to(self.hidden.dtype)


class _ChunkedSum(torch.autograd.Function):
    """Autograd function that implements `Head.total`.

    The forward pass also computes the gradients of the sum. The backward pass only multiplies them
    by the incoming gradient.
    """

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
        order, groups = head._group_rows(node)
        order = order.to(hidden.device, non_blocking=True)
        sorted_hidden = hidden.detach()[order].to(_product_dtype(hidden))
        d_hidden = torch.zeros_like(hidden) if with_gradient else None
        d_table = torch.zeros_like(table) if with_gradient and table.requires_grad else None
        d_bias = torch.zeros_like(bias) if with_gradient and bias.requires_grad else None
        results = []
        with _disable_autocast(hidden.device), torch.set_grad_enabled(with_gradient):
            for top, first, last in head._split_into_chunks(groups):
                logits = _ChunkLogits(
                    sorted_hidden[first:last], table.detach(), bias.detach(), with_gradient
                )
                prediction = head._predict(logits, top)
                chunk = _as_tuple(fn(prediction, order[first:last]))
                if d_hidden is not None:
                    logits.add_gradients(chunk[0].sum(), d_hidden[first:last], d_table, d_bias)
                results.append(tuple(tensor.detach() for tensor in chunk))
                # Free the logits of this chunk before those of the next chunk are computed.
                del logits, prediction, chunk
        if with_gradient:
            ctx.save_for_backward(order, d_hidden, d_table, d_bias)
        rows = _to_row_order(results, order)
        ctx.mark_non_differentiable(*rows)
        return rows[0].sum(), *rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        order, d_hidden, d_table, d_bias = ctx.saved_tensors
        in_row_order = torch.empty_like(d_hidden).index_copy_(0, order, d_hidden)
        gradients: list[Tensor | None] = [in_row_order, d_table, d_bias]
        # The loss usually is the sum itself, and the factor is 1. On a CPU the test for 1 costs
        # nothing and saves a copy of the gradient of the table. On a GPU it would wait for the
        # device.
        if d_sum.device.type != "cpu" or float(d_sum) != 1.0:
            gradients = [
                None if gradient is None else gradient * d_sum.to(gradient.dtype)
                for gradient in gradients
            ]
        return *gradients, None, None, None, None


def _to_row_order(results: list[tuple[Tensor, ...]], order: Tensor) -> tuple[Tensor, ...]:
    """Concatenate the results of all chunks, and restore the original order of the rows.

    `results` holds the results of `fn` for each chunk. Row i of the concatenation is the original
    row `order[i]`.
    """
    columns = [torch.cat(column) for column in zip(*results)]
    return tuple(torch.empty_like(column).index_copy_(0, order, column) for column in columns)


def _add_product(buffer: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the buffer in place.

    If the buffer and the factors have the same dtype, `addmm_` adds the product without a temporary
    tensor.
    """
    if buffer.dtype == left.dtype:
        buffer.addmm_(left, right)
    else:
        buffer += left @ right


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products that compute logits.

    It is the dtype of autocast if autocast is enabled, else the dtype of `hidden`.
    """
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _disable_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def _as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _set(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)
