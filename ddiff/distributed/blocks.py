"""Blocks of a backbone, the units of sharding, compilation and activation recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """List the blocks of a module, in module order.

    A block is an element, with parameters, of an `nn.ModuleList` that is not inside another
    `nn.ModuleList`.
    """
    return [block for block in _iterate_lists(module) if any(True for _ in block.parameters())]


def recompute_activations(module: nn.Module) -> None:
    """Store only the input of each block, and recompute its activations in the backward pass.

    Recomputation saves memory, and needs about a third more computation.
    """
    for block in find_blocks(module):
        # Replace `forward`, because a wrapper module would change the names of the parameters.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(module: nn.Module) -> None:
    """Compile each block of a module in place, as one graph.

    Blocks with the same code and shapes share a compiled graph. Call this function before
    `recompute_activations`, because torch.compile cannot compile the recomputation as one graph.
    """
    for block in find_blocks(module):
        block.forward = torch.compile(block.forward, fullgraph=True)


def _iterate_lists(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _iterate_lists(child)
