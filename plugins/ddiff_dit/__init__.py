"""Diffusion transformers as backbones, of one field (arXiv 2212.09748) or several (2403.03206)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("backbone", "dit", "ddiff_dit.dit:DiT")
    registry.add("backbone", "ddit", "ddiff_dit.ddit:DDiT")
    registry.add("joint_backbone", "mmdit", "ddiff_dit.mmdit:MMDiT")
    registry.add("layout", "mdlm", "ddiff_dit.published:MdlmLayout")
    registry.add("layout", "bd3lm", "ddiff_dit.published:Bd3lmLayout")
    registry.add("layout", "hybrid_epsilon", "ddiff_dit.published:EpsilonLayout")
    registry.add("layout", "duo_ar", "ddiff_dit.published:AutoregressiveLayout")
    registry.add("layout", "mdlm_sigma", "ddiff_dit.published_levels:SigmaMdlmLayout")
    registry.add("layout", "sedd", "ddiff_dit.published_levels:SeddLayout")
    registry.add("layout", "gidd", "ddiff_dit.published_levels:GiddLayout")
    registry.add("layout", "udlm", "ddiff_dit.published_levels:UdlmLayout")
    registry.add("layout", "duo", "ddiff_dit.published_levels:DuoLayout")
    registry.add("layout", "hybrid_gamma", "ddiff_dit.published_levels:GammaLayout")
