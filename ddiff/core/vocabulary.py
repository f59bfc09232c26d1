"""State spaces: the words, and any number of levels above them.

A vocabulary is a tree. Level 0 holds the V words in tokenizer order, level l the nodes that stand for sets of words, and
the last level one root, which is the mask. A flat vocabulary with a mask is the tree of one level; without a mask it is
the words alone. State ids run level by level, words first, root last, and are never renumbered. "Tree order" is a
permutation of each level in which every node above it owns a contiguous range.

    >>> tree = HierarchicalVocabulary([[0, 0, 1, 1], [0, 0]])     # four words, two nodes, one root
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
    """The states of one position: words 0..V-1, then each level's nodes, the root (= mask) last.

    Attributes: `num_tokens` V, `num_states` S, `num_levels` L (levels above the words), `level_sizes` (V, n_1, ..., n_L),
    `offsets` (id of each level's first node), `mask_id` (the root, None when L = 0), `root` (the root's id, or S as a
    mere name of "the whole" when L = 0), `fingerprint` (of the tree), `tokenizer_fingerprint` (of the tokenizer that it
    was built for, where known) and `centroids` (per level above the words [n_l, d], where known).
    """

    def __init__(
        self,
        num_tokens: int,
        parents: Sequence[Tensor],
        centroids: Sequence[Tensor | None] | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.level_sizes = (num_tokens, *(int(p.max()) + 1 for p in parents))
        self.num_levels = len(parents)
        self.offsets = tuple(sum(self.level_sizes[:level]) for level in range(self.num_levels + 1))
        self.num_states = sum(self.level_sizes)
        self.mask_id = self.num_states - 1 if parents else None
        self.root = self.num_states - 1 if parents else self.num_states
        self.parents = tuple(parents)
        self.centroids = _checked_centroids(centroids, self.level_sizes)
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.fingerprint = _fingerprint(self.level_sizes, self.parents)
        self._subtrees: dict[int, tuple[slice, ...]] = {}
        self._tables = {name: Constant(table) for name, table in _build_tables(self).items()}

    def _table(self, name: str, device: torch.device) -> Tensor:
        """A named table on a device."""
        return self._tables[name].on(device)

    def level_of(self, ids: Tensor) -> Tensor:
        """The level of each id, 0..L; any shape. The name of the whole lies one above the words when there is no mask."""
        return self._table("level", ids.device)[ids]

    def ancestor(self, ids: Tensor, level: int | Tensor) -> Tensor:
        """The id at `level` that each id lies below (or is); `level` must not be under the id's own (else -1)."""
        return self._table("ancestor", ids.device)[ids, level]

    def parent(self, ids: Tensor) -> Tensor:
        """The id one level up; the root is its own parent. Without a mask the name of the whole stands above the words."""
        return self._table("parent", ids.device)[ids]

    def children(self, node: int) -> Tensor:
        """The ids one level below `node` in tree order; for `root` the nodes of the level below it; none for a word."""
        below = int(self.level_of(torch.tensor(node))) - 1
        if below < 0:
            return torch.empty(0, dtype=torch.long)
        start, stop = self.node_range(torch.tensor(node), below)
        return self.order(below)[int(start) : int(stop)]

    def num_children(self, ids: Tensor) -> Tensor:
        """How many ids lie one level below each id; 0 for words."""
        return self._table("num_children", ids.device)[ids]

    def order(self, level: int, device: torch.device | None = None) -> Tensor:
        """[n_l] the ids of a level in tree order."""
        return self._table(f"order{level}", device or torch.device("cpu"))

    def position(self, level: int, device: torch.device | None = None) -> Tensor:
        """[n_l] the place in `order(level)` of each node of the level, by its index in the level."""
        return self._table(f"position{level}", device or torch.device("cpu"))

    def node_range(self, ids: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """First and one-past-last place in `order(level)` of what lies below each id (itself at its own level).

        Ids may be `root`, which covers the level. Nodes under `level` have an empty range.
        """
        table = self._table(f"range{level}", ids.device)[ids]
        return table[..., 0], table[..., 1]

    def subtree(self, node: int) -> tuple[slice, ...]:
        """The places below one node in the order of each level under it: as many slices as the node's level. Kept."""
        if node not in self._subtrees:
            ids = torch.tensor(node)
            ranges = [self.node_range(ids, level) for level in range(int(self.level_of(ids)))]
            self._subtrees[node] = tuple(slice(int(start), int(stop)) for start, stop in ranges)
        return self._subtrees[node]

    def save(self, path: str) -> None:
        """Write the tree, its centroids and fingerprints to one safetensors file (any fsspec path), whole or not at all."""
        tensors = {f"parents.{i}": p.contiguous() for i, p in enumerate(self.parents)}
        for i, centroid in enumerate(self.centroids or ()):
            if centroid is not None:
                tensors[f"centroids.{i + 1}"] = centroid.contiguous()
        metadata = {"num_tokens": str(self.num_tokens), "fingerprint": self.fingerprint}
        if self.tokenizer_fingerprint:
            metadata["tokenizer_fingerprint"] = self.tokenizer_fingerprint
        write_atomic(path, save_safetensors(tensors, metadata))

    @staticmethod
    def load(path: str) -> Vocabulary:
        """Read what `save` wrote; DataError when the file is not a vocabulary or its tree does not fit its fingerprint."""
        try:
            with fsspec.open(path, "rb") as file:
                vocabulary, written = _parse(file.read())
        except FileNotFoundError:
            raise DataError(
                f"Vocabulary.load: path must name a saved vocabulary; {path} does not exist."
            ) from None
        except Exception as error:
            raise DataError(
                f"Vocabulary.load: {path} is not a whole vocabulary file ({error}). Build the vocabulary again."
            ) from error
        if vocabulary.fingerprint != written:
            raise DataError(
                f"Vocabulary.load: the tree in {path} has fingerprint {vocabulary.fingerprint}, but the file names "
                f"{written}: it was damaged. Build the vocabulary again."
            )
        return vocabulary

    def __repr__(self) -> str:
        sizes = " < ".join(str(size) for size in self.level_sizes)
        return f"{type(self).__name__}({sizes}; {self.fingerprint})"


@final
class FlatVocabulary(Vocabulary):
    """V words and, unless `mask=False`, one mask: the tree of one level."""

    def __init__(
        self, num_tokens: int, mask: bool = True, tokenizer_fingerprint: str | None = None
    ) -> None:
        if num_tokens < 1:
            raise ArgumentError(f"FlatVocabulary: num_tokens must be at least 1; got {num_tokens}.")
        parents = [torch.zeros(num_tokens, dtype=torch.long)] if mask else []
        super().__init__(num_tokens, parents, tokenizer_fingerprint=tokenizer_fingerprint)


@final
class HierarchicalVocabulary(Vocabulary):
    """Words under any number of levels of nodes.

    `parents[l]` gives for each node of level l the index (within level l+1) of its parent; level 0 are the words. Every
    node must have a child. A root is added when the last level has more than one node.
    """

    def __init__(
        self,
        parents: Sequence[Any],
        centroids: Sequence[Any] | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        if len(parents) == 0:
            raise ArgumentError(
                "HierarchicalVocabulary: parents must hold at least one level; got none. "
                "For words alone use FlatVocabulary."
            )
        levels = [_checked_parents(p, level) for level, p in enumerate(parents)]
        for level, (below, above) in enumerate(itertools.pairwise(levels)):
            if int(below.max()) + 1 != len(above):
                raise ArgumentError(
                    f"HierarchicalVocabulary: parents[{level}] names {int(below.max()) + 1} nodes, but "
                    f"parents[{level + 1}] has {len(above)} entries; each node of level {level + 1} needs exactly one."
                )
        if int(levels[-1].max()) > 0:
            levels.append(torch.zeros(int(levels[-1].max()) + 1, dtype=torch.long))
        tensors = (
            None
            if centroids is None
            else [None if c is None else torch.as_tensor(c) for c in centroids]
        )
        super().__init__(len(levels[0]), levels, tensors, tokenizer_fingerprint)

    @classmethod
    def from_labels(
        cls,
        tokens: Sequence[str],
        label: Callable[[str], Hashable | tuple[Hashable, ...]],
        tokenizer_fingerprint: str | None = None,
    ) -> HierarchicalVocabulary:
        """A tree from a function that names each token's groups, finest first: `("noun", "open class")`.

        The nodes of level l are the distinct (label_l, ..., label_last), so that equal names under different coarser
        groups stay apart. A plain label counts as one level.
        """
        paths = []
        for token in tokens:
            labels = label(token)
            paths.append(labels if isinstance(labels, tuple) else (labels,))
        depths = {len(path) for path in paths}
        if len(depths) != 1 or 0 in depths:
            raise ArgumentError(
                f"HierarchicalVocabulary.from_labels: label must name the same number of groups (at least one) for every "
                f"token; got depths {sorted(depths)}. Give short branches a group of their own."
            )
        parents, below = [], [(i, *path) for i, path in enumerate(paths)]
        for _ in range(depths.pop()):
            above = list(dict.fromkeys(path[1:] for path in below))
            index = {path: i for i, path in enumerate(above)}
            parents.append([index[path[1:]] for path in below])
            below = above
        return cls(parents, tokenizer_fingerprint=tokenizer_fingerprint)


def _metadata(content: bytes) -> dict[str, str]:
    """The string table in the header of a safetensors file: eight bytes of length, then JSON."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def _parse(content: bytes) -> tuple[Vocabulary, str]:
    """The vocabulary in a file's content, and the fingerprint written beside it."""
    tensors, metadata = load_safetensors(content), _metadata(content)
    parents = [
        tensors[f"parents.{i}"] for i in range(sum(key.startswith("parents.") for key in tensors))
    ]
    centroids = [tensors.get(f"centroids.{level}") for level in range(1, len(parents) + 1)]
    known = centroids if any(c is not None for c in centroids) else None
    vocabulary = _restore(
        int(metadata["num_tokens"]), parents, known, metadata.get("tokenizer_fingerprint")
    )
    return vocabulary, metadata["fingerprint"]


def _restore(
    num_tokens: int,
    parents: list[Tensor],
    centroids: list[Tensor | None] | None,
    tokenizer_fingerprint: str | None,
) -> Vocabulary:
    if len(parents) == 0 or (
        len(parents) == 1 and int(parents[0].max()) == 0 and centroids is None
    ):
        return FlatVocabulary(
            num_tokens, mask=bool(parents), tokenizer_fingerprint=tokenizer_fingerprint
        )
    return HierarchicalVocabulary(parents, centroids, tokenizer_fingerprint)


def _checked_parents(parents: Any, level: int) -> Tensor:
    """One level of parents as int64, refused when empty, negative or with a childless node."""
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
            f"HierarchicalVocabulary: node {empty} of level {level + 1} has no child in parents[{level}]. "
            "A node without words has no probability; number the nodes without gaps."
        )
    return tensor


def _checked_centroids(
    centroids: Sequence[Tensor | None] | None, level_sizes: tuple[int, ...]
) -> tuple[Tensor | None, ...] | None:
    if centroids is None:
        return None
    padded = [*centroids, *[None] * (len(level_sizes) - 1 - len(centroids))]
    for level, centroid in enumerate(padded, start=1):
        if level >= len(level_sizes) or (
            centroid is not None and len(centroid) != level_sizes[level]
        ):
            raise ArgumentError(
                f"Vocabulary: centroids of level {level} must have one row per node of that level; got "
                f"{None if centroid is None else tuple(centroid.shape)} for level sizes {level_sizes}."
            )
    return tuple(padded)


def _fingerprint(level_sizes: tuple[int, ...], parents: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(repr(level_sizes).encode())
    for level in parents:
        digest.update(level.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _build_tables(vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Every look-up table by id. When there is no root state one more row stands for the whole."""
    sizes, offsets, num_levels = vocabulary.level_sizes, vocabulary.offsets, vocabulary.num_levels
    rows = max(vocabulary.num_states, vocabulary.root + 1)
    level = torch.ones(
        rows, dtype=torch.long
    )  # without a root state, the whole still lies above the words
    ancestor = torch.full((rows, num_levels + 1), -1)
    for own, (offset, size) in enumerate(zip(offsets, sizes)):
        level[offset : offset + size] = own
        climbing = torch.arange(size)
        for above in range(own, num_levels + 1):
            ancestor[offset : offset + size, above] = offsets[above] + climbing
            if above < num_levels:
                climbing = vocabulary.parents[above][climbing]
    ids = torch.arange(rows)
    parent = ancestor[ids, (level + 1).clamp(max=num_levels)]
    if not num_levels:
        parent = torch.full_like(ids, vocabulary.root)
    num_children = torch.bincount(parent[: vocabulary.root], minlength=rows)
    tables = {"level": level, "ancestor": ancestor, "parent": parent, "num_children": num_children}
    for own in range(num_levels + 1):
        tables |= _order_tables(own, ancestor, offsets[own], sizes[own], rows, vocabulary)
    return tables


def _order_tables(
    level: int, ancestor: Tensor, offset: int, size: int, rows: int, vocabulary: Vocabulary
) -> dict[str, Tensor]:
    """Tree order of one level: sorted by the path from the root down, ids breaking ties."""
    paths = ancestor[offset : offset + size]
    order = torch.arange(size)
    for above in range(level + 1, vocabulary.num_levels + 1):
        order = order[torch.argsort(paths[order, above], stable=True)]
    position = torch.empty_like(order)
    position[order] = torch.arange(size)
    ranges = torch.zeros(rows, 2, dtype=torch.long)
    for above in range(level, vocabulary.num_levels + 1):
        nodes = paths[:, above]
        start = torch.full((rows,), size).scatter_reduce(0, nodes, position, "amin")
        stop = torch.zeros(rows, dtype=torch.long).scatter_reduce(0, nodes, position + 1, "amax")
        owned = vocabulary.offsets[above] + torch.arange(vocabulary.level_sizes[above])
        ranges[owned] = torch.stack([start, stop], -1)[owned]
    if vocabulary.mask_id is None:
        ranges[vocabulary.root] = torch.tensor([0, size])
    return {f"order{level}": order + offset, f"position{level}": position, f"range{level}": ranges}
