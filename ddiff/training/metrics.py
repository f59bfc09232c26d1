"""Per-step metrics as JSON lines (`metrics.jsonl`).

After a killed run is resumed, the file has exactly one line per step.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import fsspec

from ddiff.atomic import write_atomic
from ddiff.errors import CheckpointError
from ddiff.run_dir.files import METRICS as FILE

# Fields with times. Two runs of the same recipe may differ only in these fields.
WALL_CLOCK = ("seconds", "tokens_per_second")


@dataclass(frozen=True)
class StepRecord:
    """Loss, gradient norm and other figures of one training step.

    `step` counts from 1, `seconds` is the wall-clock time since the end of the step before, without
    evaluations and samples, and `metrics` maps names to (sum, count).
    """

    step: int
    loss: float
    grad_norm: float
    lr_multiplier: float
    tokens: float
    seconds: float
    skipped_steps: int
    metrics: Mapping[str, tuple[float, float]]

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are finite. Otherwise the step changed no parameter."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> StepRecord:
        return cls(**tree)


def summarize(records: Sequence[StepRecord]) -> dict[str, float]:
    """Return the mean of each metric over consecutive steps, by name.

    `train_loss` and `grad_norm` are means over the steps with finite loss and gradient norm. Each
    entry of `StepRecord.metrics` is its total sum divided by its total count, over the same steps.
    `tokens` and `seconds` are totals over all steps, and `tokens_per_second` is their quotient.
    """
    taken = [record for record in records if record.is_finite]
    figures: dict[str, float] = {}
    if taken:
        figures["train_loss"] = sum(record.loss for record in taken) / len(taken)
        figures["grad_norm"] = sum(record.grad_norm for record in taken) / len(taken)
    names = dict.fromkeys(name for record in taken for name in record.metrics)  # in order
    for name in names:
        pairs = [record.metrics[name] for record in taken if name in record.metrics]
        total = sum(pair[0] for pair in pairs)
        count = sum(pair[1] for pair in pairs)
        if count:
            figures[name] = total / count
    tokens = sum(record.tokens for record in records)
    seconds = sum(record.seconds for record in records)
    figures["lr_multiplier"] = records[-1].lr_multiplier
    figures["skipped_steps"] = records[-1].skipped_steps
    figures["tokens"] = tokens
    figures["seconds"] = seconds
    figures["tokens_per_second"] = tokens / max(seconds, 1e-9)
    return figures


@final
class MetricsFile:
    """Writer of `metrics.jsonl` in a run directory.

    `start` is the step at which training begins or resumes. Lines of steps after `start` are
    deleted, and new lines are appended.
    """

    def __init__(self, run_dir: str | os.PathLike[str], start: int) -> None:
        self._fs, root = fsspec.core.url_to_fs(os.fspath(run_dir))
        self.path = f"{root}/{FILE}"
        # An earlier process may have written lines after its last checkpoint. These lines are
        # dropped, because their steps are repeated.
        lines = _read_lines(self._fs, self.path, start)
        write_atomic(self.path, b"".join(lines), system=self._fs)
        self._file = self._fs.open(self.path, "ab")

    def append(self, record: StepRecord, validation: Mapping[str, float] = {}) -> None:
        """Append one line with the metrics of a step and of the validation after the step."""
        figures = {"step": record.step} | summarize([record]) | dict(validation)
        line = json.dumps(figures, allow_nan=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def check_metrics(run_dir: str | os.PathLike[str], start: int) -> None:
    """Raise CheckpointError unless `metrics.jsonl` has the lines of steps 1 to `start`."""
    fs, root = fsspec.core.url_to_fs(os.fspath(run_dir))
    _read_lines(fs, f"{root}/{FILE}", start)


def _read_lines(
    fs: Any,
    path: str,
    start: int,
) -> list[bytes]:
    """Read the lines of the first `start` steps.

    Raises CheckpointError if a line is missing or damaged.
    """
    lines: list[bytes] = []
    try:
        if start and fs.exists(path):
            with fs.open(path, "rb") as file:
                lines = file.read().splitlines(keepends=True)[:start]
    except OSError as error:
        raise CheckpointError(
            f"The metrics file {path} cannot be read ({error.strerror or error}). Restore the file "
            "from a copy, or start over with `ddiff run` and --fresh."
        ) from error
    whole = 0
    while whole < len(lines) and _step_of(lines[whole]) == whole + 1:
        whole += 1
    if whole != start:
        raise CheckpointError(
            f"{path} has valid lines for only the first {whole} of the {start} training steps "
            "of the checkpoint: the file was changed or removed after training wrote it. "
            "Restore the file from a copy, or start over with `ddiff run` and --fresh."
        )
    return lines


def _step_of(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
