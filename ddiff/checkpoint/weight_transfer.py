"""Weight transfer for fine-tuning: initialize a run with the weights of another run.

Tensors that do not depend on the vocabulary are copied unchanged. The embeddings of the states
(tokens, tree nodes and mask) and the output matrix of the head depend on the vocabulary. If the new
vocabulary is another tree over the same tokens, these tensors are computed from the rows of the
tokens: the row of a token is copied, and the row of a tree node is the mean over the tokens below
the node. The embedding of the mask is copied.

The head can be computed in this way only if the old head has one row per token. Otherwise the new
head keeps its initial weights, unless both heads have the same kind and vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddiff.core.prediction import segment_logsumexp
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError, CheckpointError
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.embedding import StateEmbedding
from ddiff.nn.heads import Head, TokenHead, TreeHead

Parts = Literal["all", "embeddings"]


class TrainedWeights(NamedTuple):
    """Weights (by name), vocabulary and head of a trained run.

    `place` is the name of the run in error messages.
    """

    place: str
    weights: Mapping[str, Tensor]
    vocabulary: Vocabulary
    head: Head


class TransferredWeights(NamedTuple):
    """Result of `transfer_weights`.

    Attributes:
        weights: initial weights of the new run, by name.
        whole: names of tensors that were copied unchanged.
        by_token: names of tensors (embedding, output matrix) that were computed from the rows of
            the tokens in the tensors of the old run.
        fresh: names of tensors that keep their random initialization.
    """

    weights: dict[str, Tensor]
    whole: list[str]
    by_token: list[str]
    fresh: list[str]


@torch.no_grad()
def transfer_weights(
    denoiser: Denoiser, source: TrainedWeights, parts: Parts
) -> TransferredWeights:
    """Compute initial weights for `denoiser` from the trained weights `source`.

    `parts` is "all", or "embeddings" for only the embeddings of tokens, tree nodes and mask. Raises
    CheckpointError if tensors are missing in `source` or have another shape.
    """
    own = denoiser.state_dict()
    vocabulary = denoiser.head.vocabulary
    states = _find_state_embeddings(denoiser)
    head = [name for name in own if name.startswith("head.")]
    if parts == "embeddings" and not states:
        raise CheckpointError(
            f'[train] init parts = "embeddings": {type(denoiser.backbone).__name__} has no '
            'StateEmbedding to initialize. Use parts = "all".'
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


@torch.no_grad()
def start_from_output(head: Head, output: Tensor) -> None:
    """Set the output matrix of a head to that of a pretrained model, and its biases to zero.

    `output` [n,width] has one row per token, and possibly unused rows after them. Raises
    ArgumentError if the head does not have one row per token, or has another width.
    """
    num_tokens = head.vocabulary.num_tokens
    if not _has_token_rows(head):
        raise ArgumentError(
            "The output matrix of the model has one row per token, but the head "
            f'{type(head).__name__} has not. Use [denoiser] head = "tokens" or "tied".'
        )
    if len(output) < num_tokens or output.shape[1] != head.width:
        raise ArgumentError(
            f"The output matrix of the model has the shape {list(output.shape)}, but the head "
            f"needs at least {num_tokens} rows of width {head.width}. Use the tokenizer of the "
            "model."
        )
    head.table.copy_(output[_row_order(head, 0)])
    head.bias.zero_()


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
    """Raise CheckpointError unless `source` has the tensors `names` with the shapes in `own`.

    `own` contains the initial tensors of the new denoiser by name. `states` are the names of the
    tensors with one row per state (token, tree node or mask). Their numbers of rows may differ.
    """
    faults = []
    for name in names:
        if name not in source.weights:
            faults.append(f"{name} is missing in the trained run")
            continue
        theirs = source.weights[name].shape
        mine = own[name].shape
        if name in states:  # one row per state, and the number of states may differ
            theirs_compared, mine_compared = theirs[1:], mine[1:]
        else:
            theirs_compared, mine_compared = theirs, mine
        if theirs_compared != mine_compared:
            faults.append(
                f"{name} has shape {list(theirs)} in the trained run and {list(mine)} in this run"
            )
    _raise_faults(faults, source)


def _check_nothing_else(own: Mapping[str, Tensor], source: TrainedWeights) -> None:
    faults: list[str] = []
    for name in source.weights:
        if name not in own and not name.startswith("head."):
            faults.append(f"{name} does not exist in this run")
    _raise_faults(faults, source)


def _raise_faults(faults: list[str], source: TrainedWeights) -> None:
    if faults:
        more = f" and {len(faults) - 3} more differences" if len(faults) > 3 else ""
        raise CheckpointError(
            f"[train] init: the weights of {source.place} do not fit this denoiser: "
            f"{'; '.join(faults[:3])}{more}. Set the sizes in [denoiser] to those of the trained "
            'run, or use parts = "embeddings".'
        )


def _average_tokens(rows: Tensor, vocabulary: Vocabulary, level: int) -> Tensor:
    """Return the mean of `rows` over the tokens below each tree node of a level.

    `rows` [V,d] has one row per token. The result is a tensor [n,d] for the n nodes of `level`.
    """
    tokens = torch.arange(vocabulary.num_tokens)
    index = vocabulary.ancestor(tokens, level) - vocabulary.offsets[level]
    size = vocabulary.level_sizes[level]
    sums = rows.new_zeros(size, rows.shape[1]).index_add(0, index, rows)
    counts = torch.bincount(index, minlength=size)
    return sums / counts.unsqueeze(-1).to(rows)


def _transfer_states(theirs: Tensor, old: Vocabulary, new: Vocabulary) -> Tensor:
    """Build the embeddings [S,d] of all S states (tokens, tree nodes and mask) of a vocabulary.

    `theirs` contains the embeddings for the vocabulary `old`; the result belongs to the vocabulary
    `new`. The embeddings of the tokens and of the mask are copied. The embedding of a node is the
    mean of the embeddings of the tokens below the node.
    """
    tokens = theirs[: new.num_tokens]
    levels = [_average_tokens(tokens, new, level) for level in range(new.num_levels + 1)]
    weight = torch.cat(levels)
    if new.mask_id is not None and old.mask_id is not None:
        weight[new.mask_id] = theirs[old.mask_id]
    return weight


def _is_same_head(mine: Head, theirs: Head) -> bool:
    """Return whether the rows of the output matrices of two heads have the same meaning."""
    return (
        type(mine) is type(theirs)
        and mine.kind == theirs.kind
        and mine.parameterization == theirs.parameterization
    )


def _has_token_rows(head: Head) -> bool:
    """Return whether each row of the head's output matrix yields the logit of one token."""
    return isinstance(head, TokenHead) or (isinstance(head, TreeHead) and head.kind == "tied")


