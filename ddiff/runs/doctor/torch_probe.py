"""Probe of `ddiff doctor`: import torch and print its build and devices as JSON."""

from __future__ import annotations

import importlib.util
import json
import warnings
from typing import Any


def probe() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # a driver that is too old is reported only as a warning
        has_cuda = torch.cuda.is_available()
    devices = []
    for number in range(torch.cuda.device_count() if has_cuda else 0):
        properties = torch.cuda.get_device_properties(number)
        devices.append({"name": properties.name, "bytes": properties.total_memory})
    distributed = dist.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "devices": devices,
        "warnings": [" ".join(str(warning.message).split()) for warning in caught],
        "mps_built": torch.backends.mps.is_built(),
        "mps": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
        "gloo": distributed and dist.is_gloo_available(),
        "nccl": distributed and dist.is_nccl_available(),
        "triton": importlib.util.find_spec("triton") is not None,
    }


if __name__ == "__main__":
    print(json.dumps(probe()))
