"""Who sees whom: the one place where padding, packed documents, blocks and cached columns become an attention mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

AttentionMask = Tensor | BlockMask | None
"""Who sees whom as `attend` takes it: a mask [B or 1,1,L,m+L], the same in flex attention's form, None for everybody."""

TILE = 128  # columns, flex attention's own default
NARROWEST = 16  # channels of a head that its kernels take


class AttentionLayout(NamedTuple):
    """Of the columns that a backbone is run on: `position` [n] in the sequence, `block` [1 or B,n], and `noisy` [n] bool.

    Without `noisy`, a column sees its own and earlier blocks. With it, noisy columns see the noisy ones of their own block
    and the clean ones of earlier blocks, clean columns the clean ones of their own and earlier blocks.
    """

    position: Tensor
    block: Tensor
    noisy: Tensor | None = None


class PositionFacts(NamedTuple):
    """Of each of n columns what decides who sees it, [1 or B,n]: its `place` in the row, and what is known beside it."""

    place: Tensor
    valid: Tensor | None = None
    document: Tensor | None = None
    block: Tensor | None = None
    noisy: Tensor | None = None

    def each(self, pick: Callable[[Tensor], Tensor]) -> PositionFacts:
        """The same of the columns that `pick` takes out of each fact."""
        return PositionFacts(
            pick(self.place), *(None if fact is None else pick(fact) for fact in self[1:])
        )

    def at(self, row: Tensor, column: Tensor) -> PositionFacts:
        """Those of one column: row and column are numbers of no dimension."""
        return self.each(lambda fact: fact[row if len(fact) > 1 else 0, column])


def sees(query: PositionFacts, key: PositionFacts) -> Tensor:
    """May the column `query` look at the column `key`? Bool, of the shape that their facts broadcast to.

    It may if the key is valid, of the same document and within sight. A column always sees itself, so that no row of the
    softmax is empty.
    """
    seen = query.place != key.place  # all the others, to begin with
    if query.block is not None and key.block is not None:
        before, same = key.block < query.block, key.block == query.block
        if query.noisy is None or key.noisy is None:
            seen = seen & (before | same)
        else:
            seen = seen & torch.where(key.noisy, query.noisy & same, before | (~query.noisy & same))
    if query.document is not None and key.document is not None:
        seen = seen & (query.document == key.document)
    if key.valid is not None:
        seen = seen & key.valid
    return seen | (query.place == key.place)


def dense_mask(columns: PositionFacts, cached: int = 0) -> Tensor:
    """[1 or B,1,n-m,n] bool: what the columns behind the m cached ones see."""
    query = columns.each(lambda fact: fact[:, cached:].unsqueeze(-1))
    return sees(query, columns.each(lambda fact: fact.unsqueeze(-2))).unsqueeze(1)


def block_mask(columns: PositionFacts) -> BlockMask:
    """What flex attention (arXiv 2412.05496) wants to know: which tiles are seen in part and which as a whole.

    A tile's rows are looked at together and forgotten, so that n^2 entries are never held at once.
    """
    length = columns.place.shape[-1]
    key, count = columns.each(lambda fact: fact.unsqueeze(-2)), []
    for start in range(0, length, TILE):
        query = columns.each(lambda fact: fact[:, start : start + TILE].unsqueeze(-1))  # noqa: B023  # called at once
        seen = F.pad(sees(query, key), (0, -length % TILE))
        count.append(seen.unflatten(-1, (-1, TILE)).sum((1, 3)))
    seen_of = torch.stack(count, 1).unsqueeze(1)
    whole = seen_of == TILE * TILE

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(columns.at(row, query), columns.at(row, key))

    return BlockMask.from_kv_blocks(
        *_in_order((seen_of > 0) & ~whole),
        *_in_order(whole),
        TILE,
        mask_mod,
        seq_lengths=(length, length),
    )


