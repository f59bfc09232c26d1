"""Resolved recipe of several fields, such as a text, a picture and a vector of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ddiff.errors import RecipeError
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.fields_keys import (
    FieldKeys,
    FieldsEvaluateKeys,
    FieldsObjectiveKeys,
    FieldsSampleKeys,
    FieldsTrainKeys,
)
from ddiff.recipe.model import BaseRecipe, Recipe
from ddiff.recipe.schema import FIELDS, GROUP, Layout, TablePath


@dataclass(frozen=True, kw_only=True)
class FieldTables:
    """Components and keys of one field, from its table [fields.NAME].

    A field of vectors has no tokenizer, and its vocabulary is not used. A field of tokens does not
    use its normalizer.
    """

    keys: FieldKeys
    tokenizer: ComponentSpec | None
    vocabulary: ComponentSpec
    process: ComponentSpec
    head: ComponentSpec
    loss: ComponentSpec
    times: ComponentSpec
    sampler: ComponentSpec
    normalizer: ComponentSpec


@dataclass(frozen=True, kw_only=True)
class FieldsRecipe(BaseRecipe):
    """A recipe of several fields, with every default filled in."""

    layout: ClassVar[Layout] = FIELDS

    fields: Mapping[str, FieldTables]
    """Components and keys of each field by name, in the order of the recipe."""
    objective: FieldsObjectiveKeys
    times: ComponentSpec
    """Path rule of the training, [objective] times."""
    train: FieldsTrainKeys
    evaluate: FieldsEvaluateKeys
    evaluate_path: ComponentSpec
    """Path of the fields that move in an evaluation."""
    sample: FieldsSampleKeys
    sample_path: ComponentSpec
    """Path of the fields that move in sampling."""

    def groups(self) -> Mapping[str, Mapping[str, Any]]:
        return {GROUP: self.fields}

    def attributes(self, path: TablePath) -> Mapping[str, Any]:
        return vars(self.fields[path[1]]) if path[0] == GROUP else vars(self)


def require_text_recipe(recipe: BaseRecipe, caller: str) -> Recipe:
    """Return a recipe of one text. Raises RecipeError for a recipe of several fields.

    `caller`: command or function that takes recipes of one text only, for the message.
    """
    if isinstance(recipe, Recipe):
        return recipe
    raise RecipeError(
        f"{recipe.source or recipe.name}: {caller} needs a recipe of one text, without the table "
        f"[{GROUP}]; got a recipe with the fields {', '.join(recipe.groups()[GROUP])}. Give "
        "another recipe."
    )
