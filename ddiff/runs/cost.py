"""Cost of a model (parameters, FLOPs, logits and bytes), and peak FLOPs of a device."""

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
from ddiff.nn.denoiser import Denoiser, count_parameters
from ddiff.nn.embedding import StateEmbedding
from ddiff.nn.heads import Head

# Ratio of the FLOPs of a training step to the FLOPs of the forward pass: the backward pass computes
# two matrix products for each product of the forward pass.
TRAINING = 3
# Dense bfloat16 FLOPs per second from the data sheets, by a part of the device name.
PEAKS = (("H200", 989e12), ("H100", 989e12), ("A100", 312e12))


class Parameters(NamedTuple):
    """Numbers of parameters of the backbone, of the state embeddings, and of the head.

    The state embeddings have one row per token, tree node and mask. `backbone` does not include
    them.
    """

    backbone: int
    embedding: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)

    @classmethod
    def of(cls, denoiser: Denoiser) -> Parameters:
        """Count the parameters of a denoiser by group: backbone, embedding and head."""
        embedding = 0
        for module in denoiser.backbone.modules():
            if isinstance(module, StateEmbedding):
                embedding += count_parameters(module)
        head = count_parameters(denoiser.head)
        return cls(count_parameters(denoiser) - embedding - head, embedding, head)


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory on one rank during training.

    `parameters`, `gradients`, `optimizer`: bytes of weights, gradients and optimizer state.
    `activations`: peak bytes during a step, minus the bytes that stay allocated between steps.
    `average`: bytes of the exponential moving average. `exchange`: bytes of the communication
    buffers. Under DDP the buffers contain gradients, and under FSDP gathered weights and their
    gradients.
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
        """Return the memory footprint of a rank under DDP.

        Every rank stores the whole model, and communication buffers as large as the gradients.
        """
        return replace(self, exchange=self.gradients)

    def shard(self, ranks: int, gathered: float) -> Footprint:
        """Return the memory footprint of a rank under FSDP.

        Each rank stores a fraction 1 / `ranks` of the model, `gathered` bytes of gathered weights,
        and `gathered` bytes of their gradients, which are freed when the gradients are reduced.
        """
        return Footprint(
            parameters=self.parameters / ranks,
            gradients=self.gradients / ranks,
            optimizer=self.optimizer / ranks,
            activations=self.activations,
            average=self.average / ranks,
            exchange=2 * gathered,
        )


def gathered_bytes(denoiser: nn.Module) -> int:
    """Return the largest number of bytes of weights that FSDP gathers at the same time.

    FSDP gathers all weights outside the blocks of the backbone, and the weights of one block. The
    result is the number of bytes for the largest block.
    """
    blocks = [num_bytes(block.parameters()) for block in find_blocks(denoiser)]
    return num_bytes(denoiser.parameters()) - sum(blocks) + max(blocks, default=0)


def num_bytes(tree: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and iterators."""
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
    """Count the logits that the head computes inside the `with` block."""
    logits = LogitCount()
    head.on_logits = logits.add
    try:
        yield logits
    finally:
        head.on_logits = None


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of matrix products inside the `with` block.

    The product of an n x m and an m x k matrix counts 2 n m k FLOPs. Attention uses the
    mathematical kernel of torch inside the block, because FLOPs of fused kernels are not counted.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        yield counter


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Return the peak FLOPs per second of a device, and a text that names its source.

    The source is a data sheet, or a timed product of matrices on the device.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, figure in PEAKS:
            if known in name:
                return figure, f"{known}, dense bfloat16, by its data sheet"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype_name = str(dtype).removeprefix("torch.")
    return _time_products(device, dtype), f"a {dtype_name} product of matrices, timed here"


def _time_products(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of the fastest of six matrix products."""
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
    """Return the free bytes of a GPU, or of main memory for a CPU."""
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
    """Wait until a GPU has finished all queued kernels. Do nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
