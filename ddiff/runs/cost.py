"""Counted cost of a model: parameters, FLOPs, logits and bytes; and what devices can do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddiff.distributed.blocks import find_blocks
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.embedding import StateEmbedding
from ddiff.nn.heads import Head

# FLOPs of a training step over those of its forward pass: the backward pass computes two products
# for each one of the forward pass.
TRAINING = 3
# Dense bfloat16 FLOPs per second by the data sheets; the first name that occurs in the device's.
PEAKS = (("H200", 989e12), ("H100", 989e12), ("A100", 312e12))


class Parameters(NamedTuple):
    """Numbers of parameters of the backbone, of its state embeddings, and of the head.

    `backbone` does not include the embeddings.
    """

    backbone: int
    embedding: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)

    @classmethod
    def of(cls, denoiser: Denoiser) -> Parameters:
        """Count the parameters of a denoiser."""
        embedding = 0
        for module in denoiser.backbone.modules():
            if isinstance(module, StateEmbedding):
                embedding += count_parameters(module)
        head = count_parameters(denoiser.head)
        return cls(count_parameters(denoiser) - embedding - head, embedding, head)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank while it trains.

    `activations` is the rise during a step above what is held between steps; `exchange` are the
    buffers of gradients or gathered weights.
    """

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

    def replicate(self) -> Footprint:
        """Footprint under DDP: every rank holds everything, and buckets of the gradients' size."""
        return replace(self, exchange=self.gradients)

    def shard(self, ranks: int, gathered: float) -> Footprint:
        """Footprint under FSDP: a share of everything, and `gathered` bytes of weights.

        The gathered weights have gradients of the same size, before these are reduced.
        """
        return Footprint(
            parameters=self.parameters / ranks,
            gradients=self.gradients / ranks,
            optimizer=self.optimizer / ranks,
            activations=self.activations,
            average=self.average / ranks,
            exchange=2 * gathered,
        )


def gathered_bytes(denoiser: Denoiser) -> int:
    """Bytes of weights that FSDP gathers at once: all outside the blocks, and the largest block."""
    blocks = [num_bytes(block.parameters()) for block in find_blocks(denoiser)]
    return num_bytes(denoiser.parameters()) - sum(blocks) + max(blocks, default=0)


def num_bytes(tree: Any) -> int:
    """Bytes of all tensors in a tree of dicts, lists and iterators."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(map(num_bytes, tree.values()))
    if isinstance(tree, Iterable) and not isinstance(tree, str):
        return sum(map(num_bytes, tree))
    return 0


@dataclass
class LogitCount:
    """Number of logits that a head has computed."""

    total: int = 0

    def add(self, count: int) -> None:
        self.total += count


@contextmanager
def count_logits(head: Head) -> Iterator[LogitCount]:
    """Count every logit that the head computes in the block."""
    logits = LogitCount()
    head.on_logits = logits.add
    try:
        yield logits
    finally:
        head.on_logits = None


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Count the matrix products in the block by their shapes, 2 n m k FLOPs each.

    Attention is computed by its plain formula there, since fused kernels would not be counted.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        yield counter


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Highest FLOPs per second, and where the figure comes from: a data sheet, or timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, figure in PEAKS:
            if known in name:
                return figure, f"{known}, dense bfloat16, by its data sheet"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype_name = str(dtype).removeprefix("torch.")
    return _time_products(device, dtype), f"a {dtype_name} product of matrices, timed here"


def _time_products(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the fastest of six matrix products."""
    n = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def free_bytes(device: torch.device) -> float:
    """Bytes that are free on the device, or available in this machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        if line.startswith("MemAvailable"):
            return float(line.split()[1]) * 1024.0
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def synchronize(device: torch.device) -> None:
    """Wait for all work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
