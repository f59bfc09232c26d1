"""Attention masks for padding, packed documents, blocks and cached positions; key-value cache.

A backbone runs on n inputs per sequence. Usually these are the L positions. With a clean copy next
to the noisy sequence there are 2L inputs. With a cache, the inputs are the positions that are not
cached.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

AttentionMask = Tensor | BlockMask | None
"""Mask for `attend`: bool [B or 1,1,L,m+L], a flex attention mask, or None (no mask)."""

TILE = 128  # inputs; flex attention's default block size
MIN_HEAD_WIDTH = 16  # channels; the smallest that flex attention's kernels take


class AttentionLayout(NamedTuple):
    """Inputs of a backbone: `position` [n] in the sequence, `block` [1 or B,n], `noisy` [n] bool.

    If `noisy` is None, an input attends to its own block and to earlier blocks. Otherwise a noisy
    input attends to the noisy inputs of its own block and to the clean inputs of earlier blocks. A
    clean input attends to the clean inputs of its own block and of earlier blocks.
    """

    position: Tensor
    block: Tensor
    noisy: Tensor | None = None


class PositionFacts(NamedTuple):
    """Properties of n inputs that determine which inputs attend to each other, [1 or B,n] each.

    `place` numbers the inputs 0, 1, ... Other properties are None if they are the same for all
    inputs.
    """

    place: Tensor
    valid: Tensor | None = None
    document: Tensor | None = None
    block: Tensor | None = None
    noisy: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> PositionFacts:
        """Apply `fn` to every property that is not None."""
        others = (None if fact is None else fn(fact) for fact in self[1:])
        return PositionFacts(fn(self.place), *others)

    def select(self, row: Tensor, index: Tensor) -> PositionFacts:
        """Return the properties of input `index` of sequence `row`, two tensors of shape []."""
        return self.map(lambda fact: fact[row if len(fact) > 1 else 0, index])


def may_attend(query: PositionFacts, key: PositionFacts) -> Tensor:
    """Return bool: whether the inputs `query` may attend to the inputs `key`.

    The shapes of the properties of `query` and `key` broadcast to the shape of the result. A key
    must be valid, in the same document as the query, and in a block to which the block of the query
    attends. An input always attends to itself, so that no row of the softmax is empty.
    """
    is_self = query.place == key.place
    allowed = ~is_self  # has the broadcast shape; `is_self` is added at the end
    if query.block is not None and key.block is not None:
        is_earlier = key.block < query.block
        is_same = key.block == query.block
        if query.noisy is None or key.noisy is None:
            allowed = allowed & (is_earlier | is_same)
        else:
            to_noisy_key = query.noisy & is_same
            to_clean_key = is_earlier | (~query.noisy & is_same)
            allowed = allowed & torch.where(key.noisy, to_noisy_key, to_clean_key)
    if query.document is not None and key.document is not None:
        allowed = allowed & (query.document == key.document)
    if key.valid is not None:
        allowed = allowed & key.valid
    return allowed | is_self


def build_dense_mask(facts: PositionFacts, cached: int = 0) -> Tensor:
    """Build the mask [1 or B,1,n-m,n] of the inputs after the m cached ones."""
    query = facts.map(lambda fact: fact[:, cached:].unsqueeze(-1))
    key = facts.map(lambda fact: fact.unsqueeze(-2))
    return may_attend(query, key).unsqueeze(1)


def build_block_mask(facts: PositionFacts) -> BlockMask:
    """Build the mask of flex attention (arXiv 2412.05496).

    The mask lists the tiles in which some pairs may attend, and those in which all pairs may. Rows
    of tiles are computed one after the other, so that no tensor of n^2 entries is made.
    """
    length = facts.place.shape[-1]
    key = facts.map(lambda fact: fact.unsqueeze(-2))
    counts = [_count_in_tiles(facts, key, start, length) for start in range(0, length, TILE)]
    count = torch.stack(counts, 1).unsqueeze(1)
    is_full = count == TILE * TILE
    is_partial = (count > 0) & ~is_full

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_attend(facts.select(row, query), facts.select(row, key))

    return BlockMask.from_kv_blocks(
        *_sort_tiles(is_partial),
        *_sort_tiles(is_full),
        TILE,
        mask_mod,
        seq_lengths=(length, length),
    )


def _count_in_tiles(facts: PositionFacts, key: PositionFacts, start: int, length: int) -> Tensor:
    """Count the allowed pairs per tile, for the row of tiles that begins at `start`."""
    query = facts.map(lambda fact: fact[:, start : start + TILE].unsqueeze(-1))
    allowed = F.pad(may_attend(query, key), (0, -length % TILE))
    return allowed.unflatten(-1, (-1, TILE)).sum((1, 3))


def _sort_tiles(is_marked: Tensor) -> tuple[Tensor, Tensor]:
    """Count the marked tiles of each row, and list all tiles with the marked ones first."""
    marked = is_marked.int()
    order = marked.argsort(dim=-1, descending=True, stable=True)
    return marked.sum(-1, dtype=torch.int32), order.int()


def has_flex_kernel(x: Tensor, head_width: int) -> bool:
    """Return whether flex attention has a fused kernel for the device and dtype of `x`.

    Kernels also need a `head_width` of at least MIN_HEAD_WIDTH.
    """
    # FLOP counting disables fused kernels through `sdpa_kernel`, so flex attention is not used.
    is_allowed = torch.backends.cuda.flash_sdp_enabled()
    return x.is_cuda and x.dtype != torch.float64 and head_width >= MIN_HEAD_WIDTH and is_allowed


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Compute softmax(q k^T / sqrt(w)) v: q [B,heads,L,w], k and v [B,heads,m+L,w] -> q's shape.

    `mask` is the `Context.kernel_mask` of the pass. Flex attention skips tiles that are masked.
    """
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # Inside torch.compile the plain function is compiled with its caller.
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return flex(q, k, v, block_mask=mask)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


