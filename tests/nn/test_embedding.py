"""Initial embeddings of tree nodes are computed from those of their tokens."""

from __future__ import annotations

import torch
from dense_heads import TREES

from ddiff.core.vocabulary import HierarchicalVocabulary
from ddiff.nn.embedding import StateEmbedding, init_nodes


def test_node_embeddings_start_at_the_mean_of_their_tokens() -> None:
    for vocabulary in TREES.values():
        weight = StateEmbedding(vocabulary, 8).weight
        assert weight.shape == (vocabulary.num_states, 8)
        words = torch.arange(vocabulary.num_tokens)
        for node in range(vocabulary.num_tokens, vocabulary.num_states):
            level = int(vocabulary.level_of(torch.tensor(node)))
            below = words[vocabulary.ancestor(words, level) == node]
            torch.testing.assert_close(
                weight[node], weight[below].mean(0)
            )  # float32 sums in another order


def test_node_embeddings_start_from_centroids_of_equal_width() -> None:
    centroids = [torch.randn(2, 4), torch.randn(1, 3)]
    vocabulary = HierarchicalVocabulary([[0, 1, 1], [0, 0]], centroids=centroids)
    weight = torch.randn(vocabulary.num_states, 4)
    words = weight[:3].clone()
    init_nodes(weight, vocabulary)
    assert torch.equal(weight[:3], words)
    assert torch.equal(weight[3:5], centroids[0])
    torch.testing.assert_close(weight[5], words.mean(0))


def test_state_embedding_is_marked_as_embedding_table_for_the_optimizer() -> None:
    assert StateEmbedding(TREES["words"], 4).is_table
