"""Text runs: the kind of the runs of recipes of one text.

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
from ddiff.recipe.model import Recipe
from ddiff.run_dir.destination import Destination
from ddiff.runs.build import Overrides, assemble
from ddiff.runs.conditioning import check_sampling
from ddiff.runs.kinds import EvaluationOptions, refuse_options
from ddiff.runs.memory import check_memory
from ddiff.training.protocols import Backend
from ddiff.training.settings import TrainingSummary

if TYPE_CHECKING:
    from ddiff.runs.encode import EncodedDocuments
    from ddiff.runs.observer import SampleObserver
    from ddiff.runs.run import Run


class TextRuns:
    """Kind of the runs of text recipes; `RunKind` describes the methods."""

    def build_run(self, recipe: Recipe, backend: Backend, overrides: Overrides) -> Run:
        from ddiff.runs.text_stages import build_run

        return build_run(recipe, backend, overrides)

    def load_run(
        self, recipe: Recipe, directory: Path, newest: Checkpoint, process: ForwardProcess | None
    ) -> Run:
        from ddiff.runs.text_stages import load_run

        return load_run(recipe, directory, newest, process)

    def after_training(self, run: Run, summary: TrainingSummary, ranks: Ranks) -> None:
        from ddiff.runs.text_stages import after_training

        after_training(run, summary, ranks)

    def rehearse(self, recipe: Recipe, device: torch.device) -> str:
        """Check the model and the memory without reading the data.

        If the recipe determines the number of tokens, the model is built on the meta device, with a
        placeholder vocabulary of the same shape.
        """
        recipe.data.preview(length=recipe.length)
        vocabulary = recipe.vocabulary.preview(num_tokens=recipe.tokenizer.preview())
        init = recipe.train.init
        if init is not None and init.run is not None:
            from ddiff.runs.initial_weights import check_source  # imports tokenizers

            check_source(init.run)
        model = None  # unknown before the tokens are counted
        if vocabulary is not None:
            model = assemble(recipe, vocabulary, torch.device("meta"))
        verdict = check_memory(recipe, model.denoiser if model else None, device)
        if model is not None:
            check_sampling(recipe, model)
        return verdict

    def print_cost(self, recipe: Recipe, steps: int) -> None:
        from ddiff.runs.cost_table import print_measurement
        from ddiff.runs.measure import measure

        print_measurement(measure(recipe, steps))

    def evaluate(
        self, run: Run, target: Destination | None, options: EvaluationOptions, ranks: Ranks
    ) -> Any:
        if options.data:
            from ddiff.runs.given_texts import evaluate_given_texts

            return evaluate_given_texts(run, target, options, ranks)
        from ddiff.runs.evaluation_report import reevaluate

        return reevaluate(run, target, options.until, ranks)

    def sample(
        self,
        run: Run,
        arguments: Mapping[str, Any],
        prints_ids: bool,
        observer: SampleObserver | None = None,
        ranks: Ranks | None = None,
    ) -> Iterable[Mapping[str, Any]]:
        others = dict(arguments)
        names = ("given", "only", "target", "images")
        own = {f"--{name}": others.pop(name, None) for name in names}
        refuse_options(run, own, "a run of text", "Use --prompt, --infill or --condition.")
        if observer is None:
            samples = run.sample(**others, ranks=ranks)
        else:
            from ddiff.runs.trajectory import observe_samples

            with observe_samples(run, observer, others) as on_step:
                samples = run.sample(**others, on_step=on_step, ranks=ranks)
        if not prints_ids:
            for sample in samples:
                del sample["ids"]
        return samples

    def encode(
        self, recipe: Recipe, out: str | None, shard_size: int | None, max_samples: int | None
    ) -> EncodedDocuments:
        from ddiff.runs.encode import SHARD_SIZE, encode_documents

        size = shard_size or SHARD_SIZE
        return encode_documents(recipe, out, shard_size=size, max_samples=max_samples)


TEXT_RUNS = TextRuns()
