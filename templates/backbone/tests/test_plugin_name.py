"""The backbone plugin_name obeys every law of a denoiser: padding, documents and blocks."""

from __future__ import annotations

from ddiff_plugin_name.backbone import PluginName

from ddiff import CdfClock, Denoiser, FlatVocabulary, LinearSchedule, TokenHead, TreeProcess
from ddiff.testing import assert_laws, check_denoiser


def test_backbone_obeys_every_law() -> None:
    vocabulary = FlatVocabulary(5)
    backbone = PluginName.build(PluginName.Config(), vocabulary=vocabulary)
    denoiser = Denoiser(backbone, TokenHead(vocabulary, backbone.width))
    process = TreeProcess(vocabulary, CdfClock([LinearSchedule()]))
    assert_laws(check_denoiser(denoiser, process))
