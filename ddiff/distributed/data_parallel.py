"""Data-parallel backends, in which each process trains on a part of each global batch.

The loss of a rank is already divided by the token count of the global batch, so gradients are
summed over the ranks and not averaged. The result of a step does not depend on the number of
processes, except for rounding: floating-point sums are computed in another order.
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
from ddiff.distributed.single import choose_device, clip_grad_norm, resolve_device
from ddiff.errors import ArgumentError

_PREPARING = timedelta(days=7)  # timeout of the other ranks while rank 0 prepares data


class _RankBackend:
    """Base class of the backends for processes that torchrun or `ddiff run` started.

    Raises ArgumentError if this process was not started by torchrun or `ddiff run`.

    Args:
        device: "cuda" (one GPU per process, with NCCL), "cpu" (with Gloo), or "auto" ("cuda" if the
            machine has a GPU, otherwise "cpu").
        processes: expected number of started processes. 1 accepts any number.
    """

    def __init__(self, device: str = "auto", processes: int = 1) -> None:
        info = get_rank_info()
        if info is None:
            raise ArgumentError(
                f"processes = {processes} needs {processes} processes, which must be started by "
                "the command `ddiff run`, or by torchrun for a Python script; only this process "
                "was started. Use `ddiff run` or torchrun, or remove `processes`."
            )
        if processes not in (1, info.world_size):
            raise ArgumentError(
                f"processes must be {info.world_size}, the number of processes that torchrun "
                f"started, or be omitted; got {processes}."
            )
        if device not in ("auto", "cpu", "cuda"):
            raise ArgumentError(
                'With several processes, device must be "auto", "cpu" or "cuda", because each '
                f'process uses its own GPU; got "{device}". Select the GPUs with '
                "CUDA_VISIBLE_DEVICES."
            )
        self.rank = info.rank
        self.world_size = info.world_size
        self.device = resolve_device(choose_device(device, info.local_rank))
        on_gpu = self.device.type == "cuda"
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
        self._turns = 0  # number of calls of `main_process_first`

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
        # The store is used instead of a barrier, which times out after minutes: rank 0 may tokenize
        # for hours.
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
            gc.collect()  # destroy released DDP wrappers before their process group
            dist.destroy_process_group()


@final
class DistributedBackend(_RankBackend):
    """Data-parallel backend in which every process holds the whole model (DDP)."""

    def wrap(self, module: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            # Newer versions of torch warn that broadcast_buffers is renamed; torch 2.9 does not
            # have the new name.
            warnings.simplefilter("ignore", FutureWarning)
            # A rank may not use a parameter in a step. An example is the embedding of a condition
            # that no sequence of the rank has.
            wrapped = DistributedDataParallel(
                module.to(self.device), broadcast_buffers=False, find_unused_parameters=True
            )
        # A lambda, because DDP checks the annotations of a function, which are strings in this
        # module.
        wrapped.register_comm_hook(None, lambda _, bucket: _sum_bucket(bucket))
        return wrapped

    def unwrap(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, DistributedDataParallel) else module

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        # Required for correctness: without no_sync, gradients that are already summed over the
        # ranks would be summed again together with those of the next micro-batch.
        assert isinstance(module, DistributedDataParallel)
        return module.no_sync()

    def gather_weights(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


@final
class ShardedBackend(_RankBackend):
    """Data-parallel backend in which every process holds a shard of the model (FSDP2).

    Parameters, gradients and optimizer state are sharded (arXiv 2304.11277). The weights of each
    block of the backbone are gathered for its forward pass and again for its backward pass.
    The weights of embeddings and head, which are outside the blocks, remain gathered from the
    forward to the backward pass. Gradients are summed in float32.

    A rank may not use a parameter in a step, such as the embedding of a condition that none of its
    sequences has. The gradient on this rank is then zero, and the parameter is still updated on all
    ranks. Such a step needs torch 2.13; older versions raise an error.

    Args:
        device, processes: as in `DistributedBackend`.
        precision: dtype of the gathered weights on a GPU. None: the dtype of the weights.
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
        # On a CPU, torch has no layer norm of float32 inputs with bfloat16 weights, and gathering
        # in bfloat16 would save little time.
        precision = None if self.device.type == "cpu" else self.precision
        policy = MixedPrecisionPolicy(
            param_dtype=precision,
            reduce_dtype=precision and torch.float32,
            cast_forward_inputs=False,
        )
        for block in find_blocks(module):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # Embeddings and head form one group. The module's forward calls the head, so that the
        # output matrix is gathered once for all chunks of rows.
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
        # An evaluation calls embeddings and head without the module's forward, which would gather
        # their weights.
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
    """Sum a bucket of gradients over the ranks. DDP's default hook would average the gradients."""
    future: torch.futures.Future[list[Tensor]] = dist.all_reduce(
        bucket.buffer(), async_op=True
    ).get_future()
    return future.then(lambda done: done.value()[0])
