"""Build the model of a recipe.

Only `assemble` combines a process, a denoiser and an objective. Training, loading, dry runs and
measurements all call `assemble`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError
from ddiff.evaluation.likelihood import Scored
from ddiff.nn.denoiser import Backbone, Denoiser
from ddiff.recipe.model import Recipe
from ddiff.runs.meta_device import build_denoiser_on_meta
from ddiff.runs.network import build_denoiser
from ddiff.training.protocols import Objective


@dataclass(frozen=True)
class Overrides:
    """Vocabulary and process that a Python caller passed to replace those of the recipe."""

    vocabulary: Vocabulary | None = None
    process: ForwardProcess | None = None

    def to_dict(self) -> dict[str, str]:
        given: dict[str, str] = {}
        if self.vocabulary is not None:
            given["vocabulary"] = self.vocabulary.fingerprint
        if self.process is not None:
            given["process"] = f"{type(self.process).__module__}:{type(self.process).__qualname__}"
        return given


NO_OVERRIDES: Overrides = Overrides()


class ModelObjective(Objective, Scored, Protocol):
    """Objective that trains a denoiser and computes the likelihood of text under the denoiser."""


@dataclass(frozen=True)
class Model:
    """Denoiser with its forward process and its objective.

    `process` is None for a model without a forward process (autoregression).
    """

    vocabulary: Vocabulary
    process: ForwardProcess | None
    denoiser: Denoiser
    objective: ModelObjective
    device: torch.device


def assemble(
    recipe: Recipe,
    vocabulary: Vocabulary,
    device: torch.device,
    *,
    process: ForwardProcess | None = None,
    backbone: Backbone | None = None,
) -> Model:
    """Build the process, the denoiser and the objective of a recipe on `device`.

    The seed of the recipe determines the initial weights. `process` and `backbone` replace the
    components of the recipe if they are not None.

    If `device` is the meta device, the weights use no memory and are not initialized. This does not
    hold for a component whose constructor computes with its weights.

    Raises ArgumentError if the process was built on a different vocabulary.
    """
    if process is None:
        process = build_process(recipe, vocabulary)
    if process is not None and process.vocabulary.fingerprint != vocabulary.fingerprint:
        raise ArgumentError(
            f"process must be on the run's vocabulary {vocabulary} with fingerprint "
            f"{vocabulary.fingerprint}; got a process on {process.vocabulary} with fingerprint "
            f"{process.vocabulary.fingerprint}. Pass vocabulary as well, or "
            "build the process on the run's vocabulary."
        )
    denoiser = None
    if device.type == "meta" and backbone is None:
        denoiser = build_denoiser_on_meta(recipe, vocabulary, process)
    if denoiser is None:
        denoiser = build_denoiser(recipe, vocabulary, process, backbone)
    objective = _build_objective(recipe, process, denoiser)
    objective.module.to(device)
    return Model(vocabulary, process, denoiser, objective, device)


def replace_process(recipe: Recipe, model: Model, process: ForwardProcess) -> Model:
    """Return a model with the denoiser of `model` and another process on the same vocabulary."""
    objective = _build_objective(recipe, process, model.denoiser)
    return Model(model.vocabulary, process, model.denoiser, objective, model.device)


def _build_objective(
    recipe: Recipe, process: ForwardProcess | None, denoiser: Denoiser
) -> ModelObjective:
    """Build the objective of a recipe with its loss and its time rule."""
    loss = recipe.loss.build(process=process) if recipe.loss else None
    times = recipe.times.build() if recipe.times else None
    return recipe.objective.build(process=process, denoiser=denoiser, loss=loss, times=times)


def build_process(recipe: Recipe, vocabulary: Vocabulary) -> ForwardProcess | None:
    """Build the forward process of a recipe.

    Returns None if the recipe has no [process] and its objective does not use a process. Raises
    ArgumentError if the objective needs a process and the recipe has no [process].
    """
    if recipe.process is not None:
        return recipe.process.build(vocabulary=vocabulary, width=None)
    if recipe.objective.takes_input("process"):
        raise ArgumentError(
            f'{recipe.name}: [objective] kind = "{recipe.objective.component.name}" needs a '
            "[process]. Add the table to the recipe."
        )
    return None
