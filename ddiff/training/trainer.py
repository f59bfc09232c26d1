"""Training loop with gradient accumulation, per-step metrics, validation and checkpoints.

    optimizer = muon(backend.wrap(objective.module))
    settings = TrainerSettings(steps=1500, slots=64)
    trainer = Trainer(
        objective, optimizer, batch_at, rng_at, settings, backend=backend, run_dir="runs/a"
    )
    summary = trainer.fit(trainer.checkpoints.newest())

`batch_at(step, micro)` returns a micro-batch, and `rng_at(step, batch)` its random generator. Both
functions and the learning rate count steps from 0. Records and checkpoints count finished steps, so
their first step is 1. Data and random numbers are functions of the step, so that a resumed run
needs only the step number to continue.

The host never waits for the device in the middle of a step. The host launches a step, and reads the
loss and metrics of the previous step while the device works on the new step.
"""

from __future__ import annotations

import math
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import torch
from rich.console import Console
from torch import Tensor

from ddiff.checkpoint.checkpoints import Checkpoint, Checkpoints
from ddiff.data.prefetch import Prefetcher
from ddiff.errors import ArgumentError, CheckpointError, DdiffError, NonFiniteError
from ddiff.progress import Progress, show_progress
from ddiff.run_dir.files import CHECKPOINTS
from ddiff.run_dir.identity import check_fingerprints
from ddiff.training.device import to_device
from ddiff.training.ema import ExponentialMovingAverage
from ddiff.training.learning_rate import WarmupConstant
from ddiff.training.metrics import MetricsFile, StepRecord, check_metrics, summarize
from ddiff.training.optimizers import step_if
from ddiff.training.preview import PreviewFile, is_sharded
from ddiff.training.protocols import Backend, Batch, Objective, Optimizer, Tracker
from ddiff.training.run_state import RunState, get_random_state, set_random_state
from ddiff.training.settings import (
    Preview,
    Provenance,
    TrainerSettings,
    TrainingSummary,
    Validation,
)
from ddiff.training.signals import StopSignals
from ddiff.training.tracker import NoTracker

if TYPE_CHECKING:
    from ddiff.core.rng import CounterRng

MOST_SKIPPED_IN_A_ROW = 20
BOUND = "nelbo_diffusion_nats_per_token"
"""Metric that is shown as "bound": the diffusion term, without clipping or other weights."""


@dataclass(frozen=True)
class _PendingStep:
    """Step that was launched on the device, and whose results the host has not read yet.

    `figures` is a tensor [k,2]. Its rows are (gradient norm, tokens), (SIGINT count, SIGTERM
    count), (loss, 0), and (sum, count) of each metric in `names`. `launched` is the time at which
    the launch returned. On a CPU, the step has then been computed.
    """

    figures: Tensor
    names: Sequence[str]
    multiplier: float
    launched: float
    arrived: torch.cuda.Event | None = None  # recorded after the copy of the figures, on a GPU


