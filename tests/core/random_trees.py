"""Random trees for hypothesis, and slow reference implementations of tree look-ups."""

from __future__ import annotations

from hypothesis import strategies as st

from ddiff.core.vocabulary import HierarchicalVocabulary, Vocabulary

Parents = list[list[int]]


@st.composite
def parent_lists(draw: st.DrawFn, max_tokens: int = 9, max_levels: int = 3) -> Parents:
    """Strategy for trees of 1 to max_tokens tokens and 1 to max_levels levels, as lists of parents.

    Entry i of list l is the parent, on level l + 1, of node i on level l. Children of a node have
    scattered ids, a node may have a single child, and the lists contain no common root.
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
    """Return the ids on the path from a node to the root, including both, by following parents."""
    level = next(l for l in reversed(range(tree.num_levels + 1)) if tree.offsets[l] <= node)
    path, index = [node], node - tree.offsets[level]
    for above in range(level, tree.num_levels):
        index = int(tree.parents[above][index])
        path.append(tree.offsets[above + 1] + index)
    return path


def below(tree: Vocabulary, node: int, level: int) -> set[int]:
    """Return the set of descendants of a node at `level`, or the node itself at its own level."""
    first = tree.offsets[level]
    return {
        id_
        for id_ in range(first, first + tree.level_sizes[level])
        if node in forward_step(tree, id_)
    }
