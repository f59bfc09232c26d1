"""Random trees for hypothesis, and slow reference implementations of tree look-ups."""

from __future__ import annotations

from hypothesis import strategies as st

from ddiff.core.vocabulary import HierarchicalVocabulary, Vocabulary

Parents = list[list[int]]


@st.composite
def parent_lists(draw: st.DrawFn, max_tokens: int = 9, max_levels: int = 3) -> Parents:
    """Return parents of 1 to max_tokens tokens in trees of 1 to max_levels levels.

    Trees are in random order, may have nodes with a single child, and have no added root.
    """
    size, levels = draw(st.integers(1, max_tokens)), []
    for _ in range(draw(st.integers(1, max_levels))):
        labels = draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size))
        named = draw(st.permutations(sorted(set(labels))))
        levels.append([named.index(label) for label in labels])
        size = len(named)
    return levels


def trees(max_tokens: int = 9, max_levels: int = 3) -> st.SearchStrategy[HierarchicalVocabulary]:
    return parent_lists(max_tokens, max_levels).map(HierarchicalVocabulary)


def forward_step(tree: Vocabulary, node: int) -> list[int]:
    """Return the ids from a node up to the root, starting at the node, by following `parents`."""
    level = next(l for l in reversed(range(tree.num_levels + 1)) if tree.offsets[l] <= node)
    path, index = [node], node - tree.offsets[level]
    for above in range(level, tree.num_levels):
        index = int(tree.parents[above][index])
        path.append(tree.offsets[above + 1] + index)
    return path


def below(tree: Vocabulary, node: int, level: int) -> set[int]:
    """Return the ids at `level` below a node; at the level of the node, return the node."""
    first = tree.offsets[level]
    return {
        id_
        for id_ in range(first, first + tree.level_sizes[level])
        if node in forward_step(tree, id_)
    }
