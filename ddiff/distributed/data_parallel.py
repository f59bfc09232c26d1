"""Data-parallel backends: each process takes its share of each global batch.

Losses are shares of one sum over global counts, so gradients are summed over the ranks and not
averaged. What a step computes does not depend on the number of processes, up to the rounding of
sums in another order.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ddiff.distributed.allocator import keep_freed_memory
from ddiff.distributed.blocks import find_blocks
from ddiff.distributed.launcher import check_address, get_rank_info
from ddiff.distributed.single import clip_grad_norm, resolve_device
from ddiff.errors import ArgumentError

_PREPARING = timedelta(days=7)  # how long the other ranks wait while rank 0 prepares data


class _RankBackend:
    """One of several processes that torchrun or `ddiff run` started.

    Raises ArgumentError if this process was started as the only one.

    Args:
        device: "auto" (a GPU for each process of this machine if there are any, else the CPU),
            "cpu" (gloo) or "cuda" (nccl).
        processes: the number that was started, or 1 for any number.
    """

    def __init__(self, device: str = "auto", processes: int = 1) -> None:
        info = get_rank_info()
        if info is None:
            raise ArgumentError(
                f"processes = {processes} are started by the command `ddiff run`, or by torchrun "
                "around a Python script; this process was started alone. Use one of them, or leave "
                "processes out."
            )
        if processes not in (1, info.world_size):
            raise ArgumentError(
                f"processes must be the {info.world_size} that torchrun started, or be left out; "
                f"got {processes}."
            )
        if device not in ("auto", "cpu", "cuda"):
            raise ArgumentError(
                'device must be "auto", "cpu" or "cuda" with several processes, each of which '
                f'takes its own GPU; got "{device}". Choose the GPUs with CUDA_VISIBLE_DEVICES.'
            )
        self.rank = info.rank
        self.world_size = info.world_size
        on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.device = resolve_device(f"cuda:{info.local_rank}" if on_gpu else "cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        check_address()
        self._store, _, _ = next(dist.rendezvous("env://", info.rank, info.world_size))
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=self._store,
            rank=info.rank,
            world_size=info.world_size,
            device_id=self.device if on_gpu else None,
        )
        self._turns = 0  # blocks of `main_process_first` so far

    @staticmethod
    def is_started() -> bool:
        """Whether `ddiff run` or torchrun started this process as one of several."""
        return get_rank_info() is not None

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = torch.cat(
            [value.detach().to(self.device, torch.float64).reshape(-1) for value in values.values()]
        )
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in values.values()])
        return {
            name: part.reshape(value.shape) for (name, value), part in zip(values.items(), parts)
        }

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        norm = clip_grad_norm(parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        # A barrier gives up after minutes, and rank 0 may tokenize for hours: use the store.
        key = f"ddiff/first/{self._turns}"
        self._turns += 1
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
            gc.collect()  # a wrapper that is released must be gone before its process group
            dist.destroy_process_group()


@final
class DistributedBackend(_RankBackend):
    """Every process holds the whole model (DDP)."""

    def wrap(self, module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            # broadcast_buffers has a newer name that torch 2.9 does not know.
            warnings.simplefilter("ignore", FutureWarning)
            # A parameter may be unused on some rank or in some step, such as the embedding of a
            # condition that no row of this rank's share has.
            wrapped = DistributedDataParallel(
                module.to(self.device), broadcast_buffers=False, find_unused_parameters=True
            )
        # DDP checks the annotations of a named function, which are strings here.
        wrapped.register_comm_hook(None, lambda _, bucket: _sum_bucket(bucket))
        return wrapped

    def unwrap(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, DistributedDataParallel) else module

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        # Not only faster but necessary: gradients that are summed already would be summed again
        # together with those of the next micro-batch.
        assert isinstance(module, DistributedDataParallel)
        return module.no_sync()

    def gather_weights(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


@final
class ShardedBackend(_RankBackend):
    """Every process holds a shard of parameters, gradients and optimizer state (FSDP2, 2304.11277).

    Each block of the backbone is gathered when it runs and released again, forward and backward.
    What is outside the blocks, embeddings and head, stays gathered from forward to backward.
    Gradients are summed in float32. A parameter that a rank does not use in a step has a zero
    gradient there, and so decays; before torch 2.13 such a step ends the run.

    Args:
        device, processes: as in `DistributedBackend`.
        precision: dtype in which a GPU gathers blocks; None: that of the weights.
    """

    def __init__(
        self,
        device: str = "auto",
        processes: int = 1,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__(device, processes)
        self.precision = precision

    def wrap(self, module: nn.Module) -> nn.Module:
        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        module = module.to(self.device)
        # A CPU has no layer norm of float32 hidden states with bfloat16 weights, and gathers
        # through memory anyway.
        precision = None if self.device.type == "cpu" else self.precision
        policy = MixedPrecisionPolicy(
            param_dtype=precision,
            reduce_dtype=precision and torch.float32,
            cast_forward_inputs=False,
        )
        for block in find_blocks(module):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # One group for the rest. The head is called through the module's forward, so that its
        # table is gathered for all chunks of rows.
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        for shard in module.modules():
            if isinstance(shard, FSDPModule):
                _sum_gradients(shard)
        return module

    def unwrap(self, module: nn.Module) -> nn.Module:
        return module  # fully_shard renames no parameter

    @contextmanager
    def no_sync(self, module: nn.Module) -> Iterator[None]:
        shards = cast(FSDPModule, module)
        shards.set_requires_gradient_sync(False)
        yield
        shards.set_requires_gradient_sync(True)

    @contextmanager
    def gather_weights(self, module: nn.Module) -> Iterator[None]:
        # An evaluation queries embeddings and head without the module's forward.
        shards = cast(FSDPModule, module)
        shards.unshard()
        try:
            yield
        finally:
            shards.reshard()


def _sum_gradients(shard: FSDPModule) -> None:
    """Make FSDP sum gradients over the ranks instead of averaging them."""
    if hasattr(shard, "set_reduce_scatter_unused_params"):  # from torch 2.13
        shard.set_reduce_scatter_unused_params(True, recurse=False)
    shard.set_gradient_divide_factor(1.0)
    shard.set_force_sum_reduction_for_comms(True)


def _sum_bucket(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over the ranks; DDP's own hook would average them."""
    future: torch.futures.Future[list[Tensor]] = dist.all_reduce(
        bucket.buffer(), async_op=True
    ).get_future()
    return future.then(lambda done: done.value()[0])
