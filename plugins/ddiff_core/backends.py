"""The engine's backends as components of a recipe."""

from __future__ import annotations

import torch

from ddiff import ArgumentError, Backend, ComponentConfig, DistributedBackend, ShardedBackend, SingleBackend


class Single:
    """One process on one device."""

    @staticmethod
    def build(config: ComponentConfig, *, device: str, processes: int) -> SingleBackend:
        if processes != 1:
            raise ArgumentError(
                f'the kind "single" runs one process; got processes = {processes}. Leave it out, or take kind = "ddp" or '
                '"fsdp".'
            )
        return SingleBackend(device)


class DataParallel:
    """Several processes, each with the whole model and its share of every batch; under torchrun as many as it starts."""

    several = True

    @staticmethod
    def build(config: ComponentConfig, *, device: str, processes: int) -> Backend:
        if processes == 1 and not DistributedBackend.started():
            return SingleBackend(device)
        return DistributedBackend(device, processes)


class FullySharded:
    """Several processes, each with a share of the model and of every batch; under torchrun as many as it starts."""

    several = True

    @staticmethod
    def build(config: ComponentConfig, *, device: str, processes: int, precision: torch.dtype | None) -> Backend:
        if processes == 1 and not ShardedBackend.started():
            return SingleBackend(device)
        return ShardedBackend(device, processes, precision)
