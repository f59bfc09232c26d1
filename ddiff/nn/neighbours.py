"""Depthwise convolutions over positions that obey the rules of attention.

A convolution has an odd number of taps. A tap at the offset o from the middle reads, for an input
at position p, the input at position p + o to which that input may attend (see `may_attend`), and
zero if there is none. A convolution therefore reads no padding, no other document, no later block,
and no noisy input where the clean copy is meant. At most one input qualifies: of the two inputs at
a position of a paired layout, a clean input attends only to the clean one, and a noisy input to the
noisy one in its own block and to the clean one in earlier blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddiff.nn.attention import KeyValueCache, PositionFacts, may_attend


class Link(NamedTuple):
    """Inputs that one tap reads, for consecutive inputs.

    Input number `query` + i reads the column `key` + i, for i = 0, ..., `size` - 1. A column is an
    input, or a cached input before the first input.

    Attributes:
        tap: number of the tap.
        query, key: numbers of the first input and of its column.
        size: number of inputs.
        mask: [1 or B,size,1] float, 1 if the input may attend to the column, else 0. None: all
            inputs may.
    """

    tap: int
    query: int
    key: int
    size: int
    mask: Tensor | None


class Neighbours(NamedTuple):
    """Inputs that the taps of a convolution read; all convolutions of a network share them.

    `Context.neighbours` makes this object.

    Attributes:
        links: inputs that the taps read, except the middle tap, which reads the input itself.
        num_prefix: number of inputs before the sequence, which convolutions leave unchanged.
        num_before: number of cached columns that convolutions read.
        cache: columns of earlier inputs; None: no cache.
        layer: number of the layer whose convolutions are computed; matters only with a cache.
    """

    links: tuple[Link, ...]
    num_prefix: int = 0
    num_before: int = 0
    cache: KeyValueCache | None = None
    layer: int = 0

    def in_layer(self, layer: int) -> Neighbours:
        """Return the neighbours for convolutions in layer number `layer`."""
        # Without a cache all layers share one object, so that torch.compile sees no difference.
        return self if self.cache is None else self._replace(layer=layer)

    def convolve(self, h: Tensor, weight: Tensor, number: int) -> Tensor:
        """Return h [B,n,d] plus its convolution with `weight` [taps,d].

        Channel c of the result at input i is h[i,c] + sum_k weight[k,c] h[j(i,k),c], where tap k
        reads the input j(i,k); the term is absent if there is no such input. `number` is the number
        of the convolution in its layer. Inputs before the sequence are returned unchanged.
        """
        weight = weight.to(h.dtype)
        if not self.num_prefix:
            return self._convolve(h, weight, number)
        prefix = h[:, : self.num_prefix]
        sequence = self._convolve(h[:, self.num_prefix :], weight, number)
        return torch.cat([prefix, sequence], 1)

    def _convolve(self, h: Tensor, weight: Tensor, number: int) -> Tensor:
        if self.cache is not None:
            name = (self.layer, number)
            columns = self.cache.update_columns(name, h, self.num_before)
            return add_convolution(h, columns, weight, self.links)
        plan = tuple(link[:4] for link in self.links)
        masks = [link.mask for link in self.links]
        return _Convolution.apply(h, weight, plan, *masks)


def find_neighbours(
    facts: PositionFacts | None,
    length: int,
    taps: int,
    dtype: torch.dtype,
    cached: int = 0,
    is_paired: bool = False,
) -> Neighbours:
    """Find the inputs that each tap reads.

    Args:
        facts: properties of the m cached and the n new inputs; None: no input is hidden.
        length: number n of new inputs.
        taps: odd number of taps.
        dtype: dtype of the masks.
        cached: number m of cached inputs, at the positions before those of the new inputs.
        is_paired: the inputs are clean inputs followed by as many noisy inputs at the same
            positions; else they have consecutive positions.
    """
    reach = taps // 2
    num_before = min(cached, reach)
    runs = [(0, 0)]
    if is_paired:
        length = length // 2
        # Clean inputs attend to no noisy input, so the fourth pair of halves has no links.
        runs = [(0, 0), (length, length), (length, 0)]
    links = []
    for tap in range(taps):
        offset = tap - reach
        first = max(0, -offset - num_before)
        size = length - max(0, offset) - first
        if offset == 0 or size <= 0:
            continue
        for query_run, key_run in runs:
            query = query_run + first
            key = key_run + num_before + first + offset
            mask = None
            if facts is not None:
                queries = _select_range(facts, cached + query, size)
                keys = _select_range(facts, cached - num_before + key, size)
                mask = may_attend(queries, keys).unsqueeze(-1).to(dtype)
            links.append(Link(tap, query, key, size, mask))
    return Neighbours(tuple(links), num_before=num_before)


def _select_range(facts: PositionFacts, first: int, size: int) -> PositionFacts:
    return facts.map(lambda fact: fact.narrow(1, first, size))


def add_convolution(h: Tensor, columns: Tensor, weight: Tensor, links: Sequence[Link]) -> Tensor:
    """Return h [B,n,d] plus the convolution of the columns with `weight` [taps,d].

    The middle tap reads h, and the other taps read the columns that `links` names.
    """
    out = torch.addcmul(h, h, weight[len(weight) // 2])
    for tap, query, key, size, mask in links:
        factor = weight[tap]
        if mask is not None:
            factor = factor * mask.to(h.dtype)
        out.narrow(1, query, size).addcmul_(columns.narrow(1, key, size), factor)
    return out


class _Convolution(torch.autograd.Function):
    """`add_convolution` in which the inputs are the columns.

    The gradients of the slices are added in place. Autograd would make a tensor of zeros in the
    shape of h for every slice, which takes several times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        plan: tuple[tuple[int, int, int, int], ...],
        *masks: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(h, weight, *masks)
        ctx.plan = plan
        return add_convolution(h, h, weight, _join_links(plan, masks))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, *masks = ctx.saved_tensors
        middle = len(weight) // 2
        grad_h = torch.addcmul(grad, grad, weight[middle])
        grad_taps = torch.zeros_like(weight)
        grad_taps[middle] = (grad * h).sum((0, 1))
        for tap, query, key, size, mask in _join_links(ctx.plan, masks):
            part = grad.narrow(1, query, size)
            if mask is not None:
                part = part * mask.to(h.dtype)
            grad_taps[tap] += (part * h.narrow(1, key, size)).sum((0, 1))
            grad_h.narrow(1, key, size).addcmul_(part, weight[tap])
        return grad_h, grad_taps, None, *(None for _ in masks)


def _join_links(
    plan: Sequence[tuple[int, int, int, int]], masks: Sequence[Tensor | None]
) -> list[Link]:
    """Build links from their numbers `plan` and their masks, which autograd saves separately."""
    return [Link(*numbers, mask) for numbers, mask in zip(plan, masks, strict=True)]
