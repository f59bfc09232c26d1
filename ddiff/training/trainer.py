"""The training loop: batches to gradients to steps, with a record of each and a checkpoint now and then.

    optimizer = muon(backend.wrap(objective.module))
    settings = TrainerSettings(steps=1500, slots=64)
    trainer = Trainer(
        objective, optimizer, batch_at, rng_at, settings, backend=backend, run_dir="runs/a"
    )
    summary = trainer.fit(trainer.checkpoints.newest())

Steps count from 0 where something is computed for them (`batch_at`, `rng_at`, `multiplier`), and finished steps count
from 1 where they are recorded. Data and noise are functions of the step, so a step number is all that resuming needs.
"""

from __future__ import annotations

import math
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from rich.console import Console
from torch import Tensor

from ddiff.checkpoint.checkpoints import Checkpoint, Checkpoints
from ddiff.data.prefetch import Prefetcher
from ddiff.errors import ArgumentError, CheckpointError, NonFiniteError
from ddiff.progress import Progress, show_progress
from ddiff.run_dir.files import CHECKPOINTS
from ddiff.run_dir.identity import check_fingerprints
from ddiff.training.device import to_device
from ddiff.training.ema import ExponentialMovingAverage
from ddiff.training.learning_rate import WarmupConstant
from ddiff.training.metrics import MetricsFile, StepRecord, check_metrics, means
from ddiff.training.optimizers import step_where
from ddiff.training.protocols import Backend, Batch, Objective, Optimizer, Tracker
from ddiff.training.signals import StopSignals
from ddiff.training.tracker import NoTracker

if TYPE_CHECKING:
    from ddiff.core.rng import CounterRng

MOST_SKIPPED_IN_A_ROW = 20


@dataclass(frozen=True)
class TrainingSummary:
    """How `fit` ended: `step` of `steps` are done; `seconds` and `tokens` count this process only.

    `status`: "finished" after the last step, "interrupted" by a signal, "stopped" after `max_steps`.
    """

    status: Literal["finished", "interrupted", "stopped"]
    step: int
    steps: int
    skipped_steps: int
    seconds: float
    tokens: float
    metrics: Mapping[str, float]  # the last that were reported: means over up to log_every steps
    checkpoint: str | None
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """0, or 128 + signal as a shell has it."""
        return 128 + self.signal if self.signal is not None else 0


@dataclass(frozen=True)
class Validation:
    """An evaluation after every `every` steps, of the moving average of the weights or of the weights themselves.

    `score()` gives figures by name, for metrics.jsonl and the tracker, and a sentence. Every rank calls it at the same
    step, on the same rows: a module in shards needs all of them.
    """

    every: int
    score: Callable[[], tuple[Mapping[str, float], str]]
    of_average: bool = False


