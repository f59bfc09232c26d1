"""Copy tensors to a device without waiting for pending work of the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def get_device(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter."""
    return next(module.parameters()).device


def to_device(parts: Any, device: torch.device) -> Any:
    """Copy a tensor, or the tensors in nested tuples and dicts, to a device.

    Values that are not tensors are returned unchanged. The host does not wait for pending work of
    the device.
    """
    if isinstance(parts, Tensor):
        if device.type == "cuda" and parts.device.type == "cpu":
            # A copy from unpinned memory would block the host until the device is ready.
            return parts.pin_memory().to(device, non_blocking=True)
        return parts.to(device)
    if isinstance(parts, dict):
        copies = {name: to_device(value, device) for name, value in parts.items()}
        return type(parts)(copies)
    if isinstance(parts, tuple):
        moved = [to_device(value, device) for value in parts]
        # A NamedTuple takes its fields one by one.
        return tuple(moved) if type(parts) is tuple else type(parts)(*moved)
    return parts
