"""Attention masks (padding, packed documents, blocks, cached positions) and a key-value cache.

A backbone runs on n inputs per sequence, by default the L positions (n = L). If the clean tokens
are placed next to the noisy sequence, every position is two inputs, a clean one and a noisy one
(n = 2L). With a key-value cache, only positions that are not cached are inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ddiff.errors import ArgumentError

AttentionMask = Tensor | BlockMask | None
"""Mask for `attend`: bool [B or 1,1,L,m+L], a flex attention mask, or None (no mask)."""

TILE = 128  # inputs; flex attention's default block size
MIN_HEAD_WIDTH = 16  # channels; the smallest that flex attention's kernels take


class AttentionLayout(NamedTuple):
    """Positions and block numbers of the n inputs of a backbone, if attention is by blocks.

    Attributes:
        position: [n] long, the position of each input in its sequence. The positions are
            consecutive. With `noisy` they occur twice, first those of the clean inputs.
        block: [1 or B,n] long, the block number of each input.
        noisy: [n] bool, True for noisy inputs and False for clean inputs. A noisy input attends to
            the noisy inputs in its own block and to the clean inputs in earlier blocks. A clean
            input attends to the clean inputs in its own and in earlier blocks. None: an input
            attends to all inputs in its own and in earlier blocks.
    """

    position: Tensor
    block: Tensor
    noisy: Tensor | None = None


class PositionFacts(NamedTuple):
    """Properties of n inputs that determine which inputs attend to each other.

    Every property is a tensor [1 or B,n], or None if it is the same for all inputs.

    Attributes:
        place: numbers 0, 1, ..., n - 1 of the inputs; never None.
        valid: False at padding.
        document: number of the document in a packed sequence.
        block: block number, if attention is by blocks.
        noisy: True for noisy and False for clean inputs; `AttentionLayout` has the rules.
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
        """Return the properties of one input: input number `index` of sequence number `row`.

        Both numbers are tensors of shape [].
        """
        return self.map(lambda fact: fact[row if len(fact) > 1 else 0, index])


def may_attend(query: PositionFacts, key: PositionFacts) -> Tensor:
    """Return a bool mask that is True where the input `query` may attend to the input `key`.

    The mask has the shape to which the properties of `query` and `key` broadcast. A query attends
    to itself, so that no row of the softmax is empty. It attends to another input only if that
    input is not padding, is in the same document, and is in a block to which it may attend (see
    `AttentionLayout`).
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


def prepend_inputs(
    facts: PositionFacts | None, count: int, length: int, device: torch.device
) -> PositionFacts:
    """Return the properties of `count` clean inputs followed by `length` inputs.

    The new inputs are a block before all others: all inputs may attend to them, and they attend
    only to each other. `facts` describes the `length` inputs; None: no input is hidden. Raises
    ArgumentError if there are documents, since the new inputs would belong to no document.
    """
    if facts is None:
        facts = PositionFacts(torch.arange(length, device=device).unsqueeze(0))
    if facts.document is not None:
        raise ArgumentError(
            "prepend_inputs: every row must be one document; got rows of several documents "
            "(facts.document). Leave out the document numbers."
        )
    block = facts.block
    if block is None:
        block = torch.zeros(1, length, dtype=torch.long, device=device)
    first = block.amin(-1, keepdim=True) - 1
    valid = facts.valid
    if valid is not None:
        valid = F.pad(valid, (count, 0), value=True)
    noisy = facts.noisy
    if noisy is not None:
        noisy = F.pad(noisy, (count, 0), value=False)
    return PositionFacts(
        torch.arange(count + length, device=device).unsqueeze(0),
        valid,
        block=torch.cat([first.expand(-1, count), block], -1),
        noisy=noisy,
    )


def build_dense_mask(facts: PositionFacts, cached: int = 0, num_prefix: int = 0) -> Tensor:
    """Build the bool mask [1 or B,1,n-m,n] with which n - m new inputs attend to all n inputs.

    `facts` describes all n inputs. m = `cached` inputs are in the key-value cache. They come after
    the first `num_prefix` inputs, which are not cached.
    """

    def select_new(fact: Tensor) -> Tensor:
        new = fact[:, num_prefix + cached :]
        if num_prefix:
            new = torch.cat([fact[:, :num_prefix], new], 1)
        return new.unsqueeze(-1)

    query = facts.map(select_new)
    key = facts.map(lambda fact: fact.unsqueeze(-2))
    return may_attend(query, key).unsqueeze(1)


def build_block_mask(facts: PositionFacts) -> BlockMask:
    """Build the attention mask as a `BlockMask` for flex attention (arXiv 2412.05496).

    `facts` describes the n inputs. The n x n mask is cut into tiles of TILE x TILE pairs of
    inputs. A `BlockMask` lists the tiles in which some pairs may attend, and the tiles in which all
    pairs may attend. Rows of tiles are computed one after the other, so that no tensor of n^2
    entries is made.
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
    """Count the (query, key) pairs that may attend, in each tile of one row of tiles.

    A tile is a square block of TILE x TILE entries of the attention matrix. The counts are
    [1 or B,tiles].

    Args:
        facts: properties of all inputs, [1 or B,n].
        key: the same properties with the shape [1 or B,1,n].
        start: number of the first query in the row of tiles.
        length: number n of inputs.
    """
    query = facts.map(lambda fact: fact[:, start : start + TILE].unsqueeze(-1))
    allowed = F.pad(may_attend(query, key), (0, -length % TILE))
    return allowed.unflatten(-1, (-1, TILE)).sum((1, 3))


