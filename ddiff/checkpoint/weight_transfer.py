"""Fine-tuning: initialize a run with the weights of another run.

Tensors that do not depend on the vocabulary are taken as they are. If the vocabulary is another
tree over the same tokens, tables of states and tokens are transferred token by token: an embedding
of a node is the mean of its tokens, that of the mask is the old mask. A head whose rows have
another meaning keeps its fresh weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddiff.core.prediction import segment_logsumexp
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import CheckpointError
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.embedding import StateEmbedding
from ddiff.nn.heads import Head, TokenHead, TreeHead

Parts = Literal["all", "embeddings"]


class TrainedWeights(NamedTuple):
    """Weights of a trained run by name, its vocabulary and its head; `place` is for messages."""

    place: str
    weights: Mapping[str, Tensor]
    vocabulary: Vocabulary
    head: Head


class TransferredWeights(NamedTuple):
    """Weights by name, and the names taken `whole`, taken `by_token`, and left `fresh`."""

    weights: dict[str, Tensor]
    whole: list[str]
    by_token: list[str]
    fresh: list[str]


@torch.no_grad()
def transfer_weights(
    denoiser: Denoiser, source: TrainedWeights, parts: Parts
) -> TransferredWeights:
    """Compute the initial weights of `denoiser` from `source`: all, or only state embeddings.

    Raises CheckpointError if tensors are missing there or have another shape.
    """
    own = denoiser.state_dict()
    vocabulary = denoiser.head.vocabulary
    states = _find_state_embeddings(denoiser)
    head = [name for name in own if name.startswith("head.")]
    if parts == "embeddings" and not states:
        raise CheckpointError(
            f'[train] init parts = "embeddings": {type(denoiser.backbone).__name__} has no '
            'StateEmbedding to fill. Take parts = "all".'
        )
    taken = states if parts == "embeddings" else [name for name in own if name not in head]
    _check_shapes(own, source, taken, states)
    if parts == "all":
        _check_nothing_else(own, source)
    is_same = vocabulary.fingerprint == source.vocabulary.fingerprint
    weights: dict[str, Tensor] = {}
    by_token: dict[str, Tensor] = {}
    for name in taken:
        if is_same or name not in states:
            weights[name] = source.weights[name].to(own[name])
        else:
            table = source.weights[name]
            by_token[name] = _transfer_states(table, source.vocabulary, vocabulary)
    if parts == "all":
        if is_same and _is_same_head(denoiser.head, source.head):
            _check_shapes(own, source, head)
            for name in head:
                weights[name] = source.weights[name].to(own[name])
        elif _has_token_rows(source.head) and isinstance(denoiser.head, TokenHead | TreeHead):
            by_token |= _transfer_head(denoiser.head, source)
    transferred = weights | by_token
    return TransferredWeights(
        weights=own | transferred,
        whole=list(weights),
        by_token=list(by_token),
        fresh=[name for name in own if name not in transferred],
    )


def _find_state_embeddings(denoiser: Denoiser) -> list[str]:
    names: list[str] = []
    for name, module in denoiser.backbone.named_modules(prefix="backbone"):
        if isinstance(module, StateEmbedding):
            names.append(f"{name}.weight")
    return names


def _check_shapes(
    own: Mapping[str, Tensor],
    source: TrainedWeights,
    names: Sequence[str],
    states: Sequence[str] = (),
) -> None:
    """Raise CheckpointError unless `source` has `names` in the same shapes.

    Tables of states may have another number of rows.
    """
    faults = []
    for name in names:
        if name not in source.weights:
            faults.append(f"{name} is not there")
            continue
        theirs = source.weights[name].shape
        mine = own[name].shape
        if name in states:  # one row per state, so their number may differ
            theirs_compared, mine_compared = theirs[1:], mine[1:]
        else:
            theirs_compared, mine_compared = theirs, mine
        if theirs_compared != mine_compared:
            faults.append(f"{name} has shape {list(theirs)} there and {list(mine)} here")
    _raise_faults(faults, source)


def _check_nothing_else(own: Mapping[str, Tensor], source: TrainedWeights) -> None:
    faults: list[str] = []
    for name in source.weights:
        if name not in own and not name.startswith("head."):
            faults.append(f"{name} has no place here")
    _raise_faults(faults, source)


def _raise_faults(faults: list[str], source: TrainedWeights) -> None:
    if faults:
        more = f" and {len(faults) - 3} more differences" if len(faults) > 3 else ""
        raise CheckpointError(
            f"[train] init: the weights of {source.place} do not fit this denoiser: "
            f"{'; '.join(faults[:3])}{more}. Give [denoiser] the sizes of that run, or take "
            'parts = "embeddings".'
        )


def _average_tokens(rows: Tensor, vocabulary: Vocabulary, level: int) -> Tensor:
    """Average rows [V,d] over the tokens of each node of a level: [n_l,d]."""
    tokens = torch.arange(vocabulary.num_tokens)
    index = vocabulary.ancestor(tokens, level) - vocabulary.offsets[level]
    size = vocabulary.level_sizes[level]
    sums = rows.new_zeros(size, rows.shape[1]).index_add(0, index, rows)
    counts = torch.bincount(index, minlength=size)
    return sums / counts.unsqueeze(-1).to(rows)


def _transfer_states(theirs: Tensor, old: Vocabulary, new: Vocabulary) -> Tensor:
    """Build embeddings of states [S,d]: tokens as they are, nodes as means, the old mask."""
    tokens = theirs[: new.num_tokens]
    levels = [_average_tokens(tokens, new, level) for level in range(new.num_levels + 1)]
    weight = torch.cat(levels)
    if new.mask_id is not None and old.mask_id is not None:
        weight[new.mask_id] = theirs[old.mask_id]
    return weight


def _is_same_head(mine: Head, theirs: Head) -> bool:
    """Whether the rows of two heads on the same vocabulary have the same meaning."""
    return (
        type(mine) is type(theirs)
        and mine.kind == theirs.kind
        and mine.parameterization == theirs.parameterization
    )


def _has_token_rows(head: Head) -> bool:
    """Whether each row of the table gives a token's logit among all tokens."""
    return isinstance(head, TokenHead) or (isinstance(head, TreeHead) and head.kind == "tied")


