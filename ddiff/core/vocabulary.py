"""State spaces: the tokens, and any number of levels above them.

A vocabulary is a tree. Level 0 contains the V tokens in tokenizer order. A node of a higher level
represents a set of tokens. The last level contains only the root, which is the mask. A flat
vocabulary with a mask is a tree with one level above the tokens; without a mask it has only the
tokens. State ids are numbered level by level: tokens first, root last. "Tree order" is a
permutation of the nodes of a level in which the nodes below any higher node are contiguous.

    >>> tree = HierarchicalVocabulary([[0, 0, 1, 1], [0, 0]])     # four tokens, two nodes, one root
    >>> tree.level_sizes, tree.mask_id
    ((4, 2, 1), 6)
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any, final

import fsspec
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ddiff.atomic import write_atomic
from ddiff.core.numerics import Constant
from ddiff.errors import ArgumentError, DataError


class Vocabulary:
    """States of one position: tokens 0..V-1, then the nodes of each level, the root (= mask) last.

    Attributes:
        num_tokens: number of tokens, V.
        num_states: number of states, S.
        num_levels: number of levels above the tokens, L.
        level_sizes: number of nodes of each level, (V, n_1, ..., n_L).
        offsets: id of the first node of each level.
        mask_id: id of the root; None if L = 0.
        root: id of the root. If L = 0, it is the number S, which represents all tokens together
            and is not a state.
        parents: for each level below the root, the index of each node's parent in the next level.
        centroids: None, or a tuple that contains, for each level above the tokens, the centroids
            [n_l,d] of its nodes or None.
        fingerprint: hash of the tree.
        tokenizer_fingerprint: fingerprint of the tokenizer of these tokens, or None.
    """

    def __init__(
        self,
        num_tokens: int,
        parents: Sequence[Tensor],
        centroids: Sequence[Tensor | None] | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.num_levels = len(parents)
        upper_sizes = [int(level.max()) + 1 for level in parents]
        self.level_sizes = (num_tokens, *upper_sizes)
        # One offset for each level; the first offset is 0.
        self.offsets = tuple(itertools.accumulate((0, *self.level_sizes[:-1])))
        self.num_states = sum(self.level_sizes)
        self.mask_id = self.num_states - 1 if parents else None
        self.root = self.num_states - 1 if parents else self.num_states
        self.parents = tuple(parents)
        self.centroids = _check_centroids(centroids, self.level_sizes)
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.fingerprint = _fingerprint_tree(self.level_sizes, self.parents)
        self._subtrees: dict[int, tuple[slice, ...]] = {}
        self._tables = {name: Constant(table) for name, table in _build_tables(self).items()}

    def _table(self, name: str, device: torch.device) -> Tensor:
        """Return the look-up table `name` (see `_build_tables`) on a device."""
        return self._tables[name].on(device)

    def level_of(self, ids: Tensor) -> Tensor:
        """Return the level 0..L of each id, in the shape of `ids`.

        Without a mask, the id `root` is at level 1.
        """
        return self._table("level", ids.device)[ids]

    def ancestor(self, ids: Tensor, level: int | Tensor) -> Tensor:
        """Return the ancestor of each id at `level`.

        At the level of an id the ancestor is the id itself. The result is -1 for ids at levels
        above `level`.
        """
        return self._table("ancestor", ids.device)[ids, level]

    def parent(self, ids: Tensor) -> Tensor:
        """Return the parent of each id; the root is its own parent.

        Without a mask, `root` is the parent of all tokens.
        """
        return self._table("parent", ids.device)[ids]

    def children(self, node: int) -> Tensor:
        """Return the ids of the children of `node` in tree order (see `order`).

        The result is empty for a token.
        """
        below = int(self.level_of(torch.tensor(node))) - 1
        if below < 0:
            return torch.empty(0, dtype=torch.long)
        start, stop = self.node_range(torch.tensor(node), below)
        return self.order(below)[int(start) : int(stop)]

    def num_children(self, ids: Tensor) -> Tensor:
        """Return the number of children of each id, which are one level below it; 0 for tokens."""
        return self._table("num_children", ids.device)[ids]

    def order(self, level: int, device: torch.device | None = None) -> Tensor:
        """Return the ids [n] of the n nodes of a level in tree order.

        In this order, the nodes below any higher node are contiguous.
        """
        return self._table(f"order{level}", device or torch.device("cpu"))

    def position(self, level: int, device: torch.device | None = None) -> Tensor:
        """Return the index [n] in `order(level)` (tree order) of each of the n nodes of a level.

        Entry i of the result is the index of the node with the id offsets[level] + i.
        """
        return self._table(f"position{level}", device or torch.device("cpu"))

    def node_range(self, ids: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Return the range of indices in `order(level)` (tree order) of the nodes below each id.

        The two tensors, in the shape of `ids`, hold the start and the (exclusive) stop of each
        range. The range of a node at `level` contains only this node. The range of `root` is the
        whole level. A node at a level below `level` has an empty range.
        """
        table = self._table(f"range{level}", ids.device)[ids]
        return table[..., 0], table[..., 1]

    def subtree(self, node: int) -> tuple[slice, ...]:
        """Return for each level below `node` the slice that holds the descendants of `node`.

        The slices index `order(level)`, the ids of a level in tree order. The slice of level 0 is
        the first. The result is cached.
        """
        if node not in self._subtrees:
            ids = torch.tensor(node)
            slices = []
            for level in range(int(self.level_of(ids))):
                start, stop = self.node_range(ids, level)
                slices.append(slice(int(start), int(stop)))
            self._subtrees[node] = tuple(slices)
        return self._subtrees[node]

    def save(self, path: str) -> None:
        """Write the tree, its centroids and fingerprints atomically to one safetensors file.

        `path` is any fsspec path.
        """
        tensors = {f"parents.{i}": level.contiguous() for i, level in enumerate(self.parents)}
        for i, centroid in enumerate(self.centroids or ()):
            if centroid is not None:
                tensors[f"centroids.{i + 1}"] = centroid.contiguous()
        metadata = {"num_tokens": str(self.num_tokens), "fingerprint": self.fingerprint}
        if self.tokenizer_fingerprint:
            metadata["tokenizer_fingerprint"] = self.tokenizer_fingerprint
        write_atomic(path, save_safetensors(tensors, metadata))

    @staticmethod
    def load(path: str) -> Vocabulary:
        """Read a vocabulary file written by `save`.

        Raises DataError if the file is not a vocabulary or its tree does not match its fingerprint.
        """
        try:
            with fsspec.open(path, "rb") as file:
                vocabulary, written = _parse_file(file.read())
        except FileNotFoundError:
            raise DataError(
                f"Vocabulary.load: path must name a saved vocabulary; {path} does not exist."
            ) from None
        except Exception as error:
            raise DataError(
                f"Vocabulary.load: {path} is not a complete vocabulary file ({error}). Build the "
                "vocabulary again."
            ) from error
        if vocabulary.fingerprint != written:
            raise DataError(
                f"Vocabulary.load: the tree in {path} has fingerprint {vocabulary.fingerprint}, "
                f"but the file names {written}: it was damaged. Build the vocabulary again."
            )
        return vocabulary

    def __repr__(self) -> str:
        return f"{type(self).__name__}(level_sizes={tuple(self.level_sizes)})"


