"""The sampler plugin_name obeys every law of a sampler on masked diffusion.

`ddiff check plugin_name` also checks it on a tree and on uniform noise, which takes longer.
"""

from __future__ import annotations

from ddiff_plugin_name.sampler import PluginName

from ddiff import CdfClock, FlatVocabulary, LinearSchedule, Sampler, TreeProcess
from ddiff.testing import assert_laws, check_sampler


def test_sampler_obeys_every_law() -> None:
    def build(steps: int) -> Sampler:
        return PluginName.build(PluginName.Config(), steps=steps)

    # the laws compare samples with a joint distribution of two of three tokens
    vocabulary = FlatVocabulary(3)
    assert_laws(check_sampler(build, TreeProcess(vocabulary, CdfClock([LinearSchedule()]))))
