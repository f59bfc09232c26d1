"""Backends of the engine as recipe components."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import ArgumentError, ComponentConfig

if TYPE_CHECKING:  # importing torch's sharding takes a second, which a single process need not pay
    import torch

    from ddiff import Backend, SingleBackend


class Single:
    """One process on one device."""

    @staticmethod
    def build(config: ComponentConfig, *, device: str, processes: int) -> SingleBackend:
        if processes != 1:
            raise ArgumentError(
                f'the kind "single" runs one process; got processes = {processes}. '
                'Leave it out, or take kind = "ddp" or "fsdp".'
            )
        from ddiff import SingleBackend

        return SingleBackend(device)


class DataParallel:
    """Data parallelism: every process holds the whole model and a share of every batch.

    Under torchrun the number of processes is torchrun's.
    """

    is_distributed = True

    @staticmethod
    def build(config: ComponentConfig, *, device: str, processes: int) -> Backend:
        from ddiff import DistributedBackend, SingleBackend

        if processes == 1 and not DistributedBackend.is_started():
            return SingleBackend(device)
        return DistributedBackend(device, processes)


class FullySharded:
    """Fully sharded data parallelism: every process holds a shard of the model and of every batch.

    Under torchrun the number of processes is torchrun's.
    """

    is_distributed = True

    @staticmethod
    def build(
        config: ComponentConfig, *, device: str, processes: int, precision: torch.dtype | None
    ) -> Backend:
        from ddiff import ShardedBackend, SingleBackend

        if processes == 1 and not ShardedBackend.is_started():
            return SingleBackend(device)
        return ShardedBackend(device, processes, precision)
