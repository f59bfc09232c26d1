"""Embedding of all states of a vocabulary: tokens, the mask and the nodes of a tree."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddiff.core.vocabulary import Vocabulary


class StateEmbedding(nn.Embedding):
    """Embedding of tokens, mask and nodes of a tree: ids [...] -> [...,width].

    The rows of tokens are initialized from a normal distribution with standard deviation
    width^-1/2. The row of a node is initialized from the rows of the tokens below it (see
    `init_nodes`).
    """

    is_table = True  # Muon, an optimizer for hidden matrices, must not update this parameter

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        super().__init__(vocabulary.num_states, width)
        self.vocabulary = vocabulary
        nn.init.normal_(self.weight, std=width**-0.5)
        init_nodes(self.weight, vocabulary)

    @torch.no_grad()
    def start_from_tokens(self, tokens: Tensor) -> None:
        """Set the rows of the V tokens to `tokens` [V,width], and initialize the nodes again."""
        self.weight[: self.vocabulary.num_tokens] = tokens.to(self.weight)
        init_nodes(self.weight, self.vocabulary)


@torch.no_grad()
def init_nodes(weight: Tensor, vocabulary: Vocabulary) -> None:
    """Initialize the rows of the nodes of a tree in an embedding `weight` [S,d], in place.

    The nodes include the root, which is the mask. If the vocabulary has cluster centroids with d
    channels, the row of a node is its centroid; centroids and token embeddings must then be in the
    same space. Otherwise the row of a node is the mean of the rows of its tokens
    (arXiv 2510.08632).
    """
    if weight.is_meta:  # a meta tensor has no values to compute
        return
    num_tokens = vocabulary.num_tokens
    tokens = torch.arange(num_tokens, device=weight.device)
    for level in range(1, vocabulary.num_levels + 1):
        first = vocabulary.offsets[level]
        size = vocabulary.level_sizes[level]
        centroid = vocabulary.centroids[level - 1] if vocabulary.centroids else None
        if centroid is not None and centroid.shape[-1] == weight.shape[-1]:
            weight[first : first + size] = centroid.to(weight)
            continue
        index = vocabulary.ancestor(tokens, level) - first
        sums = weight.new_zeros(size, weight.shape[-1])
        sums = sums.index_add(0, index, weight[:num_tokens])
        count = torch.bincount(index, minlength=size).unsqueeze(-1)
        weight[first : first + size] = sums / count.to(weight)
