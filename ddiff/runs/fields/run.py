"""Trained run of several fields, with the methods `evaluate` and `sample`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ddiff.checkpoint.checkpoints import Checkpoint
from ddiff.core.field_targets import THROUGH
from ddiff.core.rng import CounterRng
from ddiff.data.fields_batch import FieldsBatch
from ddiff.distributed.ranks import Ranks
from ddiff.nn.denoiser import count_parameters
from ddiff.nn.joint_denoiser import JointDenoiser
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.runs.fields.build import FieldsModel, assemble_fields, shapes_of
from ddiff.runs.fields.checks import check_stages, find_text_target
from ddiff.runs.fields.data import RunFields
from ddiff.runs.fields.evaluation import Bounds, TargetEvaluation
from ddiff.runs.fields.noising import sample_noising_of_fields
from ddiff.runs.fields.provenance import check_changed_data, check_components
from ddiff.runs.fields.rate import ThroughEvaluation
from ddiff.runs.fields.sampling import FieldsRequest, draw_fields
from ddiff.runs.fields.values import FieldValues
from ddiff.runs.trainable import TrainableRun
from ddiff.sampling.fields import OnJointStep
from ddiff.training.fields_objective import FieldsObjective

COUNTED_AT_ONCE = 4096  # samples whose tokens are counted together


@dataclass(frozen=True, eq=False, repr=False)
class FieldsRun(TrainableRun):
    """Recipe of several fields with its model and its data.

    `ddiff.run` and `ddiff.load` return a run with the weights of the newest checkpoint.
    """

    recipe: FieldsRecipe
    model: FieldsModel
    data: RunFields

    def __repr__(self) -> str:
        parameters = count_parameters(self.denoiser)
        parts = [
            f"fields {', '.join(self.model.fields)}",
            f"{parameters:,} parameters",
            f"step {self.step} of {self.recipe.train.steps}",
            str(self.device),
        ]
        return f"FieldsRun({str(self.run_dir)!r}: {', '.join(parts)})"

    @property
    def denoiser(self) -> JointDenoiser:
        return self.model.denoiser

    @property
    def objective(self) -> FieldsObjective:
        return self.model.objective

    @property
    def precision(self) -> torch.dtype | None:
        return self.denoiser.precision

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def values(self) -> Mapping[str, FieldValues]:
        """Conversions of the values of every field, by name."""
        return self.data.fields

    # ------------------------------------------------------------------ results

    def evaluate(
        self,
        targets: Sequence[str] | None = None,
        draws: int | None = None,
        *,
        changed_data: bool = False,
        ranks: Ranks | None = None,
    ) -> dict[str, TargetEvaluation | ThroughEvaluation]:
        """Compute the bounds of the validation samples, by target.

        Raises CheckpointError if the data differ from the data of training, unless `changed_data`
        is True. Raises ArgumentError for a target that the training does not cover.

        Args:
            targets: targets such as "joint", "image | text" or "text through latent"; None: those
                of the recipe.
            draws: number of independent draws of times and noise per sample; None: as in the
                recipe.
            changed_data: whether the data may differ from the data of training.
            ranks: processes that divide the batches, all of which call this method
                (`ddiff.connect_ranks`); None: only this process.
        """
        ranks = ranks or Ranks()
        ranks.on_first(self.read_validation)  # the other ranks then read the files in the cache
        if not changed_data:
            ranks.on_first(lambda: check_changed_data(self))
        bounds = Bounds(self.recipe, self.model, self.data, draws, ranks=ranks)
        names = self.recipe.evaluate.targets if targets is None else targets
        return bounds.evaluate(names)

    def sample(
        self,
        count: int | None = None,
        target: str | None = None,
        *,
        given: Mapping[str, Any] | None = None,
        only: Sequence[str] = (),
        steps: int | None = None,
        seed: int | None = None,
        batch: int | None = None,
        on_step: OnJointStep | None = None,
        ranks: Ranks | None = None,
    ) -> list[dict[str, Any]]:
        """Draw samples of one target.

        Returns one dict per sample with `index`, `target`, `given` (names), `fields` and `nfe`
        (number of network evaluations). `fields` maps names to values: a text and its ids, ids, or
        vectors in units of the data. A sample depends on its index and the seed, but not on the
        batch size. If an argument is None, the value in the recipe is used.

        Args:
            count: number of samples.
            target: target such as "joint" or "image | text". None: all fields, or those in
                `only`, given the fields in `given`.
            given: values by the name of a field: one value for all samples, or a list with one
                per sample. A text is a str, tokens are integers [n], and vectors are floats [d]
                or [n,d] in units of the data. A given field of the target that is not named
                takes the values of the first validation samples.
            only: names of the fields that are drawn. The other fields stay at their prior.
            steps: number of steps of the samplers.
            seed: seed of the random generator.
            batch: number of samples per batch.
            on_step: callback `on_step(step, canvases)` with the canvas of each field, called for
                every batch of this process before the first step (step 0) and after every step.
            ranks: processes that divide the batches, all of which call this method with the same
                arguments and get all samples; None: only this process.
        """
        request = FieldsRequest(count, target, dict(given or {}), tuple(only), steps, seed, batch)
        drawn = draw_fields(self.recipe, self.model, self.data, request, on_step, ranks)
        return drawn.to_dicts()

    # ------------------------------------------------------------------ training

    def check_stages(self) -> None:
        check_stages(self.recipe, self.model, shapes_of(self.data.fields), self.data.lacking)

    def initialize_weights(self) -> dict[str, Any] | None:
        """Initialize the head biases of every field of tokens from the counts of its tokens.

        With these biases, the predicted distribution before training is the unigram distribution of
        the training samples.
        """
        for name, values in self.values.items():
            if values.vocabulary is not None:
                counts = count_tokens(values, len(self.data.documents.train))
                head: Any = self.denoiser.heads[name]
                head.start_from_counts(counts)
        return None

    def sample_texts(self, steps: int) -> tuple[Mapping[str, str], int]:
        target = find_text_target(self.recipe)
        assert target is not None, "check_stages refuses [sample] every without a text"
        (sample,) = self.sample(1, str(target), steps=steps)
        texts = {}
        for name in target.drawn:
            if "text" in sample["fields"][name]:
                texts[name] = sample["fields"][name]["text"]
        return texts, sample["nfe"]

    def rng_at(self, step: int, batch: FieldsBatch) -> CounterRng:
        return CounterRng(self.recipe.seed, step, batch.index, 1)

    def prefer_fixed_shapes(self) -> None:
        """Do nothing: a joint denoiser compiles its blocks, whose shapes do not change."""

    def read_validation(self) -> None:
        self.data.validation_batch(np.arange(1))

    def score_validation(self, ranks: Ranks | None = None) -> tuple[Mapping[str, float], str]:
        """Evaluate the targets of the recipe. Return metrics by name, and one line of text."""
        quiet = Console(quiet=True, force_terminal=False)  # keep the progress bar of training
        bounds = Bounds(self.recipe, self.model, self.data, console=quiet, ranks=ranks)
        figures = {}
        sentences = []
        for name in self.recipe.evaluate.targets:
            found = bounds.score(name)
            label = name.replace(THROUGH, "_through_").replace(" ", "")
            figures[f"validation_{label}_nats_per_sample"] = found.nats_per_sample
            sentence = f"{name} {found.nats_per_sample:.4f}"
            if found.interval is not None:
                low, high = found.interval
                figures[f"validation_{label}_interval_low"] = low
                figures[f"validation_{label}_interval_high"] = high
                sentence += f" ({low:.4f} to {high:.4f})"
            sentences.append(sentence)
        return figures, f"validation nats/sample: {'; '.join(sentences)}"

    def copier(self) -> Callable[[], FieldsRun]:
        build = partial(assemble_fields, self.recipe, shapes_of(self.data.fields), self.device)
        recipe = self.recipe
        data = self.data
        return lambda: FieldsRun(recipe, build(), data)

    # ------------------------------------------------------------------ record

    def fingerprints(self) -> dict[str, str]:
        return self.data.fingerprints()

    def noising(self) -> list[float]:
        return sample_noising_of_fields(self.model.fields)

    def given(self) -> dict[str, str]:
        return {}

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        check_components(self, checkpoint)

    def save_components(self, directory: Path) -> None:
        self.data.save(directory)


def count_tokens(values: FieldValues, samples: int) -> Tensor:
    """Return the number of occurrences [V] of every token of a field in the training samples."""
    assert values.vocabulary is not None
    num_tokens = values.vocabulary.num_tokens
    counts = torch.zeros(num_tokens, dtype=torch.long)
    for start in range(0, samples, COUNTED_AT_ONCE):
        numbers = np.arange(start, min(start + COUNTED_AT_ONCE, samples))
        field = values.encode(numbers, "train")
        counts += field.values[field.scored].bincount(minlength=num_tokens)
    return counts