@dataclass
class _Run:
    """Where a run stands: what a checkpoint holds besides model, optimizer and random state."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # what the tracker was last told
    window: list[StepRecord] = field(default_factory=list)  # steps since then
    end: int = 0  # the step after which this call of `fit` stops; in no checkpoint
    signal: int | None = None  # that some rank has received, agreed upon by all; in no checkpoint
    settled: float = field(
        default_factory=time.monotonic
    )  # when figures were last read; in no checkpoint

    def to_tree(self) -> dict[str, Any]:
        return {
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "metrics": self.metrics,
            "window": [record.to_tree() for record in self.window],
        }

    def count(self, finite: bool) -> None:
        self.step += 1
        self.skipped_steps += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1

    @classmethod
    def from_tree(cls, step: int, tree: Mapping[str, Any]) -> _Run:
        window = [StepRecord.from_tree(record) for record in tree["window"]]
        return cls(step, tree["skipped_steps"], tree["skipped_in_a_row"], tree["metrics"], window)


@dataclass(frozen=True)
class _Launched:
    """A step that the device has been given, whose figures the host has not read: reading them waits for the device.

    `figures` [k,2]: (gradient norm, tokens), signals, (loss, 0), then (sum, count) of each of `names`.
    """

    figures: Tensor
    names: Sequence[str]
    multiplier: float
    read: torch.cuda.Event | None = None  # when the figures have arrived, on a GPU


@dataclass(frozen=True)
class TrainerSettings:
    """Sizes and intervals of a training run. ArgumentError when one is out of range.

    Args:
        steps: optimizer steps of the whole run.
        slots: rows of the global batch, over all micro-batches and ranks.
        accumulate: micro-batches per step.
        clip: largest gradient norm; None: no clipping.
        ema: decay of the exponential moving average of the weights, stored in each checkpoint; 0: none.
        log_every: steps between two reports to the tracker.
        checkpoint_every: steps between two checkpoints.
        keep: number of checkpoints that stay on disk.
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
        for name in ("steps", "slots", "accumulate", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value < 1:
                raise ArgumentError(f"TrainerSettings: {name} must be at least 1; got {value}.")
        if self.clip is not None and not self.clip > 0.0:
            raise ArgumentError(
                f"TrainerSettings: clip must be positive, or None for no clipping; got {self.clip}."
            )


@dataclass(frozen=True)
class Provenance:
    """Plain values that a checkpoint records about the run that wrote it.

    Args:
        origins: component -> where it came from (distribution and version).
        fingerprints: vocabulary, data and whatever else a checkpoint must fit; compared on resuming.
        made_with: recipe and parts (see ddiff.run_dir.identity).
    """

    origins: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)


