"""Embeddings of all states: the words, and nodes that start where their words are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddiff.core.vocabulary import Vocabulary


class StateEmbedding(nn.Embedding):
    """ids [...] of any level -> [..., width]. Words start normal with deviation width^-1/2, nodes from their words."""

    is_table = True  # an optimizer for hidden matrices (Muon) must leave this parameter alone

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        super().__init__(vocabulary.num_states, width)
        self.vocabulary = vocabulary
        nn.init.normal_(self.weight, std=width**-0.5)
        initialise_nodes(self.weight, vocabulary)

    @torch.no_grad()
    def start_from_tokens(self, words: Tensor) -> None:
        """Set the words' rows to `words` [V,width], and the nodes from them."""
        self.weight[: self.vocabulary.num_tokens] = words.to(self.weight)
        initialise_nodes(self.weight, self.vocabulary)


@torch.no_grad()
def initialise_nodes(weight: Tensor, vocabulary: Vocabulary) -> None:
    """Set the rows of all nodes, the root included, in `weight` [S,d], from the rows of the words.

    A level takes the vocabulary's centroids where they are d wide (they must live in the words' space then), else each
    node the mean of its words (arXiv 2510.08632).
    """
    if weight.is_meta:  # shapes are all that is wanted
        return
    words = torch.arange(vocabulary.num_tokens, device=weight.device)
    for level in range(1, vocabulary.num_levels + 1):
        first, size = vocabulary.offsets[level], vocabulary.level_sizes[level]
        centroid = vocabulary.centroids[level - 1] if vocabulary.centroids else None
        if centroid is not None and centroid.shape[-1] == weight.shape[-1]:
            weight[first : first + size] = centroid.to(weight)
        else:
            index = vocabulary.ancestor(words, level) - first
            sums = weight.new_zeros(size, weight.shape[-1]).index_add(
                0, index, weight[: vocabulary.num_tokens]
            )
            weight[first : first + size] = sums / torch.bincount(index, minlength=size).unsqueeze(
                -1
            ).to(weight)
