"""Probe of `ddiff doctor`: sum a number over two processes with gloo.

Arguments: the rank of this process, and a file through which the processes find each other.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta


def probe(rank: int, file: str) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    began = time.monotonic()  # after the import of torch, which takes longer
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return {"sum": total.item(), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    print(json.dumps(probe(int(sys.argv[1]), sys.argv[2])))