@final
class Trainer:
    """Train `objective.module`, one global batch per step.

    Args:
        objective: the loss; its module is on the backend already (`backend.wrap`).
        optimizer: made of the parameters of that module.
        batch_at: (step, micro) -> this rank's micro-batch, on the device that the objective
            expects; a pure function. A `ddiff.data.prefetch.Prefetcher` of one reads ahead.
        rng_at: (step, batch) -> the random generator of the batch; a pure function.
        multiplier: (step) -> factor in (0, 1] of every group's learning rate; None: always 1.
        validation: an evaluation during training; it changes no bit of what is trained.

    A step whose loss or gradient norm is not finite changes neither parameters nor optimizer state
    and is counted as skipped.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        batch_at: Callable[[int, int], Batch],
        rng_at: Callable[[int, Batch], CounterRng],
        settings: TrainerSettings,
        *,
        backend: Backend,
        run_dir: str | os.PathLike[str],
        multiplier: Callable[[int], float] | None = None,
        tracker: Tracker | None = None,
        validation: Validation | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.batch_at = batch_at
        self.rng_at = rng_at
        self.settings = settings
        self.backend = backend
        self.run_dir = os.fspath(run_dir)
        self.multiplier = multiplier or WarmupConstant()
        self.tracker: Tracker = tracker or NoTracker()
        self.validation = validation
        self.provenance = provenance or Provenance()
        self.checkpoints = Checkpoints(f"{self.run_dir}/{CHECKPOINTS}", settings.keep)
        self.average: ExponentialMovingAverage | None = None
        if settings.ema:
            module = backend.unwrap(objective.module)
            self.average = ExponentialMovingAverage(module, settings.ema)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._seed = torch.initial_seed()

    def fit(
        self,
        start: Checkpoint | None = None,
        *,
        max_steps: int | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> TrainingSummary:
        """Train from `start` (None: from the beginning) to the last step.

        Training ends earlier with the step under way when any rank receives SIGINT or SIGTERM (one
        process waiting for data that is read ahead ends at once), or after `max_steps` steps of
        this call. The latter saves no checkpoint of its own. `on_step` is called with the record of
        each step, in order, on every rank, after the record is in metrics.jsonl.

        Raises CheckpointError when `start` does not fit this trainer, NonFiniteError after 20
        skipped steps in a row.
        """
        run = self._resume(start, max_steps)
        began = time.monotonic()
        tokens = 0.0
        checkpoint = start.path if start else None
        saved = run.step  # the step of the newest checkpoint, 0 if there is none
        file = MetricsFile(self.run_dir, run.step) if self.backend.rank == 0 else None
        self.objective.module.train()
        launched: deque[_Launched] = deque()
        try:
            with StopSignals() as interruption, self._progress(run) as bar:
                while run.step < run.end and run.signal is None:
                    step = run.step + len(launched)
                    batches = self._batches(step, interruption)
                    if batches is not None:
                        launched.append(self._launch(step, batches, interruption))
                    # The figures of a step are read once the device has the next one to do, so that it never waits; but
                    # before anything is written of it.
                    due = self._is_due(run, run.step + len(launched))
                    while launched and (due or len(launched) > 1 or self._stops(run, interruption)):
                        record = self._settle(run, launched.popleft())
                        tokens += record.tokens
                        figures = (
                            self._validate(run, bar)
                            if self._is_validated(run, interruption)
                            else {}
                        )
                        if file:
                            file.append(record, figures)
                        if run.skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
                            raise NonFiniteError(self._too_many_skipped(record))
                        self._report(run, bar)
                        if on_step is not None:
                            on_step(record)
                    ends = self._stops(run, interruption) or self._is_saved(run.step)
                    if not launched and ends and run.step > saved:
                        checkpoint = self._save(run)
                        saved = run.step
        finally:
            if file:
                file.close()
            self.checkpoints.wait()
        interrupted = run.step < self.settings.steps and run.signal is not None
        finished = run.step == self.settings.steps
        return TrainingSummary(
            status="finished" if finished else "interrupted" if interrupted else "stopped",
            step=run.step,
            steps=self.settings.steps,
            skipped_steps=run.skipped_steps,
            seconds=time.monotonic() - began,
            tokens=tokens,
            metrics=run.metrics,
            checkpoint=checkpoint,
            signal=run.signal if interrupted else None,
        )

    def _is_saved(self, step: int) -> bool:
        return step == self.settings.steps or step % self.settings.checkpoint_every == 0

    def _is_due(self, run: _Run, step: int) -> bool:
        """Whether something is told, evaluated or saved after that many steps."""
        evaluated = self.validation is not None and step % self.validation.every == 0
        reported = step == run.end or step % self.settings.log_every == 0
        return self._is_saved(step) or evaluated or reported

    def _is_validated(self, run: _Run, interruption: StopSignals) -> bool:
        """Not once a signal has come: an evaluation may take longer than what sent it waits."""
        due = self.validation is not None and run.step % self.validation.every == 0
        return due and not self._stops(run, interruption)

    def _validate(self, run: _Run, bar: Progress) -> Mapping[str, float]:
        """The figures of an evaluation of the weights as they are; nothing that training goes on from is changed."""
        assert self.validation is not None
        module, before = (
            self.backend.unwrap(self.objective.module),
            _random_state(self.backend.device),
        )
        gathering = getattr(self.backend, "gathering", None)
        averaged = (
            self.average.installed()
            if self.average and self.validation.of_average
            else nullcontext()
        )
        with averaged, gathering(module) if gathering else nullcontext():
            try:
                figures, sentence = self.validation.score()
            except NonFiniteError as error:  # worth knowing, and no reason to end the run
                figures, sentence = {}, str(error)
        self.objective.module.train()
        _set_random_state(before, self.backend.device)
        if self.backend.rank == 0 and figures:
            self.tracker.log(run.step, figures)
        bar.note(f"step {run.step}: {sentence}")
        run.settled = time.monotonic()  # tokens/s are those of training
        return figures

    def _stops(self, run: _Run, interruption: StopSignals) -> bool:
        if self.backend.world_size == 1:  # nobody to agree with
            run.signal = interruption.signal
        return run.signal is not None

    def _progress(self, run: _Run) -> AbstractContextManager[Progress]:
        console = None if self.backend.rank == 0 else Console(quiet=True, force_terminal=False)
        return show_progress(run.end, "training", start=run.step, console=console)

    def _batches(self, step: int, interruption: StopSignals) -> list[Batch] | None:
        """The micro-batches of a step; None when a signal came while they were waited for."""
        batches: list[Batch] = []
        for micro in range(self.settings.accumulate):
            # Several processes only stop together, after the same step.
            if isinstance(self.batch_at, Prefetcher) and self.backend.world_size == 1:
                batch = self.batch_at.fetch(step, micro, lambda: interruption.signal is not None)
                if batch is None:
                    return None
            else:
                batch = self.batch_at(step, micro)
            batches.append(batch)
        return batches

    def _launch(self, step: int, batches: Sequence[Batch], interruption: StopSignals) -> _Launched:
        """Take one step, without waiting for it."""
        self._seed_rank(step)
        denominators = self._denominators(batches)
        shares = self._backward(step, batches, denominators)
        totals = self.backend.sum(
            {"signals": to_device(interruption.counts(), self.backend.device)} | shares
        )
        norm = self.backend.clip(self.objective.module.parameters(), self.settings.clip)
        multiplier = self.multiplier(step)
        self._update(multiplier, norm.isfinite() & totals["loss"].isfinite().all())
        tokens = torch.stack(list(denominators.values())).sum()
        figures = torch.stack([_pair(norm, tokens), *totals.values()])
        read = None
        if figures.device.type == "cuda":
            figures, read = figures.to("cpu", non_blocking=True), torch.cuda.Event()
            read.record()
        return _Launched(figures, list(totals)[2:], multiplier, read)

    def _settle(self, run: _Run, launched: _Launched) -> StepRecord:
        """Read the figures of the oldest step that was launched: the one moment at which the host waits for the device."""
        if launched.read:
            launched.read.synchronize()
        (grad_norm, items), signals, (loss, _), *pairs = launched.figures.tolist()
        run.count(math.isfinite(loss) and math.isfinite(grad_norm))
        run.signal = StopSignals.received(signals) or run.signal
        now = time.monotonic()
        record = StepRecord(
            step=run.step,
            loss=loss,
            grad_norm=grad_norm,
            lr_multiplier=launched.multiplier,
            tokens=items,
            seconds=now - run.settled,
            skipped_steps=run.skipped_steps,
            metrics=dict(zip(launched.names, map(tuple, pairs))),
        )
        run.settled = now
        run.window.append(record)
        return record

    def _denominators(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """field -> scored items of the global batch. From the data alone, so it is known before the first forward."""
        totals: dict[str, Tensor] = {}
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                count = to_device(torch.as_tensor(count, dtype=torch.float64), self.backend.device)
                totals[name] = totals[name] + count if name in totals else count
        return self.backend.sum(totals)

    def _backward(
        self, step: int, batches: Sequence[Batch], denominators: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Leave the gradients in the parameters; (loss, 0), then (sum, count) of each metric, as [2] tensors."""
        self.optimizer.zero_grad()
        totals = {"loss": torch.zeros(2, dtype=torch.float64, device=self.backend.device)}
        for micro, batch in enumerate(batches, start=1):
            with (
                nullcontext()
                if micro == len(batches)
                else self.backend.accumulating(self.objective.module)
            ):
                terms = self.objective(
                    batch, self.rng_at(step, batch), denominators, self.settings.slots
                )
                terms.loss.backward()
            totals["loss"] = totals["loss"] + _pair(terms.loss, torch.zeros_like(terms.loss))
            for name, (summed, count) in terms.metrics.items():
                pair = _pair(summed, to_device(count, summed.device))
                totals[name] = totals[name] + pair if name in totals else pair
        return totals

    def _update(self, multiplier: float, finite: Tensor) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates):
            group["lr"] = rate * multiplier
        step_where(finite, self.optimizer)
        if self.average:
            self.average.update(finite)

    def _report(self, run: _Run, bar: Progress) -> None:
        """Show the step; at every `log_every`-th, and the last, tell the tracker the means since it was last told."""
        if run.step % self.settings.log_every and run.step < run.end:
            bar.advance()
            return
        run.metrics = means(run.window)
        run.window.clear()
        if self.backend.rank == 0:
            self.tracker.log(run.step, run.metrics)
        shown = {"train_loss": "loss", "tokens_per_second": "tokens_per_second"}
        shown |= {"skipped_steps": "skipped"} if run.skipped_steps else {}
        bar.advance(
            1, **{shown[name]: value for name, value in run.metrics.items() if name in shown}
        )

    def _save(self, run: _Run) -> str:
        state = {
            "run": run.to_tree(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.average and self.average.to_tree(),
            "random": _random_state(self.backend.device),
            "multiplier": repr(self.multiplier),
            "origins": dict(self.provenance.origins),
            "fingerprints": dict(self.provenance.fingerprints),
            "made_with": dict(self.provenance.made_with),
        }
        return self.checkpoints.begin(
            run.step, self.backend.unwrap(self.objective.module).state_dict(), state
        )

    def _resume(self, start: Checkpoint | None, max_steps: int | None) -> _Run:
        run = self._restore(start)
        run.end = self.settings.steps
        if max_steps is not None:
            run.end = min(run.end, run.step + max_steps)
        return run

    def _restore(self, start: Checkpoint | None) -> _Run:
        if start is None:
            if found := self.checkpoints.steps():
                raise CheckpointError(
                    f"{self.checkpoints.root} already holds a run up to {_steps(found)}: training from the beginning "
                    "would mix the two. Go on from its newest checkpoint, empty the run directory, or name another one."
                )
            return _Run()
        self.check_fit(start)
        module = self.backend.unwrap(self.objective.module)
        start.restore(module)
        state = start.tree(like=module.parameters())
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average and state.get("ema"):
            self.average.load_tree(state["ema"])
        elif self.average:  # the run had none so far: it starts with the weights as they are now
            self.average = ExponentialMovingAverage(module, self.average.decay)
        _set_random_state(state["random"], self.backend.device)
        return _Run.from_tree(start.step, state["run"])

    def _seed_rank(self, step: int) -> None:
        """Give each rank but 0 a random state of its own, from the step alone: a checkpoint holds that of rank 0, and when
        there is one must change nothing."""
        if self.backend.rank > 0:
            torch.manual_seed(zlib.crc32(f"{self._seed} {self.backend.rank} {step}".encode()))

    def check_fit(self, start: Checkpoint) -> None:
        """Raises ArgumentError or CheckpointError when training cannot go on from `start`; `fit` asks this first."""
        if start.step > self.settings.steps:
            raise ArgumentError(
                f"Trainer: steps must be at least the {start.step} that {start.path} has behind it; "
                f"got {self.settings.steps}. Set more steps, or start over with --fresh."
            )
        check_fingerprints(
            start.path,
            start.state,
            self.provenance.fingerprints,
            "Restore what it was trained with, or start over with --fresh.",
        )
        check_metrics(self.run_dir, start.step)

    def _too_many_skipped(self, record: StepRecord) -> str:
        return (
            f"Loss or gradient was not finite in {MOST_SKIPPED_IN_A_ROW} steps in a row, the last of them step "
            f"{record.step} (loss {record.loss}, gradient norm {record.grad_norm}); none of them changed the model. "
            "Parameters, data or logits hold a NaN or overflow: lower the learning rate, lengthen the warm-up, clip "
            "harder, or look at the rows of that step. The newest checkpoint is of "
            f"{_steps(self.checkpoints.steps())}."
        )


def _pair(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first.detach().to(torch.float64), second.detach().to(torch.float64)])


def _steps(steps: Sequence[int]) -> str:
    return f"step {steps[-1]}" if steps else "no step"


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's own generators. Noise is counter-based and needs none; dropout draws from these."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
