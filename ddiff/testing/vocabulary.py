"""Conformance checks of a vocabulary: its tables must describe one tree.

A vocabulary is a tree whose leaves, at level 0, are the tokens. "Tree order" is an order of the ids
of a level in which the ids below any higher node are contiguous.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ddiff.core.vocabulary import Vocabulary
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law


@law("vocabulary: ids are numbered level by level", tolerance=0.0)
def ids_run_by_level(vocabulary: Vocabulary) -> Iterator[Gap]:
    """Check that ids are numbered level by level, from the leaf tokens to the root.

    The first `level_sizes[0]` ids must have level 0, the next `level_sizes[1]` ids level 1, and so
    on. The root must be the last id, the only node of its level, and the mask token. Tolerance 0:
    ids are integers.
    """
    sizes = torch.tensor(vocabulary.level_sizes)
    levels = torch.repeat_interleave(
        torch.arange(vocabulary.num_levels + 1),
        sizes,
    )
    ids = torch.arange(vocabulary.num_states)
    yield compare(
        vocabulary.level_of(ids),
        levels.double(),
        {"id": ids},
    )
    num_states = float(vocabulary.num_states)
    yield compare(
        sizes.sum(),
        num_states,
        {"sizes": vocabulary.level_sizes},
    )
    if vocabulary.num_levels:
        # -1 if there is no mask; then the comparison with the root fails
        mask = torch.tensor(vocabulary.mask_id or -1)
        yield compare(sizes[-1], 1.0, {"size of": "the last level"})
        yield compare(mask, num_states - 1.0, {"mask_id": "the root"})


@law("vocabulary: ancestors follow parents", tolerance=0.0)
def ancestors_follow_parents(vocabulary: Vocabulary) -> Iterator[Gap]:
    """Check that `ancestor`, `parent` and `level_of` describe one tree.

    At its own level, the ancestor of an id must be the id. The ancestor at level l + 1 must be the
    parent of the ancestor at level l, and `level_of` must return l + 1 for it. Tolerance 0: ids are
    integers.
    """
    ids = torch.arange(vocabulary.num_states)
    own = vocabulary.level_of(ids)
    yield compare(
        vocabulary.ancestor(ids, own),
        ids.double(),
        {"id": ids},
    )
    for level in range(vocabulary.num_levels):
        below = ids[own <= level]
        above = vocabulary.ancestor(below, level + 1)
        parent = vocabulary.parent(vocabulary.ancestor(below, level))
        yield compare(
            above,
            parent.double(),
            {"id": below, "level": level},
        )
        labels = {"id": below, "level of its ancestor at": level + 1}
        yield compare(vocabulary.level_of(above), level + 1.0, labels)


@law("vocabulary: in tree order every node covers a contiguous range", tolerance=0.0)
def ranges_are_contiguous(vocabulary: Vocabulary) -> Iterator[Gap]:
    """Check that node_range(node, l) is the range of the ids of level l below a node.

    order(l) lists the ids of level l in tree order, in which the ids below any node are contiguous.
    node_range(node, l) is a range of indices of this list. The ids in the range must be exactly the
    ids below the node, and at least one. order(l) must be a permutation of the ids of level l, and
    position(l) must be the inverse of order(l). Tolerance 0: ids are integers.
    """
    for level in range(vocabulary.num_levels + 1):
        yield from _order_gaps(vocabulary, level)
        yield from _range_gaps(vocabulary, level)


def _order_gaps(
    vocabulary: Vocabulary,
    level: int,
) -> Iterator[Gap]:
    order = vocabulary.order(level)
    position = vocabulary.position(level)
    ids = vocabulary.offsets[level] + torch.arange(vocabulary.level_sizes[level])
    yield compare(
        order.sort().values,
        ids.double(),
        {"order of level": level},
    )
    yield compare(
        order[position],
        ids.double(),
        {"id": ids, "position at level": level},
    )


def _range_gaps(
    vocabulary: Vocabulary,
    level: int,
) -> Iterator[Gap]:
    nodes = torch.arange(vocabulary.num_states)
    nodes = nodes[vocabulary.level_of(nodes) >= level]
    order = vocabulary.order(level)
    start, stop = vocabulary.node_range(nodes, level)
    place = torch.arange(len(order))
    inside = (place >= start.unsqueeze(-1)) & (place < stop.unsqueeze(-1))  # [nodes, ids]
    node_level = vocabulary.level_of(nodes).unsqueeze(-1)
    below = vocabulary.ancestor(order.unsqueeze(0), node_level) == nodes.unsqueeze(-1)
    yield compare(
        inside.double(),
        below.double(),
        {"node": nodes, "level": level},
    )
    yield compare(
        inside.any(-1).double(),
        1.0,
        {"non-empty range of node": nodes, "level": level},
    )
    whole = torch.stack(vocabulary.node_range(torch.tensor(vocabulary.root), level))
    expected = torch.tensor([0.0, len(order)])
    yield compare(whole, expected, {"range of the root at level": level})


@law("vocabulary: children = inverse of parent", tolerance=0.0)
def children_invert_parent(vocabulary: Vocabulary) -> Iterator[Gap]:
    """Check that children(node) lists exactly the ids whose parent is the node.

    num_children(node) must be the length of the list. Tolerance 0: ids are integers.
    """
    ids = torch.arange(vocabulary.num_states)
    for node in ids.tolist():
        # the root is its own parent
        expected = ids[(vocabulary.parent(ids) == node) & (ids != node)]
        listed = vocabulary.children(node).sort().values
        count = vocabulary.num_children(torch.tensor(node))
        yield compare(
            count,
            float(len(expected)),
            {"num_children of": node},
        )
        yield compare(
            torch.tensor(len(listed)),
            float(len(expected)),
            {"children of": node},
        )
        if len(listed) == len(expected):
            yield compare(listed, expected.double(), {"children of": node})


@law("vocabulary: saving and loading preserve the tree", tolerance=0.0)
def survives_saving(vocabulary: Vocabulary) -> Iterator[Gap]:
    """Check that saving and loading a vocabulary preserves its fingerprints (hashes) and parents.

    Tolerance 0: fingerprints and ids are exact.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "vocabulary.safetensors")
        vocabulary.save(path)
        loaded = Vocabulary.load(path)
    same_tree = loaded.fingerprint == vocabulary.fingerprint
    same_tokenizer = loaded.tokenizer_fingerprint == vocabulary.tokenizer_fingerprint
    same = torch.tensor(float(same_tree and same_tokenizer))
    yield compare(same, 1.0, {"fingerprint after loading": loaded.fingerprint})
    ids = torch.arange(vocabulary.num_states)
    yield compare(
        loaded.parent(ids),
        vocabulary.parent(ids).double(),
        {"parent of": ids},
    )


VOCABULARY_LAWS: tuple[Law, ...] = (
    ids_run_by_level,
    ancestors_follow_parents,
    ranges_are_contiguous,
    children_invert_parent,
    survives_saving,
)


def check_vocabulary(vocabulary: Vocabulary) -> list[LawReport]:
    """Apply every conformance check of vocabularies to a small vocabulary.

    The vocabulary must be small because the checks loop over all nodes.
    """
    return evaluate_laws(vocabulary, VOCABULARY_LAWS)
