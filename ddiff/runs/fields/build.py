"""Build the model of a recipe of several fields: processes, joint denoiser and objective.

Training, loading, dry runs and measurements all call `assemble_fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ddiff.core.field import Field, Fields
from ddiff.core.rng import CounterRng
from ddiff.core.training_paths import TrainingPath, draw_training
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import resolve_precision
from ddiff.nn.joint_denoiser import JointBackbone, JointDenoiser, StreamShape
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.runs.meta_device import build_on_meta
from ddiff.training.fields_objective import FieldsObjective

if TYPE_CHECKING:
    from ddiff.runs.fields.values import FieldShape, FieldValues


@dataclass(frozen=True)
class FieldsModel:
    """Joint denoiser with the processes of its fields and its objective."""

    fields: Fields
    denoiser: JointDenoiser
    objective: FieldsObjective
    device: torch.device


def assemble_fields(
    recipe: FieldsRecipe,
    shapes: Mapping[str, FieldShape],
    device: torch.device,
    backbone: JointBackbone | None = None,
) -> FieldsModel:
    """Build the processes, the denoiser and the objective of a recipe on `device`.

    The seed of the recipe determines the initial weights. `shapes` has the shape of every field.
    `backbone` replaces the backbone of the recipe if it is not None.

    If `device` is the meta device, the weights use no memory and are not initialized. This does not
    hold for a component whose constructor computes with its weights.

    Raises ArgumentError if the components of a field do not fit its values, or if the path of the
    training cannot be followed.
    """
    fields = build_fields(recipe, shapes)
    path = recipe.times.build(names=list(fields))
    with recipe.times.prefix_errors():
        check_path(path, fields)
    denoiser = None
    if device.type == "meta" and backbone is None:
        denoiser = build_joint_denoiser_on_meta(recipe, shapes)
    if denoiser is None:
        denoiser = build_joint_denoiser(recipe, shapes, backbone)
    losses = {}
    weights = {}
    for name, tables in recipe.fields.items():
        losses[name] = tables.loss.build(process=fields[name].process)
        weights[name] = tables.keys.weight
    objective = FieldsObjective(
        fields,
        denoiser,
        path,
        losses,
        weights,
        recipe.objective.decoding_share,
        recipe.objective.normalization,
    )
    objective.module.to(device)
    return FieldsModel(fields, denoiser, objective, device)


def build_fields(recipe: FieldsRecipe, shapes: Mapping[str, FieldShape]) -> Fields:
    """Build the process and the time rule of every field."""
    fields = {}
    for name, tables in recipe.fields.items():
        shape = shapes[name]
        process = tables.process.build(vocabulary=shape.vocabulary, width=shape.width)
        rule = tables.times.build()
        if rule.has_detours:
            raise ArgumentError(
                f"[fields.{name}] times: {type(rule).__name__} is a time rule of runs of one text; "
                'the times of several fields follow their paths. Use times = "flat".'
            )
        fields[name] = Field(process, rule, shape.positions)
    return fields


def check_path(path: TrainingPath, fields: Fields) -> None:
    """Raise ArgumentError if the time rules of the fields cannot follow a path."""
    index = torch.arange(2)
    draw_training(path, fields, CounterRng(0, 0, index, 1), index, 2)


def build_joint_denoiser_on_meta(
    recipe: FieldsRecipe, shapes: Mapping[str, FieldShape]
) -> JointDenoiser | None:
    """Build the denoiser on the meta device; None if this is not possible."""
    return build_on_meta(lambda: build_joint_denoiser(recipe, shapes), recipe.denoiser.table)


def build_joint_denoiser(
    recipe: FieldsRecipe,
    shapes: Mapping[str, FieldShape],
    backbone: JointBackbone | None = None,
) -> JointDenoiser:
    """Build backbone and heads on the current default device of torch.

    `backbone` replaces the backbone of the recipe if it is not None.
    """
    streams = {}
    for name in recipe.fields:
        shape = shapes[name]
        streams[name] = StreamShape(shape.vocabulary, shape.width, shape.positions, shape.grid)
    if backbone is None:
        torch.manual_seed(recipe.seed)  # dropout continues from the state after building
        backbone = recipe.denoiser.build(streams=streams)
    heads: dict[str, Any] = {}
    for name, tables in recipe.fields.items():
        shape = shapes[name]
        heads[name] = tables.head.build(
            vocabulary=shape.vocabulary, width=backbone.widths[name], dim=shape.width
        )
    denoiser = JointDenoiser(backbone, heads)
    keys = recipe.backend_keys
    denoiser.precision = resolve_precision(keys.precision, keys.device)
    return denoiser


def shapes_of(fields: Mapping[str, FieldValues]) -> dict[str, FieldShape]:
    """Return the shape of every field."""
    return {name: values.shape for name, values in fields.items()}