def _sort_tiles(is_marked: Tensor) -> tuple[Tensor, Tensor]:
    """Count and sort the marked tiles (square blocks of the attention matrix), for `BlockMask`.

    `is_marked` [...,rows,tiles] is bool. Returns the number of marked tiles in each row of tiles,
    and the tile numbers of each row, in which the marked tiles come first.
    """
    marked = is_marked.int()
    order = marked.argsort(dim=-1, descending=True, stable=True)
    return marked.sum(-1, dtype=torch.int32), order.int()


def has_flex_kernel(x: Tensor, head_width: int) -> bool:
    """Return whether flex attention has a fused kernel for the hidden states `x`.

    The device and dtype of `x` must be supported, and `head_width`, the number of channels of an
    attention head, must be at least MIN_HEAD_WIDTH.
    """
    # FLOP counting disables fused kernels through `sdpa_kernel`, so flex attention is not used.
    is_allowed = torch.backends.cuda.flash_sdp_enabled()
    return x.is_cuda and x.dtype != torch.float64 and head_width >= MIN_HEAD_WIDTH and is_allowed


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Compute the attention softmax(q k^T / sqrt(w)) v, in the shape of q.

    q is [B,heads,L,w]. k and v are [B,heads,m+L,w], where the first m entries come from the
    key-value cache. `mask` is the result of `Context.kernel_mask`.
    """
    if mask is None or isinstance(mask, Tensor):
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            return _attend_in_float32(q, k, v, mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # Inside torch.compile the plain function is compiled with its caller.
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return flex(q, k, v, block_mask=mask)


def _attend_in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the attention of bfloat16 tensors in float32: on a CPU this takes half the time."""
    # Autocast would convert the tensors back to bfloat16.
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    return out.to(q.dtype)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


@final
class KeyValueCache:
    """Keys, values, columns and hidden states of the first m inputs of every sequence, for reuse.

    Only final inputs are cached. An input is final if its token will not change any more and every
    input to which it attends is final. The keys and values of a final input stay the same, so the
    cache is exact. Keys and values are stored by layer, each [B,heads,m,w] for attention heads of
    width w. Columns are the inputs [B,m,d] of a convolution over positions (see `Neighbours`),
    which new inputs read; all are stored, because `crop` may end the cache anywhere. A forward pass
    over new inputs calls `begin_update`, then `update` in every layer and `update_columns` in every
    convolution, then `finish_update`.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.columns: dict[tuple[int, int], Tensor] = {}
        self.ids = torch.empty(0, 0, dtype=torch.long)
        self.block = torch.empty(0, dtype=torch.long)
        self.hidden: Tensor | None = None
        self._num_new = 0  # inputs of the current pass that become final

    @property
    def length(self) -> int:
        """Number of cached inputs."""
        return self.ids.shape[1]

    def crop(self, ids: Tensor, block: Tensor, num_final: int) -> int:
        """Crop the cache to the longest prefix that can be reused, and return its length.

        The prefix can be reused if it has the given `ids` [B,L] and block numbers `block` [L]. At
        most `num_final` inputs are kept. A block is kept as a whole or not at all, since its inputs
        attend to each other.
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
            self.columns = {name: h[:, :length] for name, h in self.columns.items()}
            self.ids = self.ids[:, :length]
            self.block = self.block[:length]
            if self.hidden is not None:
                self.hidden = self.hidden[:, :length]
        return length

    def begin_update(self, num_new: int) -> None:
        """Begin a forward pass; the first `num_new` of its inputs become part of the cache."""
        self._num_new = num_new

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B,heads,m+n,w] of layer number `layer`, for all inputs.

        `k` and `v` [B,heads,n,w] are the keys and values of the n new inputs. The m cached inputs
        come first in the result.
        """
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

    def update_columns(self, name: tuple[int, int], h: Tensor, num_before: int) -> Tensor:
        """Return the last `num_before` cached columns of a convolution, followed by h [B,n,d].

        `name` is the number of the layer and the number of the convolution in it. `num_before` is
        at most m.
        """
        columns = h
        if self.length:
            columns = torch.cat([self.columns[name], h], 1)
        if self._num_new:
            self.columns[name] = columns[:, : self.length + self._num_new]
        return columns[:, self.length - num_before :]

    def finish_update(self, ids: Tensor, block: Tensor, hidden: Tensor) -> Tensor:
        """End a forward pass, and return the hidden states [B,m+n,width] of all inputs.

        The first `num_new` of the new inputs (see `begin_update`) become part of the cache.

        Args:
            ids, block: ids [B,m+n] and block numbers [m+n] of the m cached and the n new inputs.
            hidden: hidden states [B,n,width] of the new inputs.
        """
        if self.hidden is not None and self.length:
            hidden = torch.cat([self.hidden, hidden], 1)
        length = self.length + self._num_new
        self.ids = ids[:, :length]
        self.block = block[:length]
        self.hidden = hidden[:, :length]
        self._num_new = 0
        return hidden
