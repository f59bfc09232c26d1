"""The blocks of a trunk: the layers of one shape that are sharded, compiled and recomputed one by one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The elements of every outermost `nn.ModuleList` with parameters of their own, in the order of the module."""
    return [block for block in _listed(module) if any(True for _ in block.parameters())]


def recompute_activations(module: nn.Module) -> None:
    """Keep of each block its input alone, and compute the rest again in the backward: less memory, a third more work."""
    for block in blocks_of(module):
        # in place of a wrapper, which would rename every parameter below it
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(module: nn.Module) -> None:
    """Compile each block in place (torch.compile, one graph without breaks), so that equal blocks are compiled once.

    What is recomputed must be compiled first: compilers do not look through the recomputation.
    """
    for block in blocks_of(module):
        block.forward = torch.compile(block.forward, fullgraph=True)


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _listed(child)
