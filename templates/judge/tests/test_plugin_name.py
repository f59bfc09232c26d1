"""The judge plugin_name obeys every law of a judge, and finds new pairs."""

from __future__ import annotations

from ddiff_plugin_name.judge import PluginName

from ddiff import TEXT_FIELD, Documents, DrawnField, DrawnFields, documents_from_texts
from ddiff.testing import assert_laws, check_judge

DOCUMENTS = Documents(documents_from_texts(["abab", "abc"]), documents_from_texts(["abab"]))


def draw(*texts: str) -> DrawnFields:
    """Return texts as samples that a run has drawn."""
    return DrawnFields(TEXT_FIELD, [TEXT_FIELD], [], {TEXT_FIELD: DrawnField(list(texts))})


def make_judge() -> PluginName:
    return PluginName.build(PluginName.Config(), documents=DOCUMENTS)


def test_judge_obeys_every_law() -> None:
    assert_laws(check_judge(make_judge(), draw("abab", "cab", "bc")))


def test_judge_counts_samples_without_new_pairs() -> None:
    known, variation = make_judge().judge(draw("abab", "ca"))  # "ca" is a new pair
    assert known.value == 0.5
    assert variation.value > 0
    _, same = make_judge().judge(draw("abab"))
    assert same.value == 0  # the pairs of the held-out text
