"""The data set plugin_name obeys every law of a data set, and its sums are right."""

from __future__ import annotations

import pytest
from ddiff_plugin_name.dataset import LENGTH, PluginName

from ddiff import ArgumentError, Documents
from ddiff.testing import assert_laws, check_dataset


def build() -> Documents:
    return PluginName.build(PluginName.Config(rows=50, validation=20), length=LENGTH, seed=0)


def test_dataset_obeys_every_law() -> None:
    assert_laws(check_dataset(build))


def test_every_row_is_a_right_sum_of_nine_symbols() -> None:
    for text in build().train["text"]:
        summands, total = text.split("=")
        assert len(text) == LENGTH
        assert sum(map(int, summands.split("+"))) == int(total)


def test_dataset_refuses_another_length() -> None:
    with pytest.raises(ArgumentError, match="Use length = 9"):
        PluginName.preview(PluginName.Config(), length=8)
