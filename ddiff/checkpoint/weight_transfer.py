"""Fine-tuning: another run's weights as the first weights of this one.

Tensors that do not stand on the vocabulary are taken as they are. Where the vocabulary is another one on the same
tokenizer, tables of states and words are taken word by word: an embedding of a node starts from its words, the mask's from
the old mask. A head whose rows mean something else starts anew.
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


class Source(NamedTuple):
    """A trained run: where it is, its weights by name, what they stand on."""

    place: str
    weights: Mapping[str, Tensor]
    vocabulary: Vocabulary
    head: Head


class Carried(NamedTuple):
    """The new weights by name, and the names of those taken `whole`, `by_word`, and those that start `anew`."""

    weights: dict[str, Tensor]
    whole: list[str]
    by_word: list[str]
    anew: list[str]


@torch.no_grad()
def carried(denoiser: Denoiser, source: Source, parts: Parts) -> Carried:
    """What `denoiser` starts with: all that `source` has, or its embeddings of states alone.

    Raises CheckpointError when tensors that are due are missing there or have another shape.
    """
    own, vocabulary = denoiser.state_dict(), denoiser.head.vocabulary
    parts_of_it = denoiser.backbone.named_modules(prefix="backbone")
    states = [f"{name}.weight" for name, part in parts_of_it if isinstance(part, StateEmbedding)]
    head = [name for name in own if name.startswith("head.")]
    if parts == "embeddings" and not states:
        raise CheckpointError(
            f'[train] init parts = "embeddings": {type(denoiser.backbone).__name__} has no StateEmbedding to fill. '
            'Take parts = "all".'
        )
    taken = states if parts == "embeddings" else [name for name in own if name not in head]
    _check(own, source, taken, states)
    if parts == "all":
        _check_nothing_else(own, source)
    same = vocabulary.fingerprint == source.vocabulary.fingerprint
    weights = {
        name: source.weights[name].to(own[name]) for name in taken if same or name not in states
    }
    by_word = (
        {}
        if same
        else {name: _states(source.weights[name], source.vocabulary, vocabulary) for name in states}
    )
    if parts == "all":
        if _same_head(denoiser.head, source.head, same):
            _check(own, source, head)
            weights |= {name: source.weights[name].to(own[name]) for name in head}
        elif _speaks_of_words(source.head) and isinstance(denoiser.head, TokenHead | TreeHead):
            by_word |= _head(denoiser.head, source)
    anew = [name for name in own if name not in weights and name not in by_word]
    return Carried({**own, **weights, **by_word}, list(weights), list(by_word), anew)


def _check(
    own: Mapping[str, Tensor], source: Source, names: Sequence[str], states: Sequence[str] = ()
) -> None:
    """Raises CheckpointError unless `names` are there; tables of states may have other rows, not another width."""
    faults = []
    for name in names:
        if name not in source.weights:
            faults.append(f"{name} is not there")
            continue
        theirs, mine = source.weights[name].shape, own[name].shape
        if theirs[1:] != mine[1:] if name in states else theirs != mine:
            faults.append(f"{name} has shape {list(theirs)} there and {list(mine)} here")
    _refuse(faults, source)


def _check_nothing_else(own: Mapping[str, Tensor], source: Source) -> None:
    others = [name for name in source.weights if name not in own and not name.startswith("head.")]
    _refuse([f"{name} has no place here" for name in others], source)


def _refuse(faults: list[str], source: Source) -> None:
    if faults:
        more = f" and {len(faults) - 3} more differences" if len(faults) > 3 else ""
        raise CheckpointError(
            f"[train] init: the weights of {source.place} do not fit this denoiser: {'; '.join(faults[:3])}{more}. "
            'Give [denoiser] the sizes of that run, or take parts = "embeddings".'
        )


def _means(rows: Tensor, vocabulary: Vocabulary, level: int) -> Tensor:
    """[n_l,d] the mean over the words of each node of rows [V,d]."""
    index = (
        vocabulary.ancestor(torch.arange(vocabulary.num_tokens), level) - vocabulary.offsets[level]
    )
    sums = rows.new_zeros(vocabulary.level_sizes[level], rows.shape[1]).index_add(0, index, rows)
    return sums / torch.bincount(index, minlength=len(sums)).unsqueeze(-1).to(rows)


def _states(theirs: Tensor, old: Vocabulary, new: Vocabulary) -> Tensor:
    """[S,d] embeddings of states: words by word, nodes from their words, the mask from the old mask."""
    words = theirs[: new.num_tokens]
    weight = torch.cat([_means(words, new, level) for level in range(new.num_levels + 1)])
    if new.mask_id is not None and old.mask_id is not None:
        weight[new.mask_id] = theirs[old.mask_id]
    return weight


def _same_head(mine: Head, theirs: Head, same_vocabulary: bool) -> bool:
    kinds = [
        (type(head), getattr(head, "kind", None), getattr(head, "reading", None))
        for head in (mine, theirs)
    ]
    return same_vocabulary and kinds[0] == kinds[1]


def _speaks_of_words(head: Head) -> bool:
    """Whether a row of the table is a word's logit among all words."""
    return isinstance(head, TokenHead) or (isinstance(head, TreeHead) and head.kind == "tied")


def _head(mine: TokenHead | TreeHead, source: Source) -> dict[str, Tensor]:
    """A head from one that speaks of words: their rows as they are, a node's the mean, its bias the log of the sum.

    The law of the words below a node of the lowest level is then the one that the old head had there.
    """
    words = torch.argsort(_nodes(source.head, 0))
    table, bias = source.weights["head.table"][words], source.weights["head.bias"][words]
    tables, biases = [], []
    for level in range(getattr(mine, "levels", 1)):
        nodes = _nodes(mine, level)
        tables.append(_means(table, mine.vocabulary, level)[nodes])
        biases.append(_log_sums(bias, mine.vocabulary, level)[nodes])
    return {"head.table": torch.cat(tables), "head.bias": torch.cat(biases)}


def _nodes(head: Head, level: int) -> Tensor:
    """[n_l] which node of a level each row of the head's table speaks of, counted from the level's first."""
    vocabulary = head.vocabulary
    if isinstance(head, TreeHead):
        return vocabulary.order(level) - vocabulary.offsets[level]
    return torch.arange(vocabulary.num_tokens)


def _log_sums(values: Tensor, vocabulary: Vocabulary, level: int) -> Tensor:
    """[n_l] log of the sum of exp(values [V]) over the words of each node."""
    words = torch.arange(vocabulary.num_tokens)
    index = vocabulary.ancestor(words, level) - vocabulary.offsets[level]
    return segment_logsumexp(values.unsqueeze(0), index, vocabulary.level_sizes[level]).squeeze(0)
