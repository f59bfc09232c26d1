"""A run: a recipe with its model, its data and its directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddiff.checkpoint.checkpoints import Checkpoint, Checkpoints, load_weights
from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.tokenizer import Tokenizer
from ddiff.evaluation.baselines import Baselines
from ddiff.evaluation.likelihood import Evaluation
from ddiff.nn.denoiser import Denoiser
from ddiff.recipe.model import Recipe
from ddiff.run_dir.files import CHECKPOINTS
from ddiff.runs.build import NO_OVERRIDES, Model, ModelObjective, Overrides, assemble
from ddiff.runs.data import RunData, RunText
from ddiff.runs.evaluation import (
    count_baselines,
    evaluation_protocol,
    score_texts,
    score_validation,
)
from ddiff.runs.provenance import changed_data_error, find_changed_data
from ddiff.runs.sampling import SampleRequest, draw_samples
from ddiff.sampling.loop import OnStep, Sampler


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A recipe with its model and its data.

    `ddiff.run` and `ddiff.load` return one whose network has the weights of the newest checkpoint.
    """

    recipe: Recipe
    model: Model
    data: RunData
    overrides: Overrides = NO_OVERRIDES

    @classmethod
    def assemble(
        cls, text: RunText, vocabulary: Vocabulary, device: torch.device, overrides: Overrides
    ) -> Run:
        """Assemble the model of a recipe next to its text; its weights are not trained."""
        model = assemble(text.recipe, vocabulary, device, process=overrides.process)
        data = RunData(text, model.denoiser.condition_dropout, model.denoiser.condition_forms)
        return cls(text.recipe, model, data, overrides)

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.denoiser.parameters())
        parts = [
            str(self.process or type(self.objective).__name__),
            f"{parameters:,} parameters",
            f"step {self.step} of {self.recipe.train.steps}",
            str(self.device),
        ]
        return f"Run({str(self.run_dir)!r}: {', '.join(parts)})"

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.data.tokenizer

    @property
    def vocabulary(self) -> Vocabulary:
        return self.model.vocabulary

    @property
    def process(self) -> ForwardProcess | None:
        return self.model.process

    @property
    def denoiser(self) -> Denoiser:
        return self.model.denoiser

    @property
    def objective(self) -> ModelObjective:
        return self.model.objective

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(str(self.run_dir / CHECKPOINTS), self.recipe.train.keep)

    @property
    def step(self) -> int:
        """Step of the newest checkpoint; 0 if there is none."""
        return max(self.checkpoints.steps(), default=0)

    @property
    def uses_ema(self) -> bool:
        """True if the exponential moving average of the weights is evaluated and sampled."""
        weights = self.recipe.evaluate.weights
        if weights == "auto":
            return self.recipe.train.ema > 0.0
        return weights == "ema"

    # ------------------------------------------------------------------ likelihood

    def evaluate(self, *, changed_data: bool = False) -> tuple[Evaluation, Baselines]:
        """Compute the bound of the validation text, and the scores of counting baselines.

        Every token of the evaluated rows counts once. Raises CheckpointError if the data are not
        those that the run was trained with, unless `changed_data` allows it.
        """
        # checked here and not on loading, which must work without the data
        if not changed_data:
            changed = find_changed_data(self.checkpoints.newest(), self.data, self.model)
            if changed:
                raise changed_data_error(self.run_dir, changed)
        found = score_validation(self.model, self.data, self.recipe)
        num_tokens = self.vocabulary.num_tokens
        return found, count_baselines(self.data, self.recipe, num_tokens)

    def nelbo(
        self,
        texts: Sequence[str],
        draws: int = 8,
        *,
        conditions: Mapping[str, int | Sequence[float]] | None = None,
    ) -> Evaluation:
        """Compute the bound of some texts, each a document, all under the `conditions`.

        More draws of times and noise narrow the interval; the expected bound stays the same.
        """
        return score_texts(self.model, self.recipe, self.tokenizer, texts, draws, conditions or {})

    def protocol(self) -> dict[str, Any]:
        """Settings in which two runs must agree before their figures can be compared."""
        return evaluation_protocol(self.data, self.recipe)

    # ------------------------------------------------------------------ samples

    def sample(
        self,
        count: int | None = None,
        *,
        steps: int | None = None,
        seed: int | None = None,
        batch: int | None = None,
        prompt: str | Sequence[str] | None = None,
        infill: str | Sequence[str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        guidance: float | None = None,
        sampler: str | Sampler | None = None,
        settings: Sequence[str] = (),
        on_step: OnStep | None = None,
    ) -> list[dict[str, Any]]:
        """Draw samples: dicts with `index`, `text`, `ids`, `nfe`, and the `prompt` or `infill`.

        A sample is a function of its number and the seed; the size of its batch changes nothing.
        Given tokens are kept bit for bit. Where an argument is None, the recipe decides.

        Args:
            count: samples of each prompt or infill text; 1 by default if several are given.
            steps: steps of the sampler.
            seed: the same seed gives the same samples.
            batch: samples drawn at a time.
            prompt: one text or several, continued to [data] length.
            infill: one text or several with gaps, `She [MASK:8] to Bath`; a sample ends with it.
            conditions: by name, a label (int) or a vector, or a list with one for each sample.
            guidance: classifier-free guidance weight; above 1 follows the conditions more closely.
            sampler: the kind of a sampler, or a sampler object.
            settings: `key=value` texts over the keys of the sampler.
            on_step: called as `on_step(step, canvas)` after every step.
        """
        request = SampleRequest(
            count=count,
            steps=steps,
            seed=seed,
            batch=batch,
            prompt=prompt,
            infill=infill,
            conditions=conditions,
            guidance=guidance,
            sampler=sampler,
            settings=settings,
        )
        return draw_samples(self.recipe, self.model, self.tokenizer, request, on_step)

    # ------------------------------------------------------------------ weights

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Load the weights of a checkpoint, or their moving average, into the network."""
        weights = checkpoint.read_weights(average=self.uses_ema)
        load_weights(self.objective.module, weights, str(self.run_dir))
