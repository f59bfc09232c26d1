"""Build the denoiser of a recipe: backbone, output head and precision."""

from __future__ import annotations

import torch

from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import Vocabulary
from ddiff.nn.adapters import LoraSettings, add_adapters
from ddiff.nn.denoiser import Backbone, Denoiser, resolve_precision
from ddiff.recipe.model import Recipe


def build_denoiser(
    recipe: Recipe,
    vocabulary: Vocabulary,
    process: ForwardProcess | None,
    backbone: Backbone | None = None,
) -> Denoiser:
    """Build the denoiser on the current default device of torch.

    `process`: forward process, None for a model without one. `backbone` replaces the backbone of
    the recipe if it is not None.
    """
    if backbone is None:
        torch.manual_seed(recipe.seed)  # dropout continues from the state after building
        backbone = recipe.denoiser.build(
            vocabulary=vocabulary, length=recipe.length, process=process
        )
    inputs = recipe.objective.members.inputs
    # P(x_i | x_<i) contains no evidence from position i that could be divided out
    given = recipe.denoiser_keys.given if inputs == "own" else "rest"
    assert recipe.head is not None
    head = recipe.head.build(vocabulary=vocabulary, width=backbone.width)
    denoiser = Denoiser(backbone, head, given, inputs)
    keys = recipe.backend_keys
    denoiser.precision = resolve_precision(keys.precision, keys.device)
    lora = recipe.denoiser_keys.lora
    if lora is not None:
        init = recipe.train.init
        # the head belongs to the base if a run or a pretrained model gives its weights
        has_run = init is not None and init.run is not None
        has_head = has_run or backbone.has_pretrained_output
        add_adapters(denoiser, LoraSettings(**lora.model_dump()), trains_head=not has_head)
    return denoiser
