"""Blocks of a backbone, which are sharded, compiled and recomputed one by one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """List the elements, with parameters, of every outermost `nn.ModuleList`, in module order."""
    return [block for block in _iterate_lists(module) if any(True for _ in block.parameters())]


def recompute_activations(module: nn.Module) -> None:
    """Keep only the input of each block and recompute the rest in the backward pass.

    This takes less memory and a third more work.
    """
    for block in find_blocks(module):
        # A wrapper module would rename every parameter below it.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(module: nn.Module) -> None:
    """Compile each block in place, as one graph, so that equal blocks are compiled once.

    To be called before `recompute_activations`: compilers do not see through the recomputation.
    """
    for block in find_blocks(module):
        block.forward = torch.compile(block.forward, fullgraph=True)


def _iterate_lists(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _iterate_lists(child)