def _transfer_head(mine: TokenHead | TreeHead, source: TrainedWeights) -> dict[str, Tensor]:
    """Build the output matrix and bias of the head `mine` from a head with one row per token.

    `source` contains the weights of the old head. The output matrix has one row per tree node: the
    mean of the old rows of the tokens below the node. The bias of a node is the log-sum-exp of the
    biases of these tokens. The rows of single tokens are copied, so the predicted distribution over
    the tokens of one lowest-level node is the same as with the old head.
    """
    # Rows of the old head, sorted by token id.
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
    """Return the tree node of each row of the head's output matrix, for the rows of `level`.

    The result is a tensor [n] for the n nodes of the level. Nodes are numbered from 0 within the
    level. At level 0 the nodes are the tokens.
    """
    vocabulary = head.vocabulary
    # A tree head stores the nodes of a subtree in consecutive rows.
    if isinstance(head, TreeHead):
        return vocabulary.order(level) - vocabulary.offsets[level]
    return torch.arange(vocabulary.num_tokens)


def _logsumexp_tokens(values: Tensor, vocabulary: Vocabulary, level: int) -> Tensor:
    """Return the log-sum-exp of `values` over the tokens below each tree node of a level.

    `values` [V] has one value per token. The result is a tensor [n] for the n nodes of `level`.
    """
    tokens = torch.arange(vocabulary.num_tokens)
    index = vocabulary.ancestor(tokens, level) - vocabulary.offsets[level]
    size = vocabulary.level_sizes[level]
    return segment_logsumexp(values.unsqueeze(0), index, size).squeeze(0)
