"""Models of the transformers library as backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("backbone", "hf", "ddiff_hf.backbone:PretrainedBackbone")
