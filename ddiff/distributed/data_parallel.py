"""Data-parallel training: every process takes its share of each global batch, and holds the whole model or a shard of it.

Losses are shares of one sum over global counts, so gradients are summed over the ranks and nothing is averaged: what a
step computes does not depend on how many processes compute it, up to the rounding of sums in another order.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ddiff.distributed.allocator import keep_freed_memory
from ddiff.distributed.blocks import blocks_of
from ddiff.distributed.launcher import check_address, place
from ddiff.distributed.single import clipped, device_named
from ddiff.errors import ArgumentError

_PREPARING = timedelta(days=7)  # how long the others wait while rank 0 prepares data


class Ranks:
    """One of several processes, on the CPU (gloo) or with a GPU of its own (nccl), that torchrun or `ddiff run` started.

    `device` is "auto" (a GPU for each process of this machine when there are any, else the CPU), "cpu" or "cuda";
    `processes` must be the number that was started, or 1: as many as were started. Raises ArgumentError when this
    process was started alone.
    """

    def __init__(self, device: str = "auto", processes: int = 1) -> None:
        there = place()
        if there is None:
            raise ArgumentError(
                f"processes = {processes} are started by the command `ddiff run`, or by torchrun around a Python script; "
                "this process was started alone. Use one of them, or leave processes out."
            )
        if processes not in (1, there.world_size):
            raise ArgumentError(
                f"processes must be the {there.world_size} that torchrun started, or be left out; got {processes}."
            )
        if device not in ("auto", "cpu", "cuda"):
            raise ArgumentError(
                f'device must be "auto", "cpu" or "cuda" with several processes, each of which takes its own GPU; got '
                f'"{device}". Choose the GPUs with CUDA_VISIBLE_DEVICES.'
            )
        self.rank, self.world_size = there.rank, there.world_size
        on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.device = device_named(f"cuda:{there.local_rank}" if on_gpu else "cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        check_address()
        self._store, _, _ = next(dist.rendezvous("env://", there.rank, there.world_size))
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=self._store,
            rank=there.rank,
            world_size=there.world_size,
            device_id=self.device if on_gpu else None,
        )
        self._times_first = 0

    @staticmethod
    def started() -> bool:
        """Whether `ddiff run` or torchrun started this process as one of several."""
        return place() is not None

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = torch.cat(
            [value.detach().to(self.device, torch.float64).reshape(-1) for value in values.values()]
        )
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in values.values()])
        return {
            name: part.reshape(value.shape) for (name, value), part in zip(values.items(), parts)
        }

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        norm = clipped(parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextmanager
    def first(self) -> Iterator[None]:
        # By the store and not by a barrier, which gives up after minutes: rank 0 may tokenise for hours.
        key = f"ddiff/first/{self._times_first}"
        self._times_first += 1
        if self.rank > 0:
            self._store.wait([key], _PREPARING)
        yield
        if self.rank == 0:
            self._store.set(key, "done")

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.barrier()
            gc.collect()  # a wrapper that nobody holds any more goes before the group that it speaks through
            dist.destroy_process_group()


@final
class DistributedBackend(Ranks):
    """Every process holds the whole model (DDP); the arguments are those of `Ranks`."""

    def wrap(self, module: nn.Module) -> nn.Module:
        # A parameter may go unused on some rank or in some step: a condition that no row of the share has.
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # the newer name of broadcast_buffers is not in torch 2.9
            wrapped = DistributedDataParallel(
                module.to(self.device), broadcast_buffers=False, find_unused_parameters=True
            )
        wrapped.register_comm_hook(None, lambda _, bucket: _summed(bucket))
        return wrapped

    def unwrap(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, DistributedDataParallel) else module

    def accumulating(self, module: nn.Module) -> AbstractContextManager[None]:
        # Needed, and not only faster: what is summed already would be summed again with the next micro-batch.
        assert isinstance(module, DistributedDataParallel)
        return module.no_sync()


@final
class ShardedBackend(Ranks):
    """Every process holds a share of parameters, gradients and optimizer state (FSDP2, arXiv 2304.11277).

    Each block of the trunk is gathered when it runs and dropped again, forward and backward; what is outside the blocks,
    embeddings and head, stays gathered between the two. `precision` is that in which a GPU gathers blocks (None: that of
    the weights); gradients are summed in float32. What a rank does not use in a step has a gradient of zero there, and so
    decays; before torch 2.13 such a step ends the run. The other arguments are those of `Ranks`.
    """

    def __init__(
        self, device: str = "auto", processes: int = 1, precision: torch.dtype | None = None
    ) -> None:
        super().__init__(device, processes)
        self.precision = precision

    def wrap(self, module: nn.Module) -> nn.Module:
        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        module = module.to(self.device)
        # A CPU knows no layer norm of float32 hidden states and bfloat16 weights, and gathers through memory anyway.
        precision = None if self.device.type == "cpu" else self.precision
        gathered = MixedPrecisionPolicy(
            param_dtype=precision,
            reduce_dtype=precision and torch.float32,
            cast_forward_inputs=False,
        )
        for block in blocks_of(module):
            fully_shard(block, mesh=mesh, mp_policy=gathered)
        # One group for the rest: the head is read through forward, so that its table is there for all of its chunks.
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        for shard in module.modules():
            if isinstance(shard, FSDPModule):
                if hasattr(shard, "set_reduce_scatter_unused_params"):
                    shard.set_reduce_scatter_unused_params(True, recurse=False)
                shard.set_gradient_divide_factor(1.0)
                shard.set_force_sum_reduction_for_comms(True)
        return module

    def unwrap(self, module: nn.Module) -> nn.Module:
        return module  # shards are named as the parameters that they are of

    @contextmanager
    def accumulating(self, module: nn.Module) -> Iterator[None]:
        shards = cast(FSDPModule, module)
        shards.set_requires_gradient_sync(False)
        yield
        shards.set_requires_gradient_sync(True)

    @contextmanager
    def gathering(self, module: nn.Module) -> Iterator[None]:
        """Gather what lies outside the blocks, so that head and embeddings can be queried without the module's forward."""
        shards = cast(FSDPModule, module)
        shards.unshard()
        try:
            yield
        finally:
            shards.reshard()


def _summed(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum over the ranks, where DDP's own hook gives the mean."""
    future: torch.futures.Future[list[Tensor]] = dist.all_reduce(
        bucket.buffer(), async_op=True
    ).get_future()
    return future.then(lambda done: done.value()[0])
