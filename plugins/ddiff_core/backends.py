"""The engine's backends as components of a recipe."""

from __future__ import annotations

from ddiff import ArgumentError, Backend, ComponentConfig, DistributedBackend, SingleBackend


class Single:
    """One process on one device."""

    @staticmethod
    def build(config: ComponentConfig, *, device: str, processes: int) -> SingleBackend:
        if processes != 1:
            raise ArgumentError(
                f'the kind "single" runs one process; got processes = {processes}. Leave it out, or take kind = "ddp".'
            )
        return SingleBackend(device)


class DataParallel:
    """Several processes, each with the whole model and its share of every batch; under torchrun as many as it starts."""

    @staticmethod
    def build(config: ComponentConfig, *, device: str, processes: int) -> Backend:
        if processes == 1 and not DistributedBackend.started():
            return SingleBackend(device)
        return DistributedBackend(device, processes)

    @staticmethod
    def preview(config: ComponentConfig, *, device: str, processes: int) -> Backend:
        return SingleBackend(device)