@final
class FlatVocabulary(Vocabulary):
    """Flat vocabulary: V tokens and a mask, which is the root of a tree with one level.

    With `mask=False` there are only tokens.
    """

    def __init__(
        self,
        num_tokens: int,
        mask: bool = True,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        if num_tokens < 1:
            raise ArgumentError(f"FlatVocabulary: num_tokens must be at least 1; got {num_tokens}.")
        parents = [torch.zeros(num_tokens, dtype=torch.long)] if mask else []
        super().__init__(num_tokens, parents, tokenizer_fingerprint=tokenizer_fingerprint)

    def __repr__(self) -> str:
        return f"FlatVocabulary(num_tokens={self.num_tokens}, mask={len(self.level_sizes) > 1})"


@final
class HierarchicalVocabulary(Vocabulary):
    """Tokens under any number of levels of nodes.

    `parents[l]` gives for each node of level l the index of its parent within level l+1. Level 0
    holds the tokens. Every node must have a child. A root is added if the last level has more than
    one node.
    """

    def __init__(
        self,
        parents: Sequence[Any],
        centroids: Sequence[Any] | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        if len(parents) == 0:
            raise ArgumentError(
                "HierarchicalVocabulary: parents must hold at least one level; got none. For "
                "tokens only use FlatVocabulary."
            )
        levels = [_check_parents(values, level) for level, values in enumerate(parents)]
        for level, (below, above) in enumerate(itertools.pairwise(levels)):
            num_named = int(below.max()) + 1
            if num_named != len(above):
                raise ArgumentError(
                    f"HierarchicalVocabulary: parents[{level}] names {num_named} nodes, but "
                    f"parents[{level + 1}] has {len(above)} entries; each node of level "
                    f"{level + 1} needs exactly one."
                )
        num_top = int(levels[-1].max()) + 1
        if num_top > 1:
            levels.append(torch.zeros(num_top, dtype=torch.long))
        tensors: list[Tensor | None] | None = None
        if centroids is not None:
            tensors = []
            for values in centroids:
                tensors.append(None if values is None else torch.as_tensor(values))
        super().__init__(len(levels[0]), levels, tensors, tokenizer_fingerprint)

    @classmethod
    def from_labels(
        cls,
        tokens: Sequence[str],
        label: Callable[[str], Hashable | tuple[Hashable, ...]],
        tokenizer_fingerprint: str | None = None,
    ) -> HierarchicalVocabulary:
        """Make a tree from a function that names the groups of each token, finest group first.

        For example `label("cat")` is `("noun", "open class")`. The nodes of level l are the
        distinct tuples (label_l, ..., label_last), so equal names under different coarser groups
        are different nodes. A label that is not a tuple counts as one level. `tokens` are the token
        strings in the order of their ids.
        """
        paths = []
        for token in tokens:
            labels = label(token)
            paths.append(labels if isinstance(labels, tuple) else (labels,))
        depths = {len(path) for path in paths}
        if len(depths) != 1 or 0 in depths:
            raise ArgumentError(
                "HierarchicalVocabulary.from_labels: label must name the same number of groups (at "
                f"least one) for every token; got depths {sorted(depths)}. Repeat a group "
                "for tokens with fewer groups."
            )
        parents = []
        below = [(i, *path) for i, path in enumerate(paths)]
        for _ in range(depths.pop()):
            above = list(dict.fromkeys(path[1:] for path in below))
            index = {path: i for i, path in enumerate(above)}
            parents.append([index[path[1:]] for path in below])
            below = above
        return cls(parents, tokenizer_fingerprint=tokenizer_fingerprint)


# ---------------------------------------------------------------------- files


def _read_metadata(content: bytes) -> dict[str, str]:
    """Return the string table in the header of a safetensors file.

    The file starts with eight bytes that hold the length of the header, and then the header as
    JSON.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header["__metadata__"]


def _parse_file(content: bytes) -> tuple[Vocabulary, str]:
    """Return the vocabulary in the content of a file, and the fingerprint stored in the file."""
    tensors = load_safetensors(content)
    metadata = _read_metadata(content)
    num_levels = sum(key.startswith("parents.") for key in tensors)
    parents = [tensors[f"parents.{i}"] for i in range(num_levels)]
    centroids: list[Tensor | None] | None = None
    if any(key.startswith("centroids.") for key in tensors):
        centroids = [tensors.get(f"centroids.{level + 1}") for level in range(num_levels)]
    vocabulary = _restore(
        int(metadata["num_tokens"]),
        parents,
        centroids,
        metadata.get("tokenizer_fingerprint"),
    )
    return vocabulary, metadata["fingerprint"]


def _restore(
    num_tokens: int,
    parents: list[Tensor],
    centroids: list[Tensor | None] | None,
    tokenizer_fingerprint: str | None,
) -> Vocabulary:
    is_one_level = len(parents) == 1 and int(parents[0].max()) == 0
    if len(parents) == 0 or (is_one_level and centroids is None):
        return FlatVocabulary(
            num_tokens,
            mask=bool(parents),
            tokenizer_fingerprint=tokenizer_fingerprint,
        )
    return HierarchicalVocabulary(parents, centroids, tokenizer_fingerprint)


# ---------------------------------------------------------------------- checks


def _check_parents(parents: Any, level: int) -> Tensor:
    """Return the parents of one level as int64.

    Raises ArgumentError if the list is empty, holds negative numbers, or leaves a node without
    children.
    """
    tensor = torch.as_tensor(parents)
    if tensor.dim() != 1 or tensor.numel() == 0 or tensor.is_floating_point():
        raise ArgumentError(
            f"HierarchicalVocabulary: parents[{level}] must be a non-empty list of integers; "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}."
        )
    tensor = tensor.long().clone()
    if int(tensor.min()) < 0:
        raise ArgumentError(
            f"HierarchicalVocabulary: parents[{level}] must be >= 0; got {int(tensor.min())}."
        )
    counts = torch.bincount(tensor)
    if int(counts.min()) == 0:
        empty = int((counts == 0).nonzero()[0])
        raise ArgumentError(
            f"HierarchicalVocabulary: node {empty} of level {level + 1} has no child in "
            f"parents[{level}]. A node without tokens has no probability; number the nodes without "
            "gaps."
        )
    return tensor


def _check_centroids(
    centroids: Sequence[Tensor | None] | None,
    level_sizes: tuple[int, ...],
) -> tuple[Tensor | None, ...] | None:
    """Return the centroids per level, with None at levels without centroids.

    Raises ArgumentError if the number of centroids does not fit the level sizes.
    """
    if centroids is None:
        return None
    num_missing = len(level_sizes) - 1 - len(centroids)
    padded = [*centroids, *[None] * num_missing]
    for level, centroid in enumerate(padded, start=1):
        is_extra = level >= len(level_sizes)
        if is_extra or (centroid is not None and len(centroid) != level_sizes[level]):
            shape = None if centroid is None else tuple(centroid.shape)
            raise ArgumentError(
                f"Vocabulary: centroids of level {level} must have one row per node of that level; "
                f"got {shape} for level sizes {level_sizes}."
            )
    return tuple(padded)


def _fingerprint_tree(level_sizes: tuple[int, ...], parents: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(repr(level_sizes).encode())
    for level in parents:
        # Little-endian, so that the fingerprint is the same on every machine.
        digest.update(level.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------- tables


def _build_tables(vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Return every look-up table by name. The tables of ids are indexed by id.

    If the vocabulary has no mask, one more row represents all tokens together (the id `root`).
    """
    num_levels = vocabulary.num_levels
    num_rows = max(vocabulary.num_states, vocabulary.root + 1)
    # Without a root state, the id `root` (all tokens) is still one level above the tokens.
    level = torch.ones(num_rows, dtype=torch.long)
    ancestor = torch.full((num_rows, num_levels + 1), -1)
    for own in range(num_levels + 1):
        offset = vocabulary.offsets[own]
        size = vocabulary.level_sizes[own]
        level[offset : offset + size] = own
        index = torch.arange(size)
        for above in range(own, num_levels + 1):
            ancestor[offset : offset + size, above] = vocabulary.offsets[above] + index
            if above < num_levels:
                index = vocabulary.parents[above][index]
    ids = torch.arange(num_rows)
    if num_levels:
        parent = ancestor[ids, (level + 1).clamp(max=num_levels)]
    else:
        parent = torch.full_like(ids, vocabulary.root)
    tables = {
        "level": level,
        "ancestor": ancestor,
        "parent": parent,
        "num_children": torch.bincount(parent[: vocabulary.root], minlength=num_rows),
    }
    for own in range(num_levels + 1):
        tables |= _build_order_tables(vocabulary, own, ancestor)
    return tables


def _build_order_tables(vocabulary: Vocabulary, level: int, ancestor: Tensor) -> dict[str, Tensor]:
    """Return the tables `order`, `position` and `range` of one level.

    They hold the results of `Vocabulary.order`, `position` and `node_range`. Nodes are sorted by
    the path from the root down; ties are broken by id. `ancestor` is the table of ancestors by id
    and level.
    """
    offset = vocabulary.offsets[level]
    size = vocabulary.level_sizes[level]
    num_rows = len(ancestor)
    paths = ancestor[offset : offset + size]
    order = torch.arange(size)
    # Stable sorts, from the finest ancestor to the coarsest, order the nodes by the whole path.
    for above in range(level + 1, vocabulary.num_levels + 1):
        keys = paths[order, above]
        order = order[torch.argsort(keys, stable=True)]
    position = torch.empty_like(order)
    position[order] = torch.arange(size)
    ranges = torch.zeros(num_rows, 2, dtype=torch.long)
    for above in range(level, vocabulary.num_levels + 1):
        nodes = paths[:, above]
        start = torch.full((num_rows,), size)
        start = start.scatter_reduce(0, nodes, position, "amin")
        stop = torch.zeros(num_rows, dtype=torch.long)
        stop = stop.scatter_reduce(0, nodes, position + 1, "amax")
        first = vocabulary.offsets[above]
        ids = slice(first, first + vocabulary.level_sizes[above])
        ranges[ids, 0] = start[ids]
        ranges[ids, 1] = stop[ids]
    if vocabulary.mask_id is None:
        ranges[vocabulary.root] = torch.tensor([0, size])
    return {
        f"order{level}": order + offset,
        f"position{level}": position,
        f"range{level}": ranges,
    }