@final
class KeyValueCache:
    """Keys and values [B,heads,m,w] of final inputs by layer, and their hidden states.

    An input is final if its token will not change any more and every input to which it attends is
    final. Its keys and values then stay the same, so the cache is exact. A pass over new inputs
    calls `begin_update`, then `update` in every layer, then `finish_update`.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.ids = torch.empty(0, 0, dtype=torch.long)
        self.block = torch.empty(0, dtype=torch.long)
        self.hidden: Tensor | None = None
        self._num_new = 0  # inputs of the current pass that become final

    @property
    def length(self) -> int:
        """Number of cached inputs."""
        return self.ids.shape[1]

    def crop(self, ids: Tensor, block: Tensor, num_final: int) -> int:
        """Crop the cache to the longest prefix that agrees with ids [B,L] and block [L].

        At most `num_final` inputs are kept. Returns the new length. A block is kept as a whole or
        not at all, since its inputs attend to each other.
        """
        length = min(self.length, num_final) if len(self.ids) == len(ids) else 0
        if length:
            same_ids = (self.ids[:, :length] == ids[:, :length]).all(0)
            same = same_ids & (self.block[:length] == block[:length])
            length = int(same.long().cumprod(0).sum())
        # Both block numberings agree on the prefix, so the second pass does not change the result
        # of the first pass.
        for numbers in (block, self.block):
            if length < len(numbers):
                length = int((numbers[:length] < numbers[length]).sum())
        if length < self.length:
            self.keys = [k[:, :, :length] for k in self.keys]
            self.values = [v[:, :, :length] for v in self.values]
            self.ids = self.ids[:, :length]
            self.block = self.block[:length]
            if self.hidden is not None:
                self.hidden = self.hidden[:, :length]
        return length

    def begin_update(self, num_new: int) -> None:
        """Announce that the first `num_new` inputs of the next pass are final."""
        self._num_new = num_new

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B,heads,m+n,w] of `layer`, given those of n new inputs."""
        if layer == len(self.keys):
            self.keys.append(k[:, :, :0])
            self.values.append(v[:, :, :0])
        if self.length:
            k = torch.cat([self.keys[layer], k], 2)
            v = torch.cat([self.values[layer], v], 2)
        if self._num_new:
            length = self.length + self._num_new
            self.keys[layer] = k[:, :, :length]
            self.values[layer] = v[:, :, :length]
        return k, v

    def finish_update(self, ids: Tensor, block: Tensor, hidden: Tensor) -> Tensor:
        """Return the hidden states [B,L',width] of all inputs after a pass up to input L'.

        `ids` [B,L'] and `block` [L'] include the cached inputs. `hidden` [B,n,width] are the hidden
        states of the pass. The keys and values that `update` stored become part of the cache.
        """
        if self.hidden is not None and self.length:
            hidden = torch.cat([self.hidden, hidden], 1)
        length = self.length + self._num_new
        self.ids = ids[:, :length]
        self.block = block[:length]
        self.hidden = hidden[:, :length]
        self._num_new = 0
        return hidden
