"""Autoregression from left to right, with exact likelihood and sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("objective", "ar", "ddiff_ar.objective:Autoregression")
    registry.add("sampler", "left_to_right", "ddiff_ar.sampler:LeftToRight")
