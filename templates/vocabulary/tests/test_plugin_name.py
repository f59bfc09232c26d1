"""The vocabulary plugin_name obeys every law of a vocabulary, and groups tokens by frequency."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ddiff_plugin_name.vocabulary import PluginName

from ddiff import AlphabetTokenizer, ArgumentError
from ddiff.testing import assert_laws, check_vocabulary

TOKENIZER = AlphabetTokenizer("abcde")


class CountedRows:
    """Stand-in for the rows of a run, of which the vocabulary reads only the counts."""

    @staticmethod
    def token_counts() -> np.ndarray:
        return np.array([3, 9, 1, 7, 5])


def test_vocabulary_obeys_every_law() -> None:
    config = PluginName.Config(groups=2)
    vocabulary = PluginName.build(config, tokenizer=TOKENIZER, rows=CountedRows())
    assert_laws(check_vocabulary(vocabulary))


def test_first_group_has_the_most_frequent_tokens() -> None:
    config = PluginName.Config(groups=2)
    vocabulary = PluginName.build(config, tokenizer=TOKENIZER, rows=CountedRows())
    # b, d and e are the most frequent; groups have the ids after the tokens
    assert vocabulary.parent(torch.arange(5)).tolist() == [6, 5, 6, 5, 5]


def test_preview_has_the_shape_of_the_vocabulary() -> None:
    config = PluginName.Config(groups=3)
    built = PluginName.build(config, tokenizer=TOKENIZER, rows=CountedRows())
    assert PluginName.preview(config, num_tokens=5).level_sizes == built.level_sizes == (5, 3, 1)


def test_vocabulary_refuses_as_many_groups_as_tokens() -> None:
    with pytest.raises(ArgumentError, match="fewer groups"):
        PluginName.preview(PluginName.Config(groups=5), num_tokens=5)
