"""Training session: train one run on its backend, from initial weights to the last checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.core.rng import CounterRng
from ddiff.data.prefetch import Prefetcher
from ddiff.distributed.blocks import compile_blocks, recompute_activations
from ddiff.distributed.ranks import DistributedRanks, Ranks, ranks_in_training
from ddiff.recipe.model import BaseRecipe
from ddiff.run_dir.identity import flatten_keys
from ddiff.runs.backends import build_backend
from ddiff.runs.build import NO_OVERRIDES, Overrides
from ddiff.runs.kinds import find_kind
from ddiff.runs.trainable import TrainableRun
from ddiff.training.learning_rate import WarmupConstant, WarmupCosine
from ddiff.training.protocols import Backend, Batch, Tracker
from ddiff.training.settings import (
    Preview,
    Provenance,
    TrainerSettings,
    TrainingSummary,
    Validation,
)
from ddiff.training.tracker import NoTracker
from ddiff.training.trainer import Trainer

R = TypeVar("R", bound=TrainableRun)


def build_run(
    recipe: BaseRecipe, backend: Backend, overrides: Overrides = NO_OVERRIDES
) -> TrainableRun:
    """Build the data, the components and the untrained model of a run.

    `backend`: backend of the training. `overrides`: vocabulary and process to use in place of those
    of the recipe. Raises an error before a file is written if the network does not fit the data, or
    if the memory is too small.
    """
    return find_kind(recipe).build_run(recipe, backend, overrides)


class TrainingSession(Generic[R]):
    """Training of one run, as a context manager.

        with TrainingSession.open(recipe) as session:
            session.initialize_weights()
            summary = session.fit()
            run = session.load_trained_run()
            run.evaluate(ranks=session.ranks())

    The session owns the backend and the network. `fit` compiles, wraps and shards the network in
    place. `load_trained_run` releases this network, builds a new network without these changes and
    loads the newest checkpoint. At the end of the `with` block, the backend is closed. After an
    exception the session is not closed, because closing would wait for the other ranks.
    """

    def __init__(self, run: R, backend: Backend) -> None:
        self.backend = backend
        self.recipe = run.recipe
        self.data = run.data
        self._copy = run.copier()
        self._ranks = Ranks()  # of the evaluation during training
        self._run: R | None = run
        # The functions of the data keep no reference to the network, which `close` releases.
        self._batches: Prefetcher[Batch] = Prefetcher(
            partial(run.data.batch_at, rank=backend.rank, world_size=backend.world_size),
            accumulate=self.recipe.train.accumulate,
            workers=self.recipe.backend_keys.workers,
            quiet=backend.rank > 0,
        )

    @classmethod
    def open(cls, recipe: BaseRecipe, overrides: Overrides = NO_OVERRIDES) -> TrainingSession[Any]:
        """Start the backend of a recipe and build the run on it (see `build_run`)."""
        backend = build_backend(recipe)
        run: Any = build_run(recipe, backend, overrides)
        return cls(run, backend)

    def __enter__(self) -> Self:
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
    def run(self) -> R:
        """Run whose network is being trained. Available until its network is released."""
        assert self._run is not None, "the network is released"
        return self._run

    def initialize_weights(self) -> dict[str, Any] | None:
        """Set the weights at step 0 (see `TrainableRun.initialize_weights`)."""
        return self.run.initialize_weights()

    def fit(
        self,
        start: Checkpoint | None = None,
        accepted: Callable[[], None] = lambda: None,
        tracker: Tracker | None = None,
    ) -> TrainingSummary:
        """Train to the last step of the recipe.

        Args:
            start: checkpoint to resume from; None starts at step 0 with the current weights.
            accepted: function that is called after `start` is checked and before a file is written.
            tracker: logger of the metrics, which the caller closes; None for no logger.
        """
        if self.recipe.evaluate.every:
            # every rank evaluates; rank 0 prepares the samples for all
            with self.backend.main_process_first():
                self.run.read_validation()
        self.distribute()
        # after wrapping: the optimizer takes the wrapped parameters
        trainer = self.trainer(tracker=tracker, preview=self._preview())
        with closing(self._batches):
            if start is not None:
                trainer.check_fit(start)
                self.run.check_checkpoint(start)
            accepted()
            return trainer.fit(start)

    def replay(self, start: Checkpoint | None, end: int, folder: Path) -> TrainingSummary:
        """Repeat training from checkpoint `start` to step `end`, and write files to `folder`.

        If `start` is None, the replay starts at step 0. No metrics are sent to the tracker.
        """
        if start is not None:
            self.run.check_checkpoint(start)
        self.distribute()
        with closing(self._batches):
            return self.trainer(folder, end).fit(start)

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
            self.run.prefer_fixed_shapes()
        if keys.activation_checkpointing:
            recompute_activations(objective.module)
        objective.module = self.backend.wrap(objective.module)

    def trainer(
        self,
        folder: Path | None = None,
        end: int | None = None,
        tracker: Tracker | None = None,
        preview: Preview | None = None,
    ) -> Trainer:
        """Build the trainer of the recipe.

        If `folder` and `end` are not None, they replace the run directory and the last step. A
        replay of recorded steps passes both. `tracker`: logger of the metrics; None for no logger.
        `preview`: samples that are drawn during training; None for none.
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
            tracker=tracker,
            validation=self._validation(),
            preview=preview,
            references=self._read_references if end is None else None,
            provenance=self._provenance(),
        )

    def rng_at(self, step: int, batch: Batch) -> CounterRng:
        """Return the random generator of a batch at a step."""
        return self.run.rng_at(step, batch)

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
            fingerprints=self.run.fingerprints(),
            made_with={
                "recipe": flatten_keys(self.recipe.to_dict()),
                "given": self.run.given(),
                "noising": self.run.noising(),
            },
            advice=self.run.advise_on_differences(),
        )

    def build_tracker(self) -> Tracker:
        """Build the tracker of the recipe on rank 0. The other ranks log nothing."""
        if self.backend.rank > 0:
            return NoTracker()
        run_dir = str(self.run.run_dir)
        return self.recipe.tracker.build(run_dir=run_dir, recipe=self.recipe.to_dict())

    def _validation(self) -> Validation | None:
        every = self.recipe.evaluate.every
        if every is None:
            return None
        self._ranks = ranks_in_training(self.backend.world_size, self.run.objective.module)
        return Validation(every, self._validate, self.run.uses_ema)

    def _preview(self) -> Preview | None:
        every = self.recipe.sample.every
        if every is None:
            return None
        return Preview(every, self._draw_preview, self.run.uses_ema)

    def _draw_preview(self) -> tuple[Mapping[str, Any], str]:
        return self.run.draw_preview()

    def _read_references(self) -> Mapping[str, float]:
        return self.run.references()

    def _validate(self) -> tuple[Mapping[str, float], str]:
        return self.run.score_validation(self._ranks)

    def release(self) -> None:
        """Release the network and the loading of batches."""
        self._batches.close()
        self._run = None
        gc.collect()  # wrappers for training refer to themselves

    def close(self) -> None:
        """Release the network, then the process group, which sharded weights need until the end."""
        self.release()
        self.backend.close()

    def ranks(self) -> Ranks:
        """Return the ranks that evaluate and sample the trained run together.

        Every rank must call this method, before the session is closed.
        """
        return DistributedRanks() if self.backend.world_size > 1 else Ranks()

    def load_trained_run(self) -> R:
        """Release the trained network, and load the newest checkpoint into a plain one.

        Every rank loads all weights.
        """
        self.release()
        run = self._copy()
        newest = run.checkpoints.newest()
        assert newest is not None, "training ends with a checkpoint"
        run.load_weights(newest)
        return run
