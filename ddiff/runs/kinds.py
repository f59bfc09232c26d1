"""Kinds of runs: text runs and runs of several fields.

`find_kind` chooses the kind by the type of the recipe. No other module asks for the type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.core.process import ForwardProcess
from ddiff.data.text import Split
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.recipe.model import BaseRecipe
from ddiff.run_dir.destination import Destination
from ddiff.runs.build import Overrides
from ddiff.training.protocols import Backend
from ddiff.training.settings import TrainingSummary

if TYPE_CHECKING:
    from ddiff.runs.encode import EncodedDocuments
    from ddiff.runs.observer import SampleObserver
    from ddiff.runs.trainable import TrainableRun


ClockSource = Literal["recipe", "found"]
"""Clock of a tree: that of the recipe, or the one that `ddiff clock` found."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of `ddiff eval`.

    Attributes:
        until: draws are added until the half width of the Monte-Carlo interval, in nats per token,
            is at most this; None: [evaluate] draws.
        data: text files, or the name of a protocol or a recipe, whose documents are evaluated.
            Empty: the validation documents of the run.
        split: unit of a document in text files.
        protocol: name of a protocol of `ddiff.evaluation.protocols`.
        published: whether the evaluation of a published program replaces ours.
        program: arXiv number of the paper of this program; None: the default.
        clock: "found" for the clock of a tree that `ddiff clock` found, instead of the recipe's.
    """

    until: float | None = None
    data: tuple[str, ...] = ()
    split: Split = "file"
    protocol: str | None = None
    published: bool = False
    program: str | None = None
    clock: ClockSource = "recipe"


class RunKind(Protocol):
    """Functions that differ between the kinds of runs.

    `recipe` and `run` always are a recipe and a run of this kind.
    """

    def build_run(self, recipe: Any, backend: Backend, overrides: Overrides) -> TrainableRun:
        """Build the data, the components and the untrained model of a run.

        Raises an error if the network does not fit the data, or if the memory is too small. No file
        has been written then.
        """
        ...

    def load_run(
        self, recipe: Any, directory: Path, newest: Checkpoint, process: ForwardProcess | None
    ) -> TrainableRun:
        """Build the run in `directory` from its files, with the weights of a checkpoint."""
        ...

    def after_training(self, run: Any, summary: TrainingSummary, ranks: Ranks) -> None:
        """Evaluate, sample and print the summary. Stages whose files exist are not repeated.

        `ranks`: processes that divide the work. Only rank 0 prints and writes.
        """
        ...

    def rehearse(self, recipe: Any, device: torch.device) -> str:
        """Check the model and the memory without reading the data.

        Returns one line, such as `fits: 2.1 M parameters, ...`.
        """
        ...

    def print_cost(self, recipe: Any, steps: int) -> None:
        """Measure training steps and print the cost of the recipe."""
        ...

    def evaluate(
        self, run: Any, target: Destination | None, options: EvaluationOptions, ranks: Ranks
    ) -> Any:
        """Run `ddiff eval` on a loaded run and return the evaluation.

        The results are written to `target`, by default to evaluation.json of the run, or for other
        data to evaluation-NAME.json. `ranks`: processes that divide the work. Only rank 0 prints
        and writes.
        """
        ...

    def sample(
        self,
        run: Any,
        arguments: Mapping[str, Any],
        prints_ids: bool,
        observer: SampleObserver | None = None,
        ranks: Ranks | None = None,
    ) -> Iterable[Mapping[str, Any]]:
        """Run `ddiff sample` on a loaded run. Returns the samples to print, on every rank.

        `arguments` are those of the options of the command. Raises ArgumentError for options that
        this kind of run does not have. Without `prints_ids`, the samples have no token ids.
        `observer` shows or records the states after each step. `ranks`: processes that divide the
        batches; None: only this process.
        """
        ...

    def encode(
        self, recipe: Any, out: str | None, shard_size: int | None, max_samples: int | None
    ) -> EncodedDocuments:
        """Run `ddiff encode`. Arguments that are None have default values."""
        ...


def find_kind(recipe: BaseRecipe) -> RunKind:
    """Return the kind of the runs of a recipe."""
    # Imported here, so that a command imports only the modules of its kind of run.
    if isinstance(recipe, FieldsRecipe):
        from ddiff.runs.fields.fields_runs import FIELDS_RUNS

        return FIELDS_RUNS
    from ddiff.runs.text_runs import TEXT_RUNS

    return TEXT_RUNS


def refuse_options(run: TrainableRun, arguments: Mapping[str, Any], kind: str, use: str) -> None:
    """Raise ArgumentError if an option of `ddiff sample` was given that a run does not have.

    Args:
        run: the run.
        arguments: values of the options that the run does not have, such as "--prompt".
        kind: kind of the run, for the message.
        use: options to use instead.
    """
    for name, value in arguments.items():
        if value:
            raise ArgumentError(
                f"ddiff sample {name}: {run.run_dir} is {kind}, which does not have this "
                f"option. {use}"
            )
