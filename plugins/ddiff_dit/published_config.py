"""Reading and checking of published configurations, shared by all layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddiff import (
    ArgumentError,
    ComponentConfig,
    Layout,
    PublishedFiles,
    PublishedTensors,
)

from .folding import Sizes

PREFIX = "backbone."


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


def read_hub_sizes(files: PublishedFiles, *, has_modulation: bool = True) -> Sizes:
    """Read the sizes from a configuration of kuleshov-group or s-sahoo on the hub.

    `has_modulation`: whether the network embeds sigma.
    """
    return Sizes(
        rows=files.read_count("vocab_size"),
        width=files.read_count("hidden_dim"),
        layers=files.read_count("n_blocks"),
        heads=files.read_count("n_heads"),
        condition=files.read_count("cond_dim") if has_modulation else 0,
        length=files.read_count("model_length"),
    )


def write_hub_config(sizes: Sizes, dropout: float, *, time_conditioning: bool) -> dict[str, Any]:
    """Write the keys that `read_hub_sizes` reads, and those that all of these models have."""
    return {
        "vocab_size": sizes.rows,
        "hidden_dim": sizes.width,
        "cond_dim": sizes.condition,
        "n_blocks": sizes.layers,
        "n_heads": sizes.heads,
        "model_length": sizes.length,
        "dropout": dropout,
        "time_conditioning": time_conditioning,
    }


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
