"""Memory that a training step frees is reused by the next step."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from ddiff.distributed.allocator import keep_freed_memory
is_kept = keep_freed_memory()
def step():
    for _ in range(5):
        held = [torch.ones(4 << 20) for _ in range(4)]  # 16 MB each
        del held
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(int(is_kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt requires glibc")
def test_keep_freed_memory_reduces_page_faults() -> None:
    def run_and_count_faults(**environment: str) -> list[int]:
        command = [sys.executable, "-c", STEPS]
        answer = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | environment
        )
        return [int(number) for number in answer.stdout.split()]

    is_kept, kept = run_and_count_faults()
    # The steps allocate 320 MB in total: 80,000 pages of 4 KB, or 160 pages of 2 MB. With kept
    # memory these page faults disappear, and only a few of the rest of the process remain.
    assert is_kept == 1
    assert kept < 80
    is_kept, given_back = run_and_count_faults(MALLOC_MMAP_THRESHOLD_="1048576")
    assert is_kept == 0
    assert given_back >= 160
