"""The process plugin_name obeys every law of a process."""

from __future__ import annotations

import pytest
from ddiff_plugin_name.process import PluginName

from ddiff import ArgumentError, FlatVocabulary
from ddiff.testing import assert_laws, check_process


def test_process_obeys_every_law() -> None:
    for process in PluginName.examples():
        assert_laws(check_process(process))


def test_process_refuses_a_vocabulary_with_a_mask() -> None:
    with pytest.raises(ArgumentError, match="mask = false"):
        PluginName.build(PluginName.Config(), vocabulary=FlatVocabulary(4))
