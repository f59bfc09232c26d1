"""Vocabularies: ids, tree look-ups, fingerprints, files, and invalid arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given, settings
from random_trees import Parents, below, forward_step, parent_lists, trees
from safetensors.torch import save

import ddiff.core.vocabulary as module
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.errors import ArgumentError, DataError

many = settings(max_examples=60, deadline=None)


@given(parent_lists())
@many
def test_state_ids_are_tokens_then_levels_then_root(parents: Parents) -> None:
    tree = HierarchicalVocabulary(parents)
    sizes = [len(level) for level in parents]
    top = max(parents[-1]) + 1
    assert tree.level_sizes == ((*sizes, 1) if top == 1 else (*sizes, top, 1))
    assert tree.num_levels == len(tree.level_sizes) - 1
    assert tree.num_states == sum(tree.level_sizes)
    assert tree.mask_id == tree.root == tree.num_states - 1
    for level, (offset, size) in enumerate(zip(tree.offsets, tree.level_sizes)):
        assert tree.level_of(torch.arange(offset, offset + size)).tolist() == [level] * size


@given(trees())
@many
def test_ancestor_equals_repeated_parent(tree: HierarchicalVocabulary) -> None:
    for id_ in range(tree.num_states):
        path, node = forward_step(tree, id_), torch.tensor(id_)
        level = tree.num_levels + 1 - len(path)
        assert [int(tree.ancestor(node, l)) for l in range(level, tree.num_levels + 1)] == path
        assert int(tree.parent(node)) == path[min(1, len(path) - 1)]
        assert all(int(tree.ancestor(node, l)) == -1 for l in range(level))


@given(trees())
@many
def test_descendants_of_a_node_at_one_level_are_contiguous_in_tree_order(
    tree: HierarchicalVocabulary,
) -> None:
    ids = torch.arange(tree.num_states)
    for level in range(tree.num_levels + 1):
        order, position = tree.order(level), tree.position(level)
        first = tree.offsets[level]
        assert sorted(order.tolist()) == list(range(first, first + tree.level_sizes[level]))
        assert torch.equal(position[order - first], torch.arange(len(order)))
        start, stop = tree.node_range(ids, level)
        for id_ in ids.tolist():
            owned = order[int(start[id_]) : int(stop[id_])].tolist()
            assert len(owned) == len(set(owned))
            assert set(owned) == below(tree, id_, level)


@given(trees())
@many
def test_vocabulary_order_sorts_ids_by_their_path_from_the_root(
    tree: HierarchicalVocabulary,
) -> None:
    """Heads store their tables in this order, so checkpoints depend on the order."""
    for level in range(tree.num_levels + 1):
        order = tree.order(level).tolist()
        assert order == sorted(order, key=lambda id_: forward_step(tree, id_)[::-1])


@given(trees())
@many
def test_children_of_a_node_are_its_descendants_one_level_down(
    tree: HierarchicalVocabulary,
) -> None:
    for id_ in range(tree.num_states):
        level = int(tree.level_of(torch.tensor(id_)))
        children = tree.children(id_).tolist()
        assert int(tree.num_children(torch.tensor(id_))) == len(children)
        if level == 0:
            assert children == []
        else:
            assert set(children) == below(tree, id_, level - 1)
            assert children == [c for c in tree.order(level - 1).tolist() if c in children]


def test_vocabulary_lookups_keep_shape_and_accept_a_level_per_id() -> None:
    tree = HierarchicalVocabulary([[0, 1, 0], [0, 0]])
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert tree.level_of(ids).tolist() == [[0, 0, 0], [1, 1, 2]]
    assert tree.ancestor(ids, torch.tensor([[0, 1, 2], [1, 2, 2]])).tolist() == [
        [0, 4, 5],
        [3, 5, 5],
    ]
    start, stop = tree.node_range(ids, 0)
    assert start.shape == stop.shape == ids.shape


def test_flat_vocabulary_with_mask_is_tree_of_one_level() -> None:
    flat, tree = FlatVocabulary(3), HierarchicalVocabulary([[0, 0, 0]])
    assert (flat.num_levels, flat.level_sizes, flat.mask_id) == (1, (3, 1), 3)
    assert flat.fingerprint == tree.fingerprint
    assert flat.children(3).tolist() == [0, 1, 2]


def test_flat_vocabulary_without_mask_has_no_root_state() -> None:
    bare = FlatVocabulary(3, mask=False)
    assert (bare.num_levels, bare.num_states, bare.mask_id, bare.root) == (0, 3, None, 3)
    assert bare.level_of(torch.arange(4)).tolist() == [0, 0, 0, 1]
    assert bare.parent(torch.arange(4)).tolist() == [3, 3, 3, 3]
    assert bare.num_children(torch.arange(4)).tolist() == [0, 0, 0, 3]
    assert bare.children(3).tolist() == [0, 1, 2]
    start, stop = bare.node_range(torch.arange(4), 0)
    assert start.tolist() == [0, 1, 2, 0]
    assert stop.tolist() == [1, 2, 3, 3]


def test_hierarchical_vocabulary_adds_a_root_only_if_missing() -> None:
    assert HierarchicalVocabulary([[0, 1, 0]]).level_sizes == (3, 2, 1)
    assert HierarchicalVocabulary([[0, 1, 0], [0, 0]]).level_sizes == (3, 2, 1)


# ---------------------------------------------------------------------- labels


def test_vocabulary_from_labels_has_a_node_for_each_distinct_path() -> None:
    labels = {
        "run": ("verb", "open"),
        "red": ("colour", "open"),
        "of": ("verb", "closed"),
        "walk": ("verb", "open"),
    }
    tree = HierarchicalVocabulary.from_labels(list(labels), labels.__getitem__)
    assert tree.level_sizes == (
        4,
        3,
        2,
        1,
    )  # "verb" under "open" and "verb" under "closed" are two nodes
    near = tree.ancestor(torch.arange(4), 1).tolist()
    assert near[0] == near[3]
    assert len({near[0], near[1], near[2]}) == 3
    far = tree.ancestor(torch.arange(4), 2).tolist()
    assert far[0] == far[1] == far[3] != far[2]


def test_vocabulary_from_string_labels_has_one_level_of_clusters() -> None:
    tree = HierarchicalVocabulary.from_labels(["a", "1", "b"], str.isalpha)
    assert tree.level_sizes == (3, 2, 1)
    assert tree.ancestor(torch.arange(3), 1).tolist() == [3, 4, 3]


@pytest.mark.parametrize("label", [lambda token: ("x",) * len(token), lambda token: ()])
def test_vocabulary_from_labels_rejects_ragged_or_empty_labels(
    label: Callable[[str], tuple[str, ...]],
) -> None:
    with pytest.raises(
        ArgumentError, match=r"from_labels: label must name the same number of groups.*depths \["
    ):
        HierarchicalVocabulary.from_labels(["a", "bb"], label)


# ---------------------------------------------------------------------- invalid arguments


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([], "parents must hold at least one level"),
        ([[]], r"parents\[0\] must be a non-empty list of integers"),
        ([[0.0, 1.0]], r"parents\[0\] must be a non-empty list of integers; got torch.float32"),
        ([[[0, 1]]], r"of shape \(1, 2\)"),
        ([[0, -1]], r"parents\[0\] must be >= 0; got -1"),
        ([[0, 2]], r"node 1 of level 1 has no child in parents\[0\]"),
        ([[0, 1], [0]], r"parents\[0\] names 2 nodes, but parents\[1\] has 1 entries"),
        ([[0, 1], [0, 0, 0]], r"parents\[0\] names 2 nodes, but parents\[1\] has 3 entries"),
    ],
)
def test_hierarchical_vocabulary_rejects_parents_that_form_no_tree(
    parents: Parents, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        HierarchicalVocabulary(parents)


def test_flat_vocabulary_rejects_zero_tokens() -> None:
    with pytest.raises(ArgumentError, match="num_tokens must be at least 1; got 0"):
        FlatVocabulary(0)


@pytest.mark.parametrize("rows", [[3], [2, 2], [2, 1, 1]])
def test_vocabulary_rejects_centroids_with_wrong_number_of_rows(rows: list[int]) -> None:
    with pytest.raises(ArgumentError, match="one row per node of that level"):
        HierarchicalVocabulary([[0, 1, 1]], centroids=[torch.zeros(n, 2) for n in rows])


def test_vocabulary_copies_the_tensors_of_the_caller() -> None:
    mine = torch.tensor([0, 1, 0])
    tree = HierarchicalVocabulary([mine])
    mine[0] = 1
    assert tree.parents[0].tolist() == [0, 1, 0]


# ---------------------------------------------------------------------- fingerprints


def test_vocabulary_fingerprint_depends_only_on_the_tree_and_is_stable() -> None:
    tree = HierarchicalVocabulary([[0, 1, 0], [0, 0]])
    assert (
        tree.fingerprint == "e2dfc7c2d7a902ba"
    )  # stored in checkpoints: a change here would reject all of them
    same = HierarchicalVocabulary(
        [torch.tensor([0, 1, 0], dtype=torch.int32)], [torch.zeros(2, 3)], "tok"
    )
    assert same.fingerprint == tree.fingerprint


@given(parent_lists(), parent_lists())
@many
def test_vocabularies_of_different_trees_have_different_fingerprints(
    one: Parents, other: Parents
) -> None:
    first, second = HierarchicalVocabulary(one), HierarchicalVocabulary(other)
    same = [p.tolist() for p in first.parents] == [p.tolist() for p in second.parents]
    assert (first.fingerprint == second.fingerprint) == same


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "vocabulary",
    [
        FlatVocabulary(4, tokenizer_fingerprint="tok"),
        FlatVocabulary(4, mask=False),
        FlatVocabulary(1),
        HierarchicalVocabulary([[0, 1, 0], [0, 0]]),
        HierarchicalVocabulary(
            [[1, 0, 2, 1], [0, 1, 0]], [None, torch.arange(4.0).reshape(2, 2)], "tok"
        ),
        HierarchicalVocabulary([[0, 0]], [torch.ones(1, 2)]),
    ],
    ids=repr,
)
def test_vocabulary_save_and_load_round_trip(vocabulary: Vocabulary) -> None:
    path = f"memory://vocabularies/{vocabulary.fingerprint}/vocabulary.safetensors"
    vocabulary.save(path)
    again = Vocabulary.load(path)
    assert type(again) is type(vocabulary)
    assert (again.fingerprint, again.tokenizer_fingerprint) == (
        vocabulary.fingerprint,
        vocabulary.tokenizer_fingerprint,
    )
    assert (again.level_sizes, again.mask_id) == (vocabulary.level_sizes, vocabulary.mask_id)
    assert (again.centroids is None) == (vocabulary.centroids is None)
    for saved, loaded in zip(vocabulary.centroids or (), again.centroids or (), strict=True):
        assert loaded is saved if saved is None else torch.equal(loaded, saved)


def test_failed_vocabulary_save_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "new" / "folder" / "vocabulary.safetensors")
    FlatVocabulary(4).save(path)
    monkeypatch.setattr(module, "save_safetensors", lambda tensors, metadata: 7)
    with pytest.raises(TypeError):
        FlatVocabulary(5).save(path)
    assert Vocabulary.load(path).num_tokens == 4


def _written(content: bytes) -> str:
    path = "memory://damaged/vocabulary.safetensors"
    with fsspec.open(path, "wb") as file:
        file.write(content)
    return path


def _saved(tree: Vocabulary) -> bytes:
    tree.save("memory://damaged/whole.safetensors")
    with fsspec.open("memory://damaged/whole.safetensors", "rb") as file:
        return file.read()


def test_vocabulary_load_raises_an_error_that_names_a_missing_file() -> None:
    with pytest.raises(DataError, match="memory://nowhere does not exist"):
        Vocabulary.load("memory://nowhere")


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_vocabulary_load_rejects_truncated_file(kept: int) -> None:
    content = _saved(HierarchicalVocabulary([[0, 1, 0]]))
    with pytest.raises(DataError, match="not a complete vocabulary file"):
        Vocabulary.load(_written(content[:kept]))


def test_vocabulary_load_rejects_safetensors_without_a_vocabulary() -> None:
    for metadata in (None, {"format": "pt"}):
        with pytest.raises(DataError, match="not a complete vocabulary file"):
            Vocabulary.load(_written(save({"weight": torch.zeros(2)}, metadata)))


def test_vocabulary_load_rejects_changed_tree() -> None:
    content = bytearray(_saved(HierarchicalVocabulary([[0, 1, 0, 1]])))
    where = content.rindex(torch.tensor([0, 1, 0, 1]).numpy().tobytes())
    content[where] = 1
    with pytest.raises(
        DataError, match=r"has fingerprint \w+, but the file names \w+: it was damaged"
    ):
        Vocabulary.load(_written(bytes(content)))
    content[where] = 7  # no tree at all
    with pytest.raises(DataError, match="not a complete vocabulary file"):
        Vocabulary.load(_written(bytes(content)))
