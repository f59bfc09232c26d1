"""Component of a recipe together with its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ddiff.errors import ArgumentError, DataError, PluginError
from ddiff.plugin.config import ComponentConfig
from ddiff.plugin.registry import Component, Members

VECTOR_INPUTS = {"process": "width", "head": "dim"}
"""Input of `build` with the numbers per vector of a field, by kind. It is None for tokens."""


@dataclass(frozen=True)
class ComponentSpec:
    """Registered component together with its checked settings.

    Args:
        component: the registered component.
        config: checked settings of the component.
        table: table of the component in a recipe, such as "[train.optimizer]", for messages.
    """

    component: Component
    config: ComponentConfig
    table: str = ""

    @property
    def members(self) -> Members:
        """Members of the component, with defaults for missing optional members."""
        return self.component.members()

    def build(self, **inputs: Any) -> Any:
        """Call `build(config, ...)` of the component with the inputs that its signature names.

        `inputs`: all inputs of the component's kind, such as `vocabulary` and `length` of a
        backbone. A component names only the inputs that it uses, so plugins still work if their
        kind gets a new input. Raises PluginError if `build` has a parameter that is not an input.
        If `build` raises an ArgumentError or DataError, the component's table is added to the
        beginning of the message.
        """
        self._check_states(inputs)
        return self._call("build", self.component.load().build, inputs)

    def preview(self, **inputs: Any) -> Any:
        """Call `preview(config, ...)`, which describes the result of `build` without reading data.

        Returns None if the component cannot describe the result.
        """
        return self._call("preview", self.members.preview, inputs)

    def input_paths(self) -> tuple[str, ...]:
        """List the paths and globs of the files that `build` of the component will read."""
        return self._call("reads", self.members.reads, {})

    def takes_input(self, name: str) -> bool:
        """Return whether `build` has a parameter for the input `name`."""
        return name in inspect.signature(self.component.load().build).parameters

    def load(self, **inputs: Any) -> Any:
        """Call `load(config, ...)`, which rebuilds a saved normalizer or tokenizer.

        Raises PluginError if the component has no `load`.
        """
        load = self.members.load
        if load is None:
            raise PluginError(
                f"The {self.component} has no load, so a run with it cannot be loaded. In the "
                f"plugin, define load(config, {', '.join(inputs)})."
            )
        return self._call("load", load, inputs)

    def _check_states(self, inputs: Mapping[str, Any]) -> None:
        """Raise ArgumentError if a component for tokens gets a field of vectors."""
        kind = self.component.kind
        numbers = inputs.get(VECTOR_INPUTS.get(kind, ""))
        if numbers is None or "vectors" in self.members.states:
            return
        with self.prefix_errors():
            raise ArgumentError(
                f'The {kind} "{self.component.name}" is for tokens, but the vectors of this field '
                f"have {numbers} numbers. Use a {kind} for vectors: the plugin core has the head "
                '"vector", and the plugin gaussian has the process "gaussian".'
            )

    @contextmanager
    def prefix_errors(self) -> Iterator[None]:
        """Add the name of the component's table to messages of errors raised in a `with` block.

        Only the messages of ArgumentError and DataError are changed.
        """
        try:
            yield
        except (ArgumentError, DataError) as error:
            if self.table:
                error.args = (f"{self.table}: {error}",)
            raise

    def _call(self, name: str, function: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """Call `function` with the settings, and with the inputs that are among its parameters.

        Args:
            name: name of `function`, for messages.
            function: function of the component, such as `build`.
            inputs: all inputs by name.
        """
        signature = inspect.signature(function)
        takes_all = any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()
        )
        wanted = {
            key: value for key, value in inputs.items() if takes_all or key in signature.parameters
        }
        # bound before the call, because a TypeError of the call may be a defect inside the function
        try:
            signature.bind(self.config, **wanted)
        except TypeError as error:
            raise PluginError(
                f"The {self.component} cannot be built: its {name}{signature} may only have the "
                f"parameters {', '.join(['config', *inputs])}, but {error}."
            ) from error
        with self.prefix_errors():
            return function(self.config, **wanted)

    def to_dict(self) -> dict[str, Any]:
        """Return the table of the component: its kind and all keys, including defaults."""
        return {"kind": self.component.name, **self.config.model_dump(mode="json")}