def _transfer_head(mine: TokenHead | TreeHead, source: TrainedWeights) -> dict[str, Tensor]:
    """Build a head's table and bias from those of a head with token rows.

    A node's row is the mean over its tokens; its bias is the log of the sum of their exponentials.
    The distribution over the tokens of a node of the lowest level then is that of the old head.
    """
    # Rows of the old head in the order of the tokens' ids.
    tokens = torch.argsort(_row_order(source.head, 0))
    table = source.weights["head.table"][tokens]
    bias = source.weights["head.bias"][tokens]
    tables = []
    biases = []
    for level in range(mine.levels):
        order = _row_order(mine, level)
        tables.append(_average_tokens(table, mine.vocabulary, level)[order])
        biases.append(_logsumexp_tokens(bias, mine.vocabulary, level)[order])
    return {"head.table": torch.cat(tables), "head.bias": torch.cat(biases)}


def _row_order(head: Head, level: int) -> Tensor:
    """Return which node of a level each row of the head's table belongs to: [n_l], from 0."""
    vocabulary = head.vocabulary
    # A tree head stores the nodes of a subtree next to one another.
    if isinstance(head, TreeHead):
        return vocabulary.order(level) - vocabulary.offsets[level]
    return torch.arange(vocabulary.num_tokens)


def _logsumexp_tokens(values: Tensor, vocabulary: Vocabulary, level: int) -> Tensor:
    """Compute the log of the sum of exp(values [V]) over the tokens of each node: [n_l]."""
    tokens = torch.arange(vocabulary.num_tokens)
    index = vocabulary.ancestor(tokens, level) - vocabulary.offsets[level]
    size = vocabulary.level_sizes[level]
    return segment_logsumexp(values.unsqueeze(0), index, size).squeeze(0)
