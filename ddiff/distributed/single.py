"""Backend for a single process on one device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ddiff.distributed.allocator import keep_freed_memory
from ddiff.errors import ArgumentError


@final
class SingleBackend:
    """Backend for a single process on one device.

    `device` is the name of a torch device, or "auto" for CUDA if available and otherwise the CPU.
    """

    rank = 0
    world_size = 1

    def __init__(self, device: str = "auto") -> None:
        self.device = resolve_device(device)
        if self.device.type == "cpu":
            keep_freed_memory()

    def wrap(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)

    def unwrap(self, module: nn.Module) -> nn.Module:
        return module

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def gather_weights(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(values)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        return clip_grad_norm(parameters, max_norm)

    def main_process_first(self) -> AbstractContextManager[None]:
        return nullcontext()

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients so that their total norm is at most `max_norm`.

    Return the norm before clipping. The method equals `torch.nn.utils.clip_grad_norm_`, but
    `max_norm = None` leaves the gradients unchanged.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def choose_device(name: str, local_rank: int) -> str:
    """Return the device of one of several processes: its own GPU, or the CPU.

    `name` is the device of the recipe, and `local_rank` the rank of the process on its machine.
    """
    on_gpu = name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())
    count = torch.cuda.device_count()
    if on_gpu and 0 < count <= local_rank:
        raise ArgumentError(
            "The processes on a machine need one GPU each; got a process with local rank "
            f"{local_rank}, and torch finds {count} GPUs. Use fewer processes: --processes of "
            "ddiff eval and ddiff sample, [backend] processes of ddiff run."
        )
    return f"cuda:{local_rank}" if on_gpu else "cpu"


def resolve_device(name: str) -> torch.device:
    """Return the torch device with the name `name`.

    "auto" is CUDA if available and otherwise the CPU. Raises ArgumentError if the device does not
    exist or cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(
            f'device must be "auto", "cpu", "cuda" or "cuda:N"; got "{name}".'
        ) from error
    if device.type == "mps":
        raise ArgumentError(
            'device "mps" cannot be used: noise times, bounds and samples are computed in float64, '
            'which Metal does not support. Use device = "cpu".'
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(
            f'device must be available to torch {torch.__version__}; got "{name}", and torch finds '
            f'{torch.cuda.device_count()} CUDA devices. Use device = "auto", or install a CUDA '
            "build of torch."
        )
    return device
