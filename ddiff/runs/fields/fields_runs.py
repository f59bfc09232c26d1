"""Runs of several fields: the kind of the runs of recipes with tables [fields.NAME].

Modules are imported when they are needed, because a dry run must be fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.core.process import ForwardProcess
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.run_dir.destination import Destination
from ddiff.runs.build import Overrides
from ddiff.runs.fields.build import assemble_fields
from ddiff.runs.fields.checks import check_stages, check_targets
from ddiff.runs.fields.memory import check_memory
from ddiff.runs.kinds import EvaluationOptions
from ddiff.training.protocols import Backend
from ddiff.training.settings import TrainingSummary

if TYPE_CHECKING:
    from ddiff.runs.encode import EncodedDocuments
    from ddiff.runs.fields.run import FieldsRun
    from ddiff.runs.observer import SampleObserver


class FieldsRuns:
    """Kind of the runs of fields recipes; `RunKind` describes the methods."""

    def build_run(self, recipe: FieldsRecipe, backend: Backend, overrides: Overrides) -> FieldsRun:
        from ddiff.runs.fields.stages import build_run

        return build_run(recipe, backend, overrides)

    def load_run(
        self,
        recipe: FieldsRecipe,
        directory: Path,
        newest: Checkpoint,
        process: ForwardProcess | None,
    ) -> FieldsRun:
        from ddiff.runs.fields.stages import load_run

        return load_run(recipe, directory, newest, process)

    def after_training(self, run: FieldsRun, summary: TrainingSummary, ranks: Ranks) -> None:
        from ddiff.runs.fields.stages import after_training

        after_training(run, summary, ranks)

    def rehearse(self, recipe: FieldsRecipe, device: torch.device) -> str:
        """Check the model and the memory without reading the data.

        If the shapes of all fields are known without the data, the model is built on the meta
        device, with placeholder vocabularies.
        """
        from ddiff.runs.fields.data import preview_fields  # imports tokenizers

        shapes = preview_fields(recipe)
        if shapes is None:
            check_targets(recipe)
            return check_memory(recipe, None, None, device)
        model = assemble_fields(recipe, shapes, torch.device("meta"))
        verdict = check_memory(recipe, shapes, model.denoiser, device)
        check_stages(recipe, model, shapes)
        return verdict

    def print_cost(self, recipe: FieldsRecipe, steps: int) -> None:
        from ddiff.runs.fields.measure import measure, print_measurement

        print_measurement(measure(recipe, steps))

    def evaluate(
        self,
        run: FieldsRun,
        target: Destination | None,
        options: EvaluationOptions,
        ranks: Ranks,
    ) -> Any:
        if options != EvaluationOptions():
            raise ArgumentError(
                f"ddiff eval: {run.run_dir} is a run of several fields, which has no --until, "
                "--data, --protocol and --published. Change the evaluation with --set evaluate.KEY."
            )
        from ddiff.runs.fields.report import reevaluate

        return reevaluate(run, target, ranks)

    def sample(
        self,
        run: FieldsRun,
        arguments: Mapping[str, Any],
        prints_ids: bool,
        observer: SampleObserver | None = None,
        ranks: Ranks | None = None,
    ) -> Iterable[Mapping[str, Any]]:
        from ddiff.runs.fields.command import sample_run

        return sample_run(run, arguments, prints_ids, observer, ranks)

    def encode(
        self,
        recipe: FieldsRecipe,
        out: str | None,
        shard_size: int | None,
        max_samples: int | None,
    ) -> EncodedDocuments:
        from ddiff.runs.fields.command import encode_fields

        options = {"--out": out, "--shard-size": shard_size, "--max-samples": max_samples}
        return encode_fields(recipe, options)


FIELDS_RUNS = FieldsRuns()
