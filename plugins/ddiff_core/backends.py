"""Backends as recipe components: one process, data parallelism or sharding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import ArgumentError, ComponentConfig

# Importing torch's sharding takes a second, which a run in a single process does not need.
if TYPE_CHECKING:
    import torch

    from ddiff import Backend, SingleBackend


class Single:
    """Backend with one process on one device."""

    @staticmethod
    def build(config: ComponentConfig, *, device: str, processes: int) -> SingleBackend:
        if processes != 1:
            raise ArgumentError(
                f'[backend] kind = "single" runs one process; got processes = {processes}. '
                'Leave processes out, or use kind = "ddp" or "fsdp".'
            )
        from ddiff import SingleBackend

        return SingleBackend(device)


class DataParallel:
    """Data parallelism: every rank has the whole model and a part of every batch.

    Under torchrun the number of processes comes from torchrun.
    """

    is_distributed = True

    @staticmethod
    def build(config: ComponentConfig, *, device: str, processes: int) -> Backend:
        from ddiff import DistributedBackend, SingleBackend

        # One process needs no process group, except under torchrun, which has started one.
        if processes == 1 and not DistributedBackend.is_started():
            return SingleBackend(device)
        return DistributedBackend(device, processes)


class FullySharded:
    """Fully sharded data parallelism: every process has a shard of the model and of every batch.

    Under torchrun the number of processes comes from torchrun.
    """

    is_distributed = True

    @staticmethod
    def build(
        config: ComponentConfig, *, device: str, processes: int, precision: torch.dtype | None
    ) -> Backend:
        from ddiff import ShardedBackend, SingleBackend

        # One process needs no process group, except under torchrun, which has started one.
        if processes == 1 and not ShardedBackend.is_started():
            return SingleBackend(device)
        return ShardedBackend(device, processes, precision)
