"""Samples during training as JSON lines (`training_samples.jsonl`).

After a killed run is resumed, the file has exactly one line per sample.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, final

import fsspec
from torch import nn
from torch.distributed.tensor import DTensor

from ddiff.atomic import write_atomic
from ddiff.run_dir.files import TRAINING_SAMPLES as FILE


@final
class PreviewFile:
    """Writer of `training_samples.jsonl` in a run directory.

    `start` is the step at which training begins or resumes. Lines of steps after `start`, and
    damaged lines, are deleted. New lines are appended. The file is made with the first line.
    """

    def __init__(self, run_dir: str | os.PathLike[str], start: int) -> None:
        self._fs, root = fsspec.core.url_to_fs(os.fspath(run_dir))
        self.path = f"{root}/{FILE}"
        if self._fs.exists(self.path):
            with self._fs.open(self.path, "rb") as file:
                lines = file.read().splitlines(keepends=True)
            # Training repeats the steps after its checkpoint, with their samples.
            kept = [line for line in lines if _is_kept(line, start)]
            write_atomic(self.path, b"".join(kept), system=self._fs)

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        """Append the sample that was drawn after a step."""
        line = json.dumps({"step": step, **record}, ensure_ascii=False) + "\n"
        with self._fs.open(self.path, "ab") as file:
            file.write(line.encode())


def _is_kept(line: bytes, start: int) -> bool:
    """Return whether a line is whole and belongs to one of the first `start` steps."""
    try:
        return line.endswith(b"\n") and 1 <= json.loads(line)["step"] <= start
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def is_sharded(module: nn.Module) -> bool:
    """Return whether a rank has only a part of the weights of a module."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
