"""What a run costs by counting: parameters, products of matrices, bytes on each rank; and what devices can do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddiff.distributed.blocks import blocks_of
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.embedding import StateEmbedding
from ddiff.nn.heads import Head

TRAINING = 3  # FLOPs of forward and backward in units of the forward: a backward has two products for each of its own
# Dense bfloat16 products per second, by the makers' data sheets; a name is looked for in this order.
PEAKS = (("H200", 989e12), ("H100", 989e12), ("A100", 312e12))


class Parameters(NamedTuple):
    """How many: of the trunk, of the embeddings of states, of the head."""

    trunk: int
    embedding: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)

    @classmethod
    def of(cls, denoiser: Denoiser) -> Parameters:
        tables = [part for part in denoiser.backbone.modules() if isinstance(part, StateEmbedding)]
        embedding, head = sum(map(size, tables)), size(denoiser.head)
        return cls(size(denoiser) - embedding - head, embedding, head)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank while it trains: what stands there all the time, and the rise of a step above it."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    average: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        standing = self.parameters + self.gradients + self.optimizer + self.average
        return standing + self.activations + self.exchange

    def replicated(self) -> Footprint:
        """Every rank holds everything, and the buckets in which gradients are summed."""
        return replace(self, exchange=self.gradients)

    def sharded(self, ranks: int, gathered: float) -> Footprint:
        """Every rank holds its share; what is `gathered` is there whole, its gradients too before they are summed."""
        share = [
            part / ranks for part in (self.parameters, self.gradients, self.optimizer, self.average)
        ]
        return Footprint(
            share[0], share[1], share[2], self.activations, share[3], exchange=2 * gathered
        )


def gathered(denoiser: Denoiser) -> int:
    """Bytes of what sharding holds gathered at once: what is outside of the trunk's blocks, and the largest of these."""
    blocks = [num_bytes(block.parameters()) for block in blocks_of(denoiser)]
    return num_bytes(denoiser.parameters()) - sum(blocks) + max(blocks, default=0)


def num_bytes(tree: Any) -> int:
    """Of all tensors in a tree of dicts, lists and iterators."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(map(num_bytes, tree.values()))
    return (
        sum(map(num_bytes, tree)) if hasattr(tree, "__iter__") and not isinstance(tree, str) else 0
    )


@dataclass
class Logits:
    """How many logits a head has computed since it was watched."""

    count: int = field(default=0)


@contextmanager
def counted(head: Head) -> Iterator[Logits]:
    """Counts every logit that the head computes within."""
    logits, dist = Logits(), head.dist

    def counting(compute: Any, top: int) -> Any:
        def computed(start: int, stop: int) -> Tensor:
            slice_ = compute(start, stop)
            logits.count += slice_.numel()
            return slice_

        return dist(computed, top)

    head.dist = counting  # type: ignore[method-assign, assignment]  # the instance's alone, until it is taken away again
    try:
        yield logits
    finally:
        del head.dist


@contextmanager
def flops() -> Iterator[FlopCounterMode]:
    """Counts the products within by their shapes, 2 n m k each; attention is written out, so that none is overlooked."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        yield counter


def peak(device: torch.device) -> tuple[float, str]:
    """FLOPs per second at most, and where the figure is from: a data sheet, or a product of matrices timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, figure in PEAKS:
            if known in name:
                return figure, f"{known}, dense bfloat16, by its data sheet"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return _measured_peak(
        device, dtype
    ), f"a {str(dtype).removeprefix('torch.')} product of matrices, timed here"


def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of some products."""
    n = 8192 if device.type == "cuda" else 1024
    matrix, best = torch.randn(n, n, device=device, dtype=dtype), float("inf")
    for _ in range(6):
        synchronise(device)
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def free_bytes(device: torch.device) -> float:
    """What the device, or this machine's memory, has to give."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        line = next(
            line
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):  # no Linux: the memory that there is
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return float(line.split()[1]) * 1024.0


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
