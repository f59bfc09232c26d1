"""Training session: train one run on its backend, from initial weights to the last checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.core.rng import CounterRng
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.batch import Batch
from ddiff.data.prefetch import Prefetcher
from ddiff.distributed.blocks import compile_blocks, recompute_activations
from ddiff.distributed.launcher import get_machine_cores
from ddiff.errors import ArgumentError
from ddiff.recipe.model import Recipe
from ddiff.run_dir.identity import flatten_keys
from ddiff.runs.backends import build_backend
from ddiff.runs.build import NO_OVERRIDES, Overrides, assemble
from ddiff.runs.data import RunText
from ddiff.runs.evaluation import score_validation
from ddiff.runs.initial_weights import load_initial_weights
from ddiff.runs.memory import check_memory
from ddiff.runs.meta_device import build_denoiser_on_meta
from ddiff.runs.noising import sample_noising
from ddiff.runs.provenance import check_checkpoint, run_fingerprints
from ddiff.runs.run import Run
from ddiff.training.learning_rate import WarmupConstant, WarmupCosine
from ddiff.training.protocols import Backend, Tracker
from ddiff.training.settings import Provenance, TrainerSettings, TrainingSummary, Validation
from ddiff.training.tracker import NoTracker
from ddiff.training.trainer import Trainer


def build_run(recipe: Recipe, backend: Backend, overrides: Overrides = NO_OVERRIDES) -> Run:
    """Build the data, the vocabulary and the untrained model of a run.

    `backend`: backend of the training. `overrides`: vocabulary and process to use in place of those
    of the recipe. Raises an error before a file is written if the network does not accept the
    conditions of the data, or if the memory is too small.
    """
    text = RunText(recipe)
    # rank 0 tokenizes first; the other ranks then find the shards in the cache
    with backend.main_process_first():
        text.train_rows  # noqa: B018
        text.check_repetitions()
        vocabulary = _choose_vocabulary(text, overrides)
    text.check_vocabulary(vocabulary)
    check_memory(recipe, build_denoiser_on_meta(recipe, vocabulary), backend.device)
    run = Run.assemble(text, vocabulary, backend.device, overrides)
    run.data.read_conditions()
    _check_packing(run)
    return run


def _check_packing(run: Run) -> None:
    """Raise ArgumentError if training rows hold several documents, and the backbone reads one."""
    backbone = run.denoiser.backbone
    # Training rows of text are cut from a stream of documents. A row of symbols is one document.
    if backbone.reads_packed_rows or run.tokenizer.unit == "symbol":
        return
    raise ArgumentError(
        f"{type(backbone).__name__}: with these settings a row must hold one document, but the "
        "training rows of this run are cut from a stream of documents. For the backbone dit, set "
        '[denoiser] conditions.NAME.via = "cross" in place of "tokens".'
    )


def _choose_vocabulary(text: RunText, overrides: Overrides) -> Vocabulary:
    if overrides.vocabulary is not None:
        return overrides.vocabulary
    if overrides.process is not None:
        return overrides.process.vocabulary
    return text.build_vocabulary()


class TrainingSession:
    """Training of one run, as a context manager.

        with TrainingSession.open(recipe) as session:
            session.initialize_weights()
            summary = session.fit()
        run = session.load_trained_run()

    The session owns the backend and the network. `fit` compiles, wraps and shards the network in
    place. At the end of the `with` block, the network and the backend are released. After that,
    `load_trained_run` builds a new network without these changes and loads the newest checkpoint.
    After an exception the session is not closed, because closing would wait for the other ranks.
    """

    def __init__(self, run: Run, backend: Backend) -> None:
        self.backend = backend
        self.recipe = run.recipe
        self.data = run.data
        self.overrides = run.overrides
        self._process = run.process
        self._vocabulary = run.vocabulary
        self._run: Run | None = run
        self._batches: Prefetcher[Batch] = Prefetcher(
            partial(self.data.batch_at, rank=backend.rank, world_size=backend.world_size),
            accumulate=self.recipe.train.accumulate,
            workers=self.recipe.backend_keys.workers,
            quiet=backend.rank > 0,
        )

    @classmethod
    def open(cls, recipe: Recipe, overrides: Overrides = NO_OVERRIDES) -> TrainingSession:
        """Start the backend of a recipe and build the run on it (see `build_run`)."""
        backend = build_backend(recipe)
        return cls(build_run(recipe, backend, overrides), backend)

    def __enter__(self) -> TrainingSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()

    @property
    def run(self) -> Run:
        """Run whose network is being trained. Available until the session is closed."""
        assert self._run is not None, "the session is closed"
        return self._run

    def initialize_weights(self) -> dict[str, Any] | None:
        """Initialize the head biases from token counts, then load the weights of [train] init.

        With these biases, the predicted distribution before training is the unigram distribution of
        the training text, so the first loss is known. Returns a record of the weights that [train]
        init loads, or None if the recipe has no [train] init.
        """
        counts = self.data.train_rows.token_counts()
        self.run.denoiser.head.start_from_counts(torch.from_numpy(np.array(counts)))
        init = self.recipe.train.init
        if init is None:
            return None
        return load_initial_weights(self.run.denoiser, self.data.tokenizer, init)

    def fit(
        self, start: Checkpoint | None = None, accepted: Callable[[], None] = lambda: None
    ) -> TrainingSummary:
        """Train to the last step of the recipe.

        Args:
            start: checkpoint to resume from; None starts at step 0 with the current weights.
            accepted: function that is called after `start` is checked and before a file is written.
        """
        if self.recipe.evaluate.every:
            # every rank evaluates; rank 0 packs the rows for all
            with self.backend.main_process_first():
                self.data.validation_rows  # noqa: B018
        self.distribute()
        trainer = self.trainer()  # after wrapping: the optimizer takes the wrapped parameters
        with closing(trainer.tracker), closing(self._batches):
            if start is not None:
                trainer.check_fit(start)
                check_checkpoint(start, self.data, self.run.model, self.overrides)
            accepted()
            return trainer.fit(start)

    def replay(self, start: Checkpoint | None, end: int, folder: Path) -> TrainingSummary:
        """Repeat training from checkpoint `start` to step `end`, and write files to `folder`.

        If `start` is None, the replay starts at step 0. No tracker is used.
        """
        if start is not None:
            check_checkpoint(start, self.data, self.run.model, self.overrides)
        self.distribute()
        with closing(self._batches):
            return self.trainer(folder, end, NoTracker()).fit(start)

    def distribute(self) -> None:
        """Prepare the network for training with the settings of [backend].

        The blocks of the backbone are compiled. Then the recomputation of activations is enabled.
        Finally the network is wrapped for DDP or FSDP.
        """
        keys = self.recipe.backend_keys
        objective = self.run.objective
        # Activation checkpointing needs compiled blocks, and sharding needs the final blocks.
        if keys.compile:
            compile_blocks(objective.module)
            self.run.denoiser.fixed_shapes = (
                True  # otherwise each new number of rows would trigger a compilation
            )
        if keys.activation_checkpointing:
            recompute_activations(objective.module)
        objective.module = self.backend.wrap(objective.module)

    def trainer(
        self,
        folder: Path | None = None,
        end: int | None = None,
        tracker: Tracker | None = None,
    ) -> Trainer:
        """Build the trainer of the recipe.

        If `folder`, `end` and `tracker` are not None, they replace the run directory, the last step
        and the tracker of the recipe. A replay of recorded steps passes all three arguments.
        """
        keys = self.recipe.train
        objective = self.run.objective
        multiplier = (
            WarmupCosine(keys.steps, keys.warmup, keys.floor)
            if keys.schedule == "cosine"
            else WarmupConstant(keys.warmup)
        )
        return Trainer(
            objective,
            self.recipe.optimizer.build(module=self.backend.unwrap(objective.module)),
            self._batches,
            self.rng_at,
            self._trainer_settings(end),
            backend=self.backend,
            run_dir=folder or self.run.run_dir,
            multiplier=multiplier,
            tracker=tracker or self._build_tracker(),
            validation=self._validation(),
            provenance=self._provenance(),
        )

    def rng_at(self, step: int, batch: Batch) -> CounterRng:
        """Return the random generator of a batch at a step.

        The random numbers depend on the seed, the step and the indices of the rows in the global
        batch.
        """
        return CounterRng(self.recipe.seed, step, batch.index, self.recipe.length)

    def _trainer_settings(self, end: int | None) -> TrainerSettings:
        keys = self.recipe.train
        return TrainerSettings(
            steps=end or keys.steps,
            slots=keys.batch,
            accumulate=keys.accumulate,
            clip=keys.clip,
            ema=keys.ema,
            log_every=keys.log_every,
            checkpoint_every=keys.checkpoint_every,
            keep=keys.keep,
        )

    def _provenance(self) -> Provenance:
        return Provenance(
            origins=self.recipe.origins(),
            fingerprints=run_fingerprints(self.data, self.run.model),
            made_with={
                "recipe": flatten_keys(self.recipe.to_dict()),
                "given": self.overrides.to_dict(),
                "noising": sample_noising(self.run.process),
            },
        )

    def _build_tracker(self) -> Tracker:
        if self.backend.rank > 0:
            return NoTracker()
        run_dir = str(self.run.run_dir)
        return self.recipe.tracker.build(run_dir=run_dir, recipe=self.recipe.to_dict())

    def _validation(self) -> Validation | None:
        every = self.recipe.evaluate.every
        if every is None:
            return None
        return Validation(every, self._validate, self.run.uses_ema)

    def _validate(self) -> tuple[Mapping[str, float], str]:
        """Evaluate the validation rows. Return metrics by name, and one line of text to print."""
        quiet = Console(quiet=True, force_terminal=False)  # keep the progress bar of training
        found = score_validation(self.run.model, self.data, self.recipe, quiet)
        unit = f"nats_per_{found.unit}"
        mean = found.nelbo_nats_per_token
        figures = {f"validation_{found.bound.lower()}_{unit}": mean}
        sentence = f"validation {found.bound} {mean:.4f}"
        if found.interval is not None:
            low, high = found.interval
            figures[f"validation_interval_low_{unit}"] = low
            figures[f"validation_interval_high_{unit}"] = high
            sentence += f" ({low:.4f} to {high:.4f})"
        return figures, f"{sentence} nats/{found.unit}"

    def close(self) -> None:
        """Release the network, then the process group, which sharded weights need until the end."""
        self._batches.close()
        self._run = None
        self.backend.close()

    def load_trained_run(self) -> Run:
        """Build an unwrapped network and load the newest checkpoint, on every rank."""
        cores = get_machine_cores()
        if cores:  # the other processes have ended, so this process may use all cores
            torch.set_num_threads(cores)
        # the forward process has no weights, so the object is reused
        device = self.backend.device
        model = assemble(self.recipe, self._vocabulary, device, process=self._process)
        run = Run(self.recipe, model, self.data, self.overrides)
        newest = run.checkpoints.newest()
        assert newest is not None, "training ends with a checkpoint"
        run.load_weights(newest)
        return run
