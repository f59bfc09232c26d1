"""Schema of a recipe: its tables, the keys of each table, and the components that tables name.

A recipe has one of two layouts: `TEXT`, for a model of one text, or `FIELDS`, for a model of
several fields, which has a table [fields.NAME] for each field. The layouts are the only lists of
the tables. The attributes of `Recipe` and `FieldsRecipe`, their order in a written recipe, and the
messages about unknown names are derived from the layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ddiff.plugin.config import ComponentConfig
from ddiff.recipe.fields_keys import (
    FieldKeys,
    FieldsEvaluateKeys,
    FieldsObjectiveKeys,
    FieldsSampleKeys,
    FieldsTrainKeys,
)
from ddiff.recipe.keys import (
    BackendKeys,
    DataKeys,
    DenoiserKeys,
    EvaluateKeys,
    SampleKeys,
    TopLevelKeys,
    TrainKeys,
)

TablePath = tuple[str, ...]
"""Path of a table or component in a recipe.

Examples are `("process",)`, `("train", "optimizer")` for a slot, and `("fields", "image")`."""

GROUP = "fields"
"""Name of the table that contains the tables of the fields, [fields.NAME].

A recipe has the layout `FIELDS` if it has this table, and else the layout `TEXT`."""


class Slot(NamedTuple):
    """Key or table of a recipe that names a component.

    Args:
        kind: kind of the component.
        default: name of the default component; None if a recipe must name one.
        is_optional: True if a recipe without this key has no such component. Only for keys; for a
            table, see `Table.is_optional`.
        vectors: name of the default component in the table of a field of vectors, whose process
            has states "vectors"; None: `default`.
    """

    kind: str
    default: str | None
    is_optional: bool = False
    vectors: str | None = None

    def select_default(self, states: frozenset[str]) -> str | None:
        """Return the name of the default component for a field whose process has these states."""
        if self.vectors is not None and "tokens" not in states:
            return self.vectors
        return self.default


class Table(NamedTuple):
    """Description of one table of a recipe.

    Args:
        component: description of the key `kind`, which names the component that defines the other
            keys of the table. None: no component belongs to the table.
        keys: pydantic model of the keys that ddiff itself defines.
        slots: keys that name further components, such as `optimizer` in [train].
        is_optional: True if a recipe without the table has no such component; False if the default
            component is used.
        is_group: True if the table contains named tables, each of which has the described keys.
    """

    component: Slot | None = None
    keys: type[ComponentConfig] | None = None
    slots: Mapping[str, Slot] = {}
    is_optional: bool = False
    is_group: bool = False

    def engine_keys(self) -> list[str]:
        """List the keys that ddiff (not the component) defines, with those of nested components."""
        return [*self.slots, *(self.keys.model_fields if self.keys else ())]

    def has_default(self) -> bool:
        """Return whether a recipe may omit the table."""
        if self.is_optional:
            return True
        if self.is_group:
            return False
        if self.component is not None and self.component.default is None:
            return False
        fields = self.keys.model_fields.values() if self.keys else ()
        return not any(field.is_required() for field in fields)


class Layout(NamedTuple):
    """Set of the tables that a recipe may have.

    Args:
        title: name of such a recipe in messages, such as "a recipe".
        tables: description of each table by name, in the order of a written recipe.
    """

    title: str
    tables: Mapping[str, Table]

    def top_level(self) -> list[str]:
        """List every name that a recipe may have at its top level: keys and tables."""
        return [*TopLevelKeys.model_fields, "extends", *self.tables]

    def list_tables(self, values: Mapping[str, Any]) -> dict[TablePath, Table]:
        """Return the tables of a recipe by path. Each table of a group has its own path.

        `values`: nested tables of the recipe, which determine the names in a group.
        """
        found: dict[TablePath, Table] = {}
        for name, table in self.tables.items():
            if not table.is_group:
                found[name,] = table
                continue
            group = values.get(name)
            for member in group if isinstance(group, Mapping) else ():
                found[name, member] = table
        return found

    def list_slots(self, values: Mapping[str, Any]) -> dict[TablePath, Slot]:
        """Return every path of a recipe that names a component, each table before its slots.

        `values`: nested tables of the recipe, which determine the names in a group.
        """
        slots: dict[TablePath, Slot] = {}
        for path, table in self.list_tables(values).items():
            if table.component is not None:
                slots[path] = table.component
            for key, slot in table.slots.items():
                slots[*path, key] = slot
        return slots

    def expand_shorthand(self, values: dict[str, Any]) -> None:
        """Replace names of components by tables, in place: "muon" by `{"kind": "muon"}`.

        `values`: nested tables of a recipe.
        """
        for path in self.list_slots(values):
            table: Any = values
            for key in path[:-1]:
                table = table.get(key) if isinstance(table, dict) else None
            if isinstance(table, dict) and isinstance(table.get(path[-1]), str):
                table[path[-1]] = {"kind": table[path[-1]]}

    def find_inherited_keys(
        self, path: TablePath, base: Mapping[str, Any], new: Mapping[str, Any]
    ) -> frozenset[str] | None:
        """Return the keys of a base table that an overriding table inherits; None: all keys.

        If the two tables have different kinds, only keys that exist for every kind are inherited.
        All other keys belong to one kind.

        Args:
            path: path of both tables.
            base: table of a recipe.
            new: table that overrides `base`. It comes from `--set` texts, or from a recipe that
                extends the recipe of `base`.
        """
        if "kind" not in new:
            return None
        # the name of a table in a group is part of the path
        values = {path[0]: {path[1]: new}} if len(path) > 1 else {}
        slot = self.list_slots(values).get(path)
        if slot is None or new["kind"] == base.get("kind", slot.default):
            return None
        # without a kind, the default depends on the process, which may be in another file
        if "kind" not in base and new["kind"] == slot.vectors:
            return None
        table = self.list_tables(values).get(path)
        return frozenset(table.engine_keys()) if table else frozenset()


TEXT = Layout(
    "a recipe",
    {
        "data": Table(Slot("dataset", None), DataKeys),
        "tokenizer": Table(Slot("tokenizer", None)),
        "vocabulary": Table(Slot("vocabulary", None)),
        "process": Table(Slot("process", None), is_optional=True),
        "denoiser": Table(Slot("backbone", None), DenoiserKeys, {"head": Slot("head", "tokens")}),
        "objective": Table(
            Slot("objective", "nelbo"),
            slots={"loss": Slot("training_loss", "elbo"), "times": Slot("time_rule", "flat")},
        ),
        "train": Table(None, TrainKeys, {"optimizer": Slot("optimizer", "adamw")}),
        "backend": Table(Slot("backend", "single"), BackendKeys),
        "evaluate": Table(None, EvaluateKeys),
        "sample": Table(None, SampleKeys, {"sampler": Slot("sampler", "ancestral")}),
        "tracker": Table(Slot("tracker", "none")),
        "encoder": Table(Slot("encoder", None), is_optional=True),
        "judge": Table(Slot("judge", None), is_optional=True),
    },
)
"""Layout of a recipe for a model of one text."""

FIELDS = Layout(
    "a recipe with fields",
    {
        "data": Table(Slot("fields_dataset", None)),
        GROUP: Table(
            None,
            FieldKeys,
            {
                "tokenizer": Slot("tokenizer", None, is_optional=True),
                "vocabulary": Slot("vocabulary", "flat"),
                "process": Slot("process", None),
                "head": Slot("head", "tokens", vectors="vector"),
                "loss": Slot("training_loss", "elbo"),
                "times": Slot("time_rule", "flat"),
                "sampler": Slot("sampler", "ancestral", vectors="ddim"),
                "normalizer": Slot("normalizer", "none", vectors="standard"),
            },
            is_group=True,
        ),
        "denoiser": Table(Slot("joint_backbone", None)),
        "objective": Table(None, FieldsObjectiveKeys, {"times": Slot("path_rule", "shared")}),
        "train": Table(None, FieldsTrainKeys, {"optimizer": Slot("optimizer", "adamw")}),
        "backend": Table(Slot("backend", "single"), BackendKeys),
        "evaluate": Table(None, FieldsEvaluateKeys, {"path": Slot("path_rule", "shared")}),
        "sample": Table(None, FieldsSampleKeys, {"path": Slot("path_rule", "shared")}),
        "tracker": Table(Slot("tracker", "none")),
        "encoder": Table(Slot("encoder", None), is_optional=True),
        "judge": Table(Slot("judge", None), is_optional=True),
    },
)
"""Layout of a recipe for a model of several fields."""


def find_layout(values: Mapping[str, Any]) -> Layout:
    """Return the layout of a recipe. `values`: nested tables of the recipe."""
    return FIELDS if GROUP in values else TEXT


def component_field(path: TablePath) -> str:
    """Return the name of the recipe attribute for a component: the last part of its path.

    The slot `path` exists in several tables, and has the name of its table before it.
    """
    return "_".join(path) if path[-1] == "path" else path[-1]


def keys_field(path: TablePath, table: Table) -> str:
    """Return the name of the recipe attribute with those keys of a table that ddiff defines.

    The attribute is named like the table, with the ending `_keys` if the table also has a
    component. It is `keys` for a table of a group.
    """
    if table.is_group:
        return "keys"
    return path[-1] if table.component is None else f"{path[-1]}_keys"
