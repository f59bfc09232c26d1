"""Reading and checking of published configurations, shared by all layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddiff import (
    ArgumentError,
    ComponentConfig,
    DataError,
    Layout,
    PublishedFiles,
    PublishedTensors,
)

from .folding import Sizes

PREFIX = "backbone."
MISSING: Any = object()


class SettinglessLayout(Layout):
    """Base class of layouts whose table has no keys."""

    class Config(ComponentConfig):
        """Empty: a layout has no keys."""

    @classmethod
    def build(cls, config: Config) -> Layout:
        return cls()


def strip_prefix(tensors: PublishedTensors) -> PublishedTensors:
    """Return the tensors of the network. Raw modules have no prefix."""
    has_prefix = any(name.startswith(PREFIX) for name in tensors.names)
    return tensors.without_prefix(PREFIX) if has_prefix else tensors


def read_value(files: PublishedFiles, key: str) -> Any:
    """Return the value of a dotted key. Raises DataError if it is missing."""
    value: Any = files.config
    for part in key.split("."):
        value = value.get(part, MISSING) if isinstance(value, Mapping) else MISSING
    if value is MISSING:
        raise DataError(
            f"{files.source}: the configuration has no key {key}, which this layout needs. Use the "
            "configuration that was published with the weights."
        )
    return value


def read_count(files: PublishedFiles, key: str) -> int:
    """Return a positive integer of the configuration. Raises DataError for another value."""
    value = read_value(files, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(
            f"{files.source}: the key {key} must be a positive integer; got {value!r}. Use the "
            "configuration that was published with the weights."
        )
    return value


def read_hub_sizes(files: PublishedFiles, *, has_modulation: bool = True) -> Sizes:
    """Read the sizes from a configuration of kuleshov-group or s-sahoo on the hub.

    `has_modulation`: whether the network embeds sigma.
    """
    return Sizes(
        rows=read_count(files, "vocab_size"),
        width=read_count(files, "hidden_dim"),
        layers=read_count(files, "n_blocks"),
        heads=read_count(files, "n_heads"),
        condition=read_count(files, "cond_dim") if has_modulation else 0,
        length=read_count(files, "model_length"),
    )


def check_equal(key: str, expected: Any, found: Any) -> None:
    if found != expected:
        raise ArgumentError(
            f"export: this layout represents only models with {key} = {expected!r}; got "
            f"{found!r}. Use another --format, or export the weights under their own names with "
            "--format safetensors."
        )


def kind_of(value: Any) -> Any:
    """Return the kind of a component in a resolved recipe."""
    return value["kind"] if isinstance(value, Mapping) else value