def _in_order(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are marked, and all tiles with the marked ones first."""
    marked = tiles.int()
    return marked.sum(-1, dtype=torch.int32), marked.argsort(
        dim=-1, descending=True, stable=True
    ).int()


def flexes(x: Tensor, width: int) -> bool:
    """Whether flex attention has a fused kernel for values like x, in heads of that width, and `sdpa_kernel` allows one."""
    fused = (
        torch.backends.cuda.flash_sdp_enabled()
    )  # not where products are counted, and attention written out for that
    return x.is_cuda and x.dtype != torch.float64 and width >= NARROWEST and fused


def attend(q: Tensor, k: Tensor, v: Tensor, seen: AttentionMask) -> Tensor:
    """softmax(q k^T / sqrt(w)) v over the columns seen: q [B,heads,L,w], k and v [B,heads,m+L,w] -> [B,heads,L,w].

    `seen` is what `Context.seen` gave for the whole pass. Flex attention leaves out what nobody sees.
    """
    if seen is None or isinstance(seen, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    # what is itself being compiled takes it in
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return flex(q, k, v, block_mask=seen)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


@final
class KeyValueCache:
    """Keys and values [B,heads,m,w] of settled columns by layer, their hidden states, and what those were made from.

    A settled column sees only settled ones, so nothing of it changes while its ids and those before it stay: the cache is
    exact, and forgets what no longer agrees with what it is shown.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.ids = torch.empty(0, 0, dtype=torch.long)
        self.block = torch.empty(0, dtype=torch.long)
        self.hidden: Tensor | None = None
        self._settling = 0

    @property
    def length(self) -> int:
        """How many columns it holds."""
        return self.ids.shape[1]

    def crop(self, ids: Tensor, block: Tensor, settled: int) -> int:
        """Keep the longest run of first columns, of the `settled` ones, that still holds for ids [B,L] and block [L].

        Its length is returned. A block is kept whole or not at all, since its columns see each other.
        """
        held = min(self.length, settled) if len(self.ids) == len(ids) else 0
        if held:
            same = (self.ids[:, :held] == ids[:, :held]).all(0) & (
                self.block[:held] == block[:held]
            )
            held = int(same.long().cumprod(0).sum())
        for numbers in (
            block,
            self.block,
        ):  # where they agree they agree on borders, so the second leaves the first true
            if held < len(numbers):
                held = int((numbers[:held] < numbers[held]).sum())
        if held < self.length:
            self.keys, self.values = (
                [x[:, :, :held] for x in layers] for layers in (self.keys, self.values)
            )
            self.ids, self.block = self.ids[:, :held], self.block[:held]
            self.hidden = None if self.hidden is None else self.hidden[:, :held]
        return held

    def begin_update(self, columns: int) -> None:
        """The first `columns` of the next pass are settled: their keys and values are to be stored."""
        self._settling = columns

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What `layer` attends to, [B,heads,m+n,w] each, for the keys and values of n new columns."""
        if layer == len(self.keys):
            self.keys.append(k[:, :, :0])
            self.values.append(v[:, :, :0])
        if self.length:
            k, v = torch.cat([self.keys[layer], k], 2), torch.cat([self.values[layer], v], 2)
        if self._settling:
            settled = self.length + self._settling
            self.keys[layer], self.values[layer] = k[:, :, :settled], v[:, :, :settled]
        return k, v

    def finish_update(self, ids: Tensor, block: Tensor, hidden: Tensor) -> Tensor:
        """After a pass over columns up to L' = those of ids [B,L'], block [L']: all their hidden states [B,L',width].

        `hidden` [B,n,width] are those of the pass. What it stored counts from now on.
        """
        whole = (
            torch.cat([self.hidden, hidden], 1)
            if self.hidden is not None and self.length
            else hidden
        )
        settled = self.length + self._settling
        self.ids, self.block, self.hidden = ids[:, :settled], block[:settled], whole[:, :settled]
        self._settling = 0
        return whole
