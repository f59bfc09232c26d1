"""Trees of unusual shapes, and a dense reference implementation of each head."""

from __future__ import annotations

import torch
from torch import Tensor

from ddiff.core.prediction import DenseDistribution
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.nn.heads import Head, TokenHead, TreeHead

TREES: dict[str, Vocabulary] = {
    "words": FlatVocabulary(6, mask=False),
    "one level": FlatVocabulary(6),
    # nodes of unequal sizes, whose tokens have scattered ids; node 2 has a single child
    "two levels": HierarchicalVocabulary([[1, 0, 3, 1, 2, 0, 1, 3, 1]]),
    "three levels": HierarchicalVocabulary([[3, 0, 1, 2, 0, 3, 4, 1, 3], [1, 0, 1, 2, 1]]),
    # a chain of single children: node 1 of level 3, node 1 of level 2, node 3 of level 1, token 4
    "four levels": HierarchicalVocabulary([[2, 0, 1, 2, 3, 0, 1, 2], [0, 2, 0, 1], [0, 1, 0]]),
}
KINDS = ("tokens", "tied", "levelwise")


def make_head(kind: str, vocabulary: Vocabulary, width: int = 5, scale: float = 1.0) -> Head:
    """Make a float64 head with a random table and bias, of standard deviation `scale`.

    kind: "tokens", "tied" or "levelwise". width: width of the hidden states.
    """
    head = TokenHead(vocabulary, width) if kind == "tokens" else TreeHead(vocabulary, width, kind)  # type: ignore[arg-type]
    head = head.double()
    with torch.no_grad():
        head.table.normal_(std=scale)
        head.bias.normal_(std=scale)
    return head


def dense_log_p(head: Head, hidden: Tensor) -> Tensor:
    """Return the log-distributions [n,V] that a head predicts for hidden states [n,width].

    All logits are computed at once, under plain autograd.
    """
    vocabulary = head.vocabulary
    logits = hidden @ head.table.t() + head.bias
    if isinstance(head, TokenHead):
        return logits.log_softmax(-1)
    if head.kind == "tied":
        return logits.log_softmax(-1)[:, vocabulary.position(0)]
    columns = []
    for word in range(vocabulary.num_tokens):
        node, total = word, hidden.new_zeros(len(hidden))
        for level in range(max(vocabulary.num_levels, 1)):
            parent = (
                vocabulary.root
                if level + 1 >= vocabulary.num_levels
                else int(vocabulary.parent(torch.tensor(node)))
            )
            siblings = [row_of(vocabulary, int(child)) for child in vocabulary.children(parent)]
            total = total + logits[:, row_of(vocabulary, node)] - logits[:, siblings].logsumexp(-1)
            node = parent
        columns.append(total)
    return torch.stack(columns, -1)


def row_of(vocabulary: Vocabulary, node: int) -> int:
    """Return the row of a state in the table of a level-wise head.

    The rows of a level are sorted by their path from the root.
    """
    level = int(vocabulary.level_of(torch.tensor(node)))
    return vocabulary.offsets[level] + int(
        vocabulary.position(level)[node - vocabulary.offsets[level]]
    )


def dense_distribution(head: Head, hidden: Tensor) -> DenseDistribution:
    return DenseDistribution(dense_log_p(head, hidden), head.vocabulary)


def random_nodes(vocabulary: Vocabulary, rows: int, generator: torch.Generator) -> Tensor:
    """Return random nodes [rows] above the tokens; 30 % of the rows are the root."""
    nodes = torch.arange(vocabulary.num_tokens, vocabulary.root + 1)
    picked = torch.randint(len(nodes), (rows,), generator=generator)
    return nodes[torch.where(torch.rand(rows, generator=generator) < 0.3, len(nodes) - 1, picked)]


def random_token_below(vocabulary: Vocabulary, node: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random token below each node of `node` [n], as a tensor [n]."""
    start, stop = vocabulary.node_range(node, 0)
    place = start + (torch.rand(len(node), generator=generator) * (stop - start)).long()
    return vocabulary.order(0)[place]
