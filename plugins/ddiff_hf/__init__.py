"""Models of the transformers library as backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("backbone", "hf", "ddiff_hf.backbone:PretrainedBackbone")
    registry.add("layout", "llada", "ddiff_hf.hub_layouts:LladaLayout")
    registry.add("layout", "dream", "ddiff_hf.hub_layouts:DreamLayout")
    registry.add("layout", "llada2", "ddiff_hf.hub_layouts:Llada2Layout")
    registry.add("layout", "modernbert", "ddiff_hf.hub_layouts:ModernBertLayout")
    registry.add("layout", "a2d", "ddiff_hf.hub_layouts:A2DLayout")
