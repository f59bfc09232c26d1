"""Run that `TrainingSession` can train: a text run, or a run of several fields."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ddiff.checkpoint.checkpoints import Checkpoint, Checkpoints, load_weights
from ddiff.core.rng import CounterRng
from ddiff.distributed.ranks import Ranks
from ddiff.progress import hide_progress
from ddiff.recipe.model import BaseRecipe
from ddiff.run_dir.files import CHECKPOINTS
from ddiff.training.protocols import Batch, Objective

PREVIEW_STEPS = 16  # largest number of sampling steps of a sample during training
SHOWN_CHARACTERS = 120  # of a text on the terminal


def count_preview_steps(recipe: BaseRecipe) -> int:
    """Return the number of sampling steps of a sample during training."""
    return min(PREVIEW_STEPS, recipe.sample.steps)


def evaluates_ema(recipe: BaseRecipe) -> bool:
    """Return whether a run evaluates and samples with the moving average of its weights."""
    weights = recipe.evaluate.weights
    if weights == "auto":
        return recipe.train.ema > 0.0
    return weights == "ema"


class TrainingData(Protocol):
    """Data of a run, as the training session reads them."""

    def batch_at(self, step: int, micro: int, rank: int, world_size: int) -> Batch:
        """Return micro-batch `micro` of rank `rank` at a training step, on the CPU."""
        ...


class TrainableRun(ABC):
    """Recipe with its model and its data.

    The training session compiles, wraps and shards `objective.module` in place. After training,
    `copier` builds the run again.
    """

    # Not abstract properties, because the fields of a dataclass do not override these.
    recipe: BaseRecipe
    data: TrainingData

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """Training loss and trained module."""

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """Plain network, without the wrapping for training."""

    @property
    @abstractmethod
    def precision(self) -> torch.dtype | None:
        """Dtype of matrix products; None: that of the weights."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the network."""

    # ------------------------------------------------------------------ training

    @abstractmethod
    def check_stages(self) -> None:
        """Raise ArgumentError if the stages after training cannot work with this recipe."""

    @abstractmethod
    def initialize_weights(self) -> dict[str, Any] | None:
        """Set the weights at step 0.

        Returns a record of the weights that [train] init loads, or None without [train] init.
        """

    @abstractmethod
    def rng_at(self, step: int, batch: Batch) -> CounterRng:
        """Return the random generator of a batch at a step.

        The random numbers depend on the seed, the step and the indices of the samples in the global
        batch.
        """

    @abstractmethod
    def prefer_fixed_shapes(self) -> None:
        """Pad the rows passed to heads, so that a compiled head is compiled few times."""

    @abstractmethod
    def read_validation(self) -> None:
        """Load the validation samples."""

    @abstractmethod
    def score_validation(self, ranks: Ranks | None = None) -> tuple[Mapping[str, float], str]:
        """Evaluate the validation samples. Return metrics by name, and one line of text.

        `ranks`: processes that divide the batches; None: only this process.
        """

    @abstractmethod
    def sample_texts(self, steps: int) -> tuple[Mapping[str, str], int]:
        """Draw one sample in `steps` steps, with the seed of the recipe.

        Returns the texts by the name of their field ("text" in a text run), and the number of
        network evaluations.
        """

    def draw_preview(self) -> tuple[Mapping[str, Any], str]:
        """Draw a sample during training. Return a record and one line of text.

        The random numbers are always the same, so that two samples differ only by the training.
        """
        steps = count_preview_steps(self.recipe)
        stance: AbstractContextManager[None] = nullcontext()
        if self.recipe.backend_keys.compile:
            # One sample has other shapes than a training batch, and would trigger compilations.
            stance = torch.compiler.set_stance("force_eager")
        with hide_progress(), stance:
            texts, nfe = self.sample_texts(steps)
        shown = []
        for text in texts.values():
            line = " ".join(text.split())
            if len(line) > SHOWN_CHARACTERS:
                line = f"{line[:SHOWN_CHARACTERS]} ..."
            shown.append(line)
        record = {
            "texts": dict(texts),
            "steps": steps,
            "nfe": nfe,
            "seed": self.recipe.sample.seed,
            "weights": "ema" if self.uses_ema else "trained",
        }
        return record, f"sample: {' | '.join(shown)}"

    def references(self) -> Mapping[str, float]:
        """Return numbers to show next to the training loss, by name. The default is none."""
        return {}

    @abstractmethod
    def copier(self) -> Callable[[], Any]:
        """Return a function that builds the run again, with a new plain network.

        The function keeps no reference to the network of this run.
        """

    # ------------------------------------------------------------------ record

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of components and data for a checkpoint."""

    @abstractmethod
    def noising(self) -> Any:
        """Return numbers that identify the forward processes, for a checkpoint."""

    @abstractmethod
    def given(self) -> dict[str, str]:
        """Return the components that a Python caller passed in place of those of the recipe."""

    @abstractmethod
    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError if a checkpoint was trained with other components."""

    def advise_on_differences(self) -> str:
        """Return further sentences for the error about a checkpoint with other components.

        By default there are none.
        """
        return ""

    @abstractmethod
    def save_components(self, directory: Path) -> None:
        """Write the components that `ddiff.load` reads to the run directory."""

    # ------------------------------------------------------------------ checkpoints

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir)

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(str(self.run_dir / CHECKPOINTS), self.recipe.train.keep)

    @property
    def step(self) -> int:
        """Training step of the newest checkpoint, or 0 without a checkpoint."""
        return max(self.checkpoints.steps(), default=0)

    @property
    def uses_ema(self) -> bool:
        """True if evaluation and sampling use the exponential moving average of the weights."""
        return evaluates_ema(self.recipe)

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Load the weights of a checkpoint into the network.

        If `uses_ema` is True, the exponential moving average of the weights is loaded.
        """
        weights = checkpoint.read_weights(average=self.uses_ema)
        load_weights(self.objective.module, weights, str(self.run_dir))
