"""Resolved recipe: the checked settings of an experiment and its components.

`Recipe` configures a model of text. `FieldsRecipe`, in `ddiff.recipe.fields_recipe`, configures a
model of several fields. `BaseRecipe` has what both have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ddiff import __version__
from ddiff.plugin.registry import Registry
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.fields_keys import FieldsEvaluateKeys, FieldsSampleKeys, FieldsTrainKeys
from ddiff.recipe.keys import (
    BackendKeys,
    DataKeys,
    DenoiserKeys,
    EvaluateKeys,
    SampleKeys,
    TopLevelKeys,
    TrainKeys,
)
from ddiff.recipe.schema import TEXT, Layout, TablePath, component_field, keys_field
from ddiff.recipe.toml import scalars_first, write_toml
from ddiff.run_dir.files import HEADER
from ddiff.run_dir.identity import flatten_keys


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """A recipe with every default filled in.

    `component_field` and `keys_field` in `ddiff.recipe.schema` define the names of the attributes.
    The attribute of a component is None if the recipe has no such component.
    """

    layout: ClassVar[Layout]
    """Tables of such a recipe."""

    name: str
    seed: int
    run_dir: str
    plugins: tuple[str, ...]

    data: ComponentSpec
    denoiser: ComponentSpec
    train: TrainKeys | FieldsTrainKeys
    optimizer: ComponentSpec
    backend: ComponentSpec
    backend_keys: BackendKeys
    evaluate: EvaluateKeys | FieldsEvaluateKeys
    sample: SampleKeys | FieldsSampleKeys
    tracker: ComponentSpec
    encoder: ComponentSpec | None
    judge: ComponentSpec | None

    # not compared, because equal recipes may be read from different files
    registry: Registry = field(repr=False, compare=False)
    source: str = field(default="", repr=False, compare=False)
    """Path of the recipe file."""

    @property
    def length(self) -> int | None:
        """Number of tokens in a row; None for a recipe of several fields."""
        return None

    @property
    def initial_run(self) -> str | None:
        """Directory of the run whose weights the training starts from; None: no such run."""
        return None

    def components(self) -> dict[str, ComponentSpec]:
        """Return the components by path, such as `process` or `train.optimizer`."""
        found = {}
        for path in self.layout.list_slots(self.groups()):
            spec = self.attributes(path)[component_field(path)]
            if spec is not None:
                found[".".join(path)] = spec
        return found

    def groups(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the names of the tables in each group, as the keys of a mapping by group."""
        return {}

    def attributes(self, path: TablePath) -> Mapping[str, Any]:
        """Return the attributes that contain the table or component at a path, by name."""
        # vars(), because the layout determines the names of the attributes
        return vars(self)

    def origins(self) -> dict[str, str]:
        """Return the origin of each component, as `kimura (ddiff_kimura, ddiff-kimura 1.0)`."""
        return {
            place: f"{spec.component.name} ({spec.component.origin})"
            for place, spec in self.components().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as nested dicts of plain values, including every default."""
        own = vars(self)
        tree: dict[str, Any] = {key: own[key] for key in TopLevelKeys.model_fields}
        tree["plugins"] = list(self.plugins)  # TOML and JSON have lists only
        for path, table in self.layout.list_tables(self.groups()).items():
            attributes = self.attributes(path)
            written: dict[str, Any] = {}
            spec = attributes[component_field(path)] if table.component else None
            if spec is not None:
                written |= spec.to_dict()
            if table.keys is not None:
                # The engine's keys replace keys of the component that have the same name.
                written |= attributes[keys_field(path, table)].model_dump(mode="json")
            for slot in table.slots:
                slot_spec = attributes[component_field((*path, slot))]
                if slot_spec is not None:
                    written[slot] = slot_spec.to_dict()
            if written:
                parent = tree
                for group in path[:-1]:
                    parent = parent.setdefault(group, {})
                parent[path[-1]] = written
        return scalars_first({key: tree[key] for key in self.layout.top_level() if key in tree})

    def to_toml(self) -> str:
        """Return the recipe as TOML text. Reading this text gives an equal recipe."""
        return write_toml(self.to_dict(), f"{HEADER} {__version__} resolved it.")

    @property
    def fingerprint(self) -> str:
        """Hash of all values in the recipe, as sixteen hexadecimal digits."""
        # sorted, so that the hash does not depend on the order of tables in the schema
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """A recipe of one text, with every default filled in."""

    layout: ClassVar[Layout] = TEXT

    data_keys: DataKeys
    tokenizer: ComponentSpec
    vocabulary: ComponentSpec
    process: ComponentSpec | None
    denoiser_keys: DenoiserKeys
    head: ComponentSpec | None
    objective: ComponentSpec
    loss: ComponentSpec | None
    times: ComponentSpec | None
    train: TrainKeys
    evaluate: EvaluateKeys
    sample: SampleKeys
    sampler: ComponentSpec

    @property
    def length(self) -> int:
        """Number of tokens in a row: [data] length."""
        return self.data_keys.length

    @property
    def initial_run(self) -> str | None:
        init = self.train.init
        return None if init is None else init.run


def diff_recipes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the keys that differ between two recipes, as (dotted key, old value, new value).

    The value of an absent key is None.

    Args:
        old: first recipe, from `Recipe.to_dict`.
        new: second recipe, from `Recipe.to_dict`.
    """
    before = flatten_keys(old)
    after = flatten_keys(new)
    changed = []
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            changed.append((key, before.get(key), after.get(key)))
    return changed
