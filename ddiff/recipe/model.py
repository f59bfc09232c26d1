"""Resolved recipes: the checked settings of an experiment and the components that it names."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ddiff import __version__
from ddiff.errors import ArgumentError, DataError, PluginError
from ddiff.plugin.config import ComponentConfig
from ddiff.plugin.registry import Component, Members, Registry
from ddiff.recipe.schema import (
    SLOTS,
    TABLES,
    TOP_LEVEL,
    BackendKeys,
    DataKeys,
    DenoiserKeys,
    EvaluateKeys,
    SampleKeys,
    TopLevelKeys,
    TrainKeys,
    component_field,
    keys_field,
)
from ddiff.recipe.toml import scalars_first, write_toml
from ddiff.run_dir.files import HEADER
from ddiff.run_dir.identity import flatten_keys


@dataclass(frozen=True)
class ComponentSpec:
    """A component with its settings, ready to be built.

    Args:
        component: the registered component.
        config: its checked settings.
        table: its place in a recipe, as messages write it, such as "[train.optimizer]".
    """

    component: Component
    config: ComponentConfig
    table: str = ""

    @property
    def members(self) -> Members:
        """Members of the component, with the defaults of the optional ones."""
        return self.component.members()

    def build(self, **inputs: Any) -> Any:
        """Call `build(config, ...)` with those of the inputs that it names.

        A component names only the inputs that it uses, so a new input of a kind breaks no plugin.
        Raises PluginError if it names an input that its kind does not have. An ArgumentError or
        DataError that it raises begins with the component's table.
        """
        return self._call("build", self.component.load().build, inputs)

    def preview(self, **inputs: Any) -> Any:
        """Call `preview(config, ...)`: what is known of the result before any data is read."""
        return self._call("preview", self.members.preview, inputs)

    def input_paths(self) -> tuple[str, ...]:
        """List the paths and globs that `build` will read."""
        return self._call("reads", self.members.reads, {})

    def takes_input(self, name: str) -> bool:
        """Return whether `build` names that input."""
        return name in inspect.signature(self.component.load().build).parameters

    @contextmanager
    def prefix_errors(self) -> Iterator[None]:
        """Begin the message of an ArgumentError or DataError raised inside with the table."""
        try:
            yield
        except (ArgumentError, DataError) as error:
            if self.table:
                error.args = (f"{self.table}: {error}",)
            raise

    def _call(self, name: str, function: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        signature = inspect.signature(function)
        takes_all = any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()
        )
        wanted = {
            key: value for key, value in inputs.items() if takes_all or key in signature.parameters
        }
        # bound before the call: a TypeError of the call itself would be a fault inside the function
        try:
            signature.bind(self.config, **wanted)
        except TypeError as error:
            raise PluginError(
                f"The {self.component} cannot be built: its {name}{signature} may ask for config "
                f"and {', '.join(inputs) or 'nothing else'}, but {error}."
            ) from error
        with self.prefix_errors():
            return function(self.config, **wanted)

    def to_dict(self) -> dict[str, Any]:
        """Return the component's table: its kind and every key, defaults included."""
        return {"kind": self.component.name, **self.config.model_dump(mode="json")}


@dataclass(frozen=True)
class Recipe:
    """A recipe with every default filled in.

    The fields are those of `schema.TABLES`, which fixes their names (`component_field`,
    `keys_field`); here each gets its type. A component is None if the recipe has none.
    """

    name: str
    seed: int
    run_dir: str
    plugins: tuple[str, ...]

    data: ComponentSpec
    data_keys: DataKeys
    tokenizer: ComponentSpec
    vocabulary: ComponentSpec
    process: ComponentSpec | None
    denoiser: ComponentSpec
    denoiser_keys: DenoiserKeys
    head: ComponentSpec | None
    objective: ComponentSpec
    loss: ComponentSpec | None
    times: ComponentSpec | None
    train: TrainKeys
    optimizer: ComponentSpec
    backend: ComponentSpec
    backend_keys: BackendKeys
    evaluate: EvaluateKeys
    sample: SampleKeys
    sampler: ComponentSpec
    tracker: ComponentSpec

    # not compared: the same recipe may be read from another file and with more plugins installed
    registry: Registry = field(repr=False, compare=False)
    source: str = field(default="", repr=False, compare=False)
    """File that the recipe was read from."""

    @property
    def length(self) -> int:
        """Tokens in a row: [data] length."""
        return self.data_keys.length

    def components(self) -> dict[str, ComponentSpec]:
        """Return the components by their place: `process`, `denoiser.head`, `train.optimizer`."""
        found = {}
        for path in SLOTS:
            # vars(), because the names of the fields follow from the schema
            spec = vars(self)[component_field(path)]
            if spec is not None:
                found[".".join(path)] = spec
        return found

    def origins(self) -> dict[str, str]:
        """Describe the origin of each component: `kimura (ddiff_kimura, ddiff-kimura 1.0)`."""
        return {
            place: f"{spec.component.name} ({spec.component.origin})"
            for place, spec in self.components().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return nested tables of plain values, with every default written out."""
        fields = vars(self)
        tree: dict[str, Any] = {key: fields[key] for key in TopLevelKeys.model_fields}
        tree["plugins"] = list(self.plugins)  # TOML and JSON have lists only
        for name, table in TABLES.items():
            written: dict[str, Any] = {}
            spec = fields[component_field((name,))] if table.component else None
            if spec is not None:
                written |= spec.to_dict()
            if table.keys is not None:
                # after the component's keys: one that repeats a key of the engine has its value
                written |= fields[keys_field(name)].model_dump(mode="json")
            for slot in table.slots:
                slot_spec = fields[component_field((name, slot))]
                if slot_spec is not None:
                    written[slot] = slot_spec.to_dict()
            if written:
                tree[name] = written
        return scalars_first({key: tree[key] for key in TOP_LEVEL if key in tree})

    def to_toml(self) -> str:
        """Write `to_dict` as TOML text, which reads back as the same recipe."""
        return write_toml(self.to_dict(), f"{HEADER} {__version__} resolved it.")

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify `to_dict`."""
        # sorted, so that the order of tables in the schema does not matter
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def diff_recipes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the dotted keys in which two `Recipe.to_dict` differ, with both values; None: absent."""
    before = flatten_keys(old)
    after = flatten_keys(new)
    changed = []
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            changed.append((key, before.get(key), after.get(key)))
    return changed