@final
class Trainer:
    """Training loop of `objective.module`, with one global batch per step.

    Args:
        objective: training loss, whose module was already wrapped by `backend.wrap`.
        optimizer: optimizer of the parameters of the wrapped module.
        batch_at: pure function (step, micro) -> micro-batch of this rank, on the device that the
            objective expects. Wrap the function in `ddiff.data.prefetch.Prefetcher` to read ahead.
        rng_at: pure function (step, batch) -> random generator of the batch.
        settings: sizes and intervals, such as the number of steps.
        backend: devices and processes.
        run_dir: directory for metrics.jsonl and checkpoints.
        multiplier: function (step) -> factor in [0, 1] for the learning rate of every parameter
            group. None: always 1.
        tracker: logger that receives the metrics in addition to metrics.jsonl.
        validation: evaluation during training. The trained weights are bitwise identical with and
            without validation.
        preview: samples during training, which do not influence the trained weights either.
        references: function that returns numbers to show next to the loss, such as the nats per
            token of a bigram model. Rank 0 calls it once, before its first report.
        provenance: origin of components and data, stored in the checkpoints.

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
        preview: Preview | None = None,
        references: Callable[[], Mapping[str, float]] | None = None,
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
        self.preview = preview
        self.references = references
        self.provenance = provenance or Provenance()
        self.checkpoints = Checkpoints(f"{self.run_dir}/{CHECKPOINTS}", settings.keep)
        self.ema: ExponentialMovingAverage | None = None
        if settings.ema:
            module = backend.unwrap(objective.module)
            self.ema = ExponentialMovingAverage(module, settings.ema)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._seed = torch.initial_seed()

    def fit(
        self,
        start: Checkpoint | None = None,
        *,
        max_steps: int | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> TrainingSummary:
        """Train from the checkpoint `start`, or from the beginning, to the last step.

        If a rank receives SIGINT or SIGTERM, all ranks finish the current step, save a checkpoint
        and return. A single process that waits for a `Prefetcher` returns without waiting for the
        data. After `max_steps` steps of this call, `fit` returns without an additional checkpoint.

        `on_step` is called on every rank with the record of each step, in order, after the record
        is written to metrics.jsonl.

        Raises CheckpointError if `start` does not fit this trainer, and NonFiniteError after 20
        skipped steps in a row.
        """
        state = self._restore(start)
        end = self.settings.steps
        if max_steps is not None:
            end = min(end, state.step + max_steps)
        file = MetricsFile(self.run_dir, state.step) if self.backend.rank == 0 else None
        loop = _Loop(self, state, end, file, on_step, start.path if start else None)
        self.objective.module.train()
        try:
            loop.run()
        finally:
            if file:
                file.close()
            self.checkpoints.wait()
        return loop.to_summary()

    def check_fit(self, start: Checkpoint) -> None:
        """Raise ArgumentError or CheckpointError if training cannot resume from `start`."""
        if start.step > self.settings.steps:
            raise ArgumentError(
                f"Trainer: steps must be at least {start.step}, the step of the checkpoint "
                f"{start.path}; got {self.settings.steps}. Set more steps, or start over with "
                "`ddiff run` and --fresh."
            )
        remedy = (
            "Restore the data and settings of the run, or start over with `ddiff run` and --fresh. "
            f"{self.provenance.advice}"
        )
        check_fingerprints(start.path, start.state, self.provenance.fingerprints, remedy.strip())
        check_metrics(self.run_dir, start.step)

    # ------------------------------------------------------------------ one step

    def _launch(
        self,
        step: int,
        batches: Sequence[Batch],
        stop: StopSignals,
    ) -> _PendingStep:
        """Launch one training step without waiting for the device.

        `batches`: micro-batches of this rank. `stop`: signals received so far, which are exchanged
        among the ranks.
        """
        self._seed_rank(step)
        denominators = self._denominators(batches)
        shares = self._backward(step, batches, denominators)
        signals = to_device(stop.to_counts(), self.backend.device)
        # One reduction sums all figures. The signals are among the figures, so that all ranks stop
        # after the same step.
        totals = self.backend.sum({"signals": signals} | shares)
        parameters = self.objective.module.parameters()
        norm = self.backend.clip_grad_norm(parameters, self.settings.clip)
        multiplier = self.multiplier(step)
        # The device decides whether the step is taken, because norm and loss are not on the host
        # yet.
        finite = norm.isfinite() & totals["loss"].isfinite().all()
        self._update(multiplier, finite)
        tokens = torch.stack(list(denominators.values())).sum()
        figures = torch.stack([_pair(norm, tokens), *totals.values()])
        arrived = None
        if figures.device.type == "cuda":
            figures = figures.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        names = list(totals)[2:]  # after signals and loss
        return _PendingStep(figures, names, multiplier, time.monotonic(), arrived)

    def _seed_rank(self, step: int) -> None:
        """Seed torch's generator from seed, rank and step, on every rank except rank 0.

        Checkpoints store only the random state of rank 0. The random numbers of the other ranks
        must not depend on the steps at which the run was saved or resumed, so the generators are
        seeded at every step.
        """
        if self.backend.rank > 0:
            torch.manual_seed(zlib.crc32(f"{self._seed} {self.backend.rank} {step}".encode()))

    def _denominators(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Return the sums of `objective.counts` over the global batch, which divide the losses."""
        totals: dict[str, Tensor] = {}
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                counted = torch.as_tensor(count, dtype=torch.float64)
                counted = to_device(counted, self.backend.device)
                totals[name] = totals[name] + counted if name in totals else counted
        return self.backend.sum(totals)

    def _backward(
        self,
        step: int,
        batches: Sequence[Batch],
        denominators: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Compute the gradients of all micro-batches of this rank.

        Return a dictionary of tensors [2]: (loss, 0) for "loss", and (sum, count) for each metric.
        """
        self.optimizer.zero_grad()
        device = self.backend.device
        totals = {"loss": torch.zeros(2, dtype=torch.float64, device=device)}
        for micro, batch in enumerate(batches, start=1):
            is_last = micro == len(batches)
            with nullcontext() if is_last else self.backend.no_sync(self.objective.module):
                rng = self.rng_at(step, batch)
                terms = self.objective(batch, rng, denominators, self.settings.slots)
                terms.loss.backward()
            zero = torch.zeros_like(terms.loss)
            totals["loss"] = totals["loss"] + _pair(terms.loss, zero)
            for name, (summed, count) in terms.metrics.items():
                pair = _pair(summed, to_device(count, summed.device))
                totals[name] = totals[name] + pair if name in totals else pair
        return totals

    def _update(self, multiplier: float, finite: Tensor) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates):
            group["lr"] = rate * multiplier
        step_if(finite, self.optimizer)
        if self.ema:
            self.ema.update(finite)

    # ------------------------------------------------------------------ checkpoints

    def _save(self, state: RunState) -> str:
        tree = {
            "run": state.to_tree(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.to_tree() if self.ema else None,
            "random": get_random_state(self.backend.device),
            "multiplier": repr(self.multiplier),
            "origins": dict(self.provenance.origins),
            "fingerprints": dict(self.provenance.fingerprints),
            "made_with": dict(self.provenance.made_with),
        }
        module = self.backend.unwrap(self.objective.module)
        return self.checkpoints.save_async(state.step, module.state_dict(), tree)

    def _restore(self, start: Checkpoint | None) -> RunState:
        if start is None:
            if found := self.checkpoints.steps():
                raise CheckpointError(
                    f"{self.checkpoints.root} already holds checkpoints of a run, up to "
                    f"{_describe(found)}: training from the beginning would mix two runs. Resume "
                    "from the newest checkpoint, empty the run directory, or choose another run "
                    "directory."
                )
            return RunState()
        self.check_fit(start)
        module = self.backend.unwrap(self.objective.module)
        start.restore(module)
        tree = start.read_state(like=module.parameters())
        self.optimizer.load_state_dict(tree["optimizer"])
        if self.ema and tree.get("ema"):
            self.ema.load_tree(tree["ema"])
        elif self.ema:
            # The checkpoint has no average, so the average starts from the restored weights.
            self.ema = ExponentialMovingAverage(module, self.ema.decay)
        set_random_state(tree["random"], self.backend.device)
        return RunState.from_tree(start.step, tree["run"])


class _Loop:
    """State and steps of one call of `Trainer.fit`.

    The loop launches steps, reads their results, writes reports, evaluates the model and saves
    checkpoints.
    """

    def __init__(
        self,
        trainer: Trainer,
        state: RunState,
        end: int,
        file: MetricsFile | None,
        on_step: Callable[[StepRecord], None] | None,
        checkpoint: str | None,
    ) -> None:
        self.trainer = trainer
        self.settings = trainer.settings
        self.backend = trainer.backend
        self.state = state
        self.end = end  # the step after which this call stops
        self.file = file
        self.preview_file: PreviewFile | None = None
        if self.backend.rank == 0:
            self.preview_file = PreviewFile(trainer.run_dir, state.step)
        self.on_step = on_step
        self._shown_references: Mapping[str, float] | None = None
        self.checkpoint = checkpoint  # path of the newest checkpoint
        self.saved_step = state.step  # step of the newest checkpoint, 0 if there is none
        self.stop = StopSignals()
        self.signal: int | None = None  # signal that some rank received, equal on all ranks
        self.pending: deque[_PendingStep] = deque()
        self.tokens = 0.0
        self.began = time.monotonic()
        self.last_end = self.began  # end of the last step, or of a later evaluation or sample

    def run(self) -> None:
        console = None if self.backend.rank == 0 else Console(quiet=True, force_terminal=False)
        bar = show_progress(self.end, "training", start=self.state.step, console=console)
        with self.stop, bar as shown:
            while self.state.step < self.end and self.signal is None:
                self._launch_next()
                # Normally the results of a step are read after the next step is launched, so that
                # the device never idles. They are read at once if a report, an evaluation or a
                # checkpoint follows the step.
                while self.pending and self._must_read():
                    self._finish_oldest(shown)
                self._save_if_due()

    def to_summary(self) -> TrainingSummary:
        """Return the result of `Trainer.fit` as a summary."""
        status: Literal["finished", "interrupted", "stopped"] = "finished"
        if self.state.step < self.settings.steps:
            status = "stopped" if self.signal is None else "interrupted"
        return TrainingSummary(
            status=status,
            step=self.state.step,
            steps=self.settings.steps,
            skipped_steps=self.state.skipped_steps,
            seconds=time.monotonic() - self.began,
            tokens=self.tokens,
            metrics=self.state.metrics,
            checkpoint=self.checkpoint,
            signal=self.signal if status == "interrupted" else None,
        )

    # ------------------------------------------------------------------ steps

    def _launch_next(self) -> None:
        step = self.state.step + len(self.pending)
        batches = self._batches(step)
        if batches is not None:
            self.pending.append(self.trainer._launch(step, batches, self.stop))

    def _batches(self, step: int) -> list[Batch] | None:
        """Return the micro-batches of a step for this rank.

        Return None if a signal was received while waiting for the data.
        """
        batch_at = self.trainer.batch_at
        batches: list[Batch] = []
        for micro in range(self.settings.accumulate):
            # Several ranks must stop after the same step, so no rank stops before the others.
            if isinstance(batch_at, Prefetcher) and self.backend.world_size == 1:
                batch = batch_at.fetch(step, micro, lambda: self.stop.signal is not None)
                if batch is None:
                    return None
            else:
                batch = batch_at(step, micro)
            batches.append(batch)
        return batches

    def _must_read(self) -> bool:
        newest = self.state.step + len(self.pending)
        return self._is_due(newest) or len(self.pending) > 1 or self._is_stopping()

    def _finish_oldest(self, bar: Progress) -> None:
        """Read the results of the oldest unread training step; validate and report if due."""
        record = self._read(self.pending.popleft())
        self.tokens += record.tokens
        figures: Mapping[str, float] = {}
        # No evaluation after a signal: it could take longer than, for example, a job scheduler
        # waits before it sends SIGKILL.
        if self._is_validated(record.step) and not self._is_stopping():
            figures = self._validate(bar)
        if self._is_previewed(record.step):
            self._draw_preview(bar)
        if self.file:
            self.file.append(record, figures)
        if self.state.skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteError(self._too_many_skipped(record))
        self._report(bar)
        if self.on_step is not None:
            self.on_step(record)

    def _read(self, pending: _PendingStep) -> StepRecord:
        """Read the results of a step from the device.

        This is the only place where the host waits for the device.
        """
        # On a CPU, the step ended when its launch returned. It may be read much later.
        ended = pending.launched
        if pending.arrived:
            pending.arrived.synchronize()
            ended = time.monotonic()
        (grad_norm, items), signals, (loss, _), *pairs = pending.figures.tolist()
        self.state.count_step(math.isfinite(loss) and math.isfinite(grad_norm))
        self.signal = StopSignals.from_counts(signals) or self.signal
        record = StepRecord(
            step=self.state.step,
            loss=loss,
            grad_norm=grad_norm,
            lr_multiplier=pending.multiplier,
            tokens=items,
            seconds=ended - self.last_end,
            skipped_steps=self.state.skipped_steps,
            metrics=dict(zip(pending.names, map(tuple, pairs))),
        )
        self.last_end = ended
        self.state.window.append(record)
        return record

    # ------------------------------------------------------------------ after a step

    def _is_stopping(self) -> bool:
        if self.backend.world_size == 1:  # no signals of other ranks have to be added first
            self.signal = self.stop.signal
        return self.signal is not None

    def _is_saved(self, step: int) -> bool:
        return step == self.settings.steps or step % self.settings.checkpoint_every == 0

    def _is_validated(self, step: int) -> bool:
        validation = self.trainer.validation
        return validation is not None and step % validation.every == 0

    def _is_previewed(self, step: int) -> bool:
        preview = self.trainer.preview
        return preview is not None and step % preview.every == 0

    def _is_reported(self, step: int) -> bool:
        return step == self.end or step % self.settings.log_every == 0

    def _is_due(self, step: int) -> bool:
        if self._is_saved(step) or self._is_reported(step):
            return True
        return self._is_validated(step) or self._is_previewed(step)

    def _save_if_due(self) -> None:
        is_due = self._is_stopping() or self._is_saved(self.state.step)
        if not self.pending and is_due and self.state.step > self.saved_step:
            self.checkpoint = self.trainer._save(self.state)
            self.saved_step = self.state.step

    def _validate(self, bar: Progress) -> Mapping[str, float]:
        """Evaluate the weights or their exponential moving average, and return the metrics."""
        validation = self.trainer.validation
        assert validation is not None
        with self._use_weights(validation.of_average):
            try:
                figures, sentence = validation.score()
            except NonFiniteError as error:  # reported, but not a reason to end the run
                figures, sentence = {}, str(error)
        if self.backend.rank == 0 and figures:
            self.trainer.tracker.log(self.state.step, figures)
        bar.note(f"step {self.state.step}: {sentence}")
        self.last_end = time.monotonic()  # tokens per second exclude the evaluation
        return figures

    def _draw_preview(self, bar: Progress) -> None:
        """Draw a sample, write it to training_samples.jsonl, and show it next to the bar."""
        preview = self.trainer.preview
        assert preview is not None
        if self.backend.rank > 0 and not is_sharded(self.trainer.objective.module):
            return  # no other rank has to take part
        with self._use_weights(preview.of_average):
            try:
                record, sentence = preview.draw()
            except DdiffError as error:  # reported, but not a reason to end the run
                record, sentence = {}, str(error)
        if self.preview_file and record:
            self.preview_file.append(self.state.step, record)
        # The sample replaces the one before it. An error must stay on the screen.
        display = bar.show if record else bar.note
        display(f"step {self.state.step}: {sentence}")
        self.last_end = time.monotonic()  # tokens per second exclude the sample

    @contextmanager
    def _use_weights(self, of_average: bool) -> Iterator[None]:
        """Evaluate or sample in a `with` block, with the weights or their moving average.

        Training mode and random state are restored, so that the trained weights are bitwise
        identical with and without the block.
        """
        module = self.backend.unwrap(self.trainer.objective.module)
        random_state = get_random_state(self.backend.device)
        weights: AbstractContextManager[None] = nullcontext()
        if self.trainer.ema and of_average:
            weights = self.trainer.ema.apply()
        with weights, self.backend.gather_weights(module):
            yield
        self.trainer.objective.module.train()
        set_random_state(random_state, self.backend.device)

    def _report(self, bar: Progress) -> None:
        """Advance the progress bar. If a report is due, log the means since the last report."""
        if not self._is_reported(self.state.step):
            bar.advance()
            return
        metrics = summarize(self.state.window)
        self.state.metrics = metrics
        self.state.window.clear()
        if self.backend.rank == 0:
            self.trainer.tracker.log(self.state.step, metrics)
        shown = {"train_loss": "loss", BOUND: "bound", "tokens_per_second": "tokens_per_second"}
        if self.state.skipped_steps:
            shown["skipped_steps"] = "skipped"
        figures: dict[str, float] = {}
        for name, value in metrics.items():
            if name in shown:
                figures[shown[name]] = value
        bar.advance(1, **figures, **self._read_references())

    def _read_references(self) -> Mapping[str, float]:
        """Return the numbers to show next to the loss, which are computed at the first call."""
        if self._shown_references is None:
            read = self.trainer.references
            self._shown_references = {}
            if read is not None and self.backend.rank == 0:
                self._shown_references = read()
            self.last_end = time.monotonic()  # tokens per second exclude the computation
        return self._shown_references

    def _too_many_skipped(self, record: StepRecord) -> str:
        steps = self.trainer.checkpoints.steps()
        return (
            f"Loss or gradient norm was not finite in {MOST_SKIPPED_IN_A_ROW} steps in a row, up "
            f"to step {record.step} (loss {record.loss}, gradient norm {record.grad_norm}). These "
            "steps did not change the model. Parameters, data or logits contain a NaN or overflow: "
            "lower the learning rate, lengthen the warm-up, lower `clip`, or inspect the data "
            f"of that step. The newest checkpoint is of {_describe(steps)}."
        )


def _pair(first: Tensor, second: Tensor) -> Tensor:
    pair = [first.detach(), second.detach()]
    return torch.stack([value.to(torch.float64) for value in pair])


def _describe(steps: Sequence[int]) -> str:
    return f"step {steps[-1]}" if steps else "no step"
