"""Settings and result of a training run: the dataclasses that a caller of `Trainer` uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ddiff.errors import ArgumentError


@dataclass(frozen=True)
class TrainingSummary:
    """Result of `Trainer.fit`.

    Attributes:
        status: "finished" after the last step, "interrupted" by a signal, or "stopped" after
            `max_steps`.
        step: number of finished steps.
        steps: number of steps of the whole run.
        seconds: wall-clock time of this process, without earlier processes of a resumed run.
        tokens: tokens trained on by this process.
        checkpoint: path of the newest checkpoint.
        signal: number of the signal that interrupted training.
    """

    status: Literal["finished", "interrupted", "stopped"]
    step: int
    steps: int
    skipped_steps: int
    seconds: float
    tokens: float
    metrics: Mapping[str, float]  # of the last report: means over up to log_every steps
    checkpoint: str | None
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """Exit code for a shell: 0, or 128 + signal after an interruption."""
        return 128 + self.signal if self.signal is not None else 0


@dataclass(frozen=True)
class Validation:
    """Evaluation of the model at regular intervals during training.

    Args:
        every: number of steps between two evaluations.
        score: callable without arguments that returns a pair: metrics by name, for metrics.jsonl
            and the tracker, and a sentence to print. Every rank calls `score` at the same step, and
            must evaluate the same rows, because the forward pass of a sharded module needs all
            ranks.
        of_average: whether to evaluate the exponential moving average of the weights, if the run
            has one, instead of the weights.
    """

    every: int
    score: Callable[[], tuple[Mapping[str, float], str]]
    of_average: bool = False


@dataclass(frozen=True)
class Preview:
    """Sample that is drawn at regular intervals during training.

    Args:
        every: number of steps between two samples.
        draw: callable without arguments that returns a pair: a record for training_samples.jsonl,
            and a sentence to print. Rank 0 calls `draw`. If the module is sharded, every rank calls
            it at the same step, because the forward pass of a sharded module needs all ranks.
        of_average: whether to sample with the exponential moving average of the weights, if the run
            has one, instead of the weights.
    """

    every: int
    draw: Callable[[], tuple[Mapping[str, Any], str]]
    of_average: bool = False


@dataclass(frozen=True)
class TrainerSettings:
    """Sizes and intervals of a training run.

    Raises ArgumentError if a value is out of range.

    Args:
        steps: number of optimizer steps of the whole run.
        slots: number of sequences of the global batch, over all micro-batches and ranks.
        accumulate: number of micro-batches per step and rank.
        clip: largest gradient norm. None: no clipping.
        ema: decay of the exponential moving average of the weights, which checkpoints store.
            0: no average.
        log_every: number of steps between two reports to the tracker.
        checkpoint_every: number of steps between two checkpoints.
        keep: number of newest checkpoints that are kept on disk.
    """

    steps: int
    slots: int
    accumulate: int = 1
    clip: float | None = 1.0
    ema: float = 0.0
    log_every: int = 10
    checkpoint_every: int = 200
    keep: int = 2

    def __post_init__(self) -> None:
        numbers = {
            "steps": self.steps,
            "slots": self.slots,
            "accumulate": self.accumulate,
            "log_every": self.log_every,
            "checkpoint_every": self.checkpoint_every,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ArgumentError(f"TrainerSettings: {name} must be at least 1; got {value}.")
        if self.clip is not None and not self.clip > 0.0:
            raise ArgumentError(
                f"TrainerSettings: clip must be positive, or None for no clipping; got {self.clip}."
            )


@dataclass(frozen=True)
class Provenance:
    """Components, data and recipe of a run, stored in its checkpoints.

    Args:
        origins: name of a component -> Python distribution and version that provided the component.
        fingerprints: name -> fingerprint, for example of the vocabulary and of the data. A run
            resumes only with equal fingerprints.
        made_with: recipe of the run, and components that were given as Python objects (see
            ddiff.run_dir.identity).
        advice: further sentences of the message that a run cannot resume.
    """

    origins: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""
