"""State of a training run that checkpoints store in addition to model and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddiff.training.metrics import StepRecord


@dataclass
class RunState:
    """Counts of finished and skipped steps, and the metrics since the tracker's last report."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # last report to the tracker
    window: list[StepRecord] = field(default_factory=list)  # steps since that report

    def count_step(self, is_finite: bool) -> None:
        """Count a finished step, and count it as skipped unless loss and gradients are finite."""
        self.step += 1
        self.skipped_steps += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1

    def to_tree(self) -> dict[str, Any]:
        """Return the fields for a checkpoint, which stores `step` separately."""
        return {
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "metrics": self.metrics,
            "window": [record.to_tree() for record in self.window],
        }

    @classmethod
    def from_tree(cls, step: int, tree: Mapping[str, Any]) -> RunState:
        """Build the state from the output of `to_tree` and the step of the checkpoint."""
        window = [StepRecord.from_tree(record) for record in tree["window"]]
        return cls(
            step=step,
            skipped_steps=tree["skipped_steps"],
            skipped_in_a_row=tree["skipped_in_a_row"],
            metrics=tree["metrics"],
            window=window,
        )


def get_random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's random generators, from which dropout draws.

    The objective and the data use a `CounterRng`, which has no state.
    """
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Set torch's random generators to a state that `get_random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
