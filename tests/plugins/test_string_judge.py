"""Judge of strings: shares by hand, the distance of lengths, and data that it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from ddiff_core.data import Markov
from ddiff_core.fields_data import Digits
from ddiff_core.judges import DigitsJudge, ShapesJudge, VectorsJudge
from ddiff_core.string_judge import StringsJudge

from ddiff import (
    TEXT_FIELD,
    ArgumentError,
    Documents,
    DrawnField,
    DrawnFields,
    Finding,
    documents_from_texts,
    load_bundled_names,
)

TRAIN = ["anne  ", "mary  ", "jane  "]
HELD_OUT = ["emma  ", "ann   ", "fanny ", "jo    "]


def documents(fill: str | None = " ") -> Documents:
    return Documents(documents_from_texts(TRAIN), documents_from_texts(HELD_OUT), fill=fill)


def judge(texts: list[str], data: Documents) -> dict[str, Finding]:
    built = StringsJudge.build(StringsJudge.Config(), documents=data)
    fields = {TEXT_FIELD: DrawnField(texts)}
    found = built.judge(DrawnFields(TEXT_FIELD, (TEXT_FIELD,), (), fields))
    return {finding.name: finding for finding in found}


def test_strings_judge_counts_shares_of_an_example() -> None:
    """The last three strings are malformed: empty, with a gap, and beginning with a space."""
    texts = ["emma  ", "anne  ", "annaxx", "fanny ", "      ", "an ne ", " jo   "]
    found = judge(texts, documents())
    assert (found["well-formed strings"].value, found["well-formed strings"].count) == (4 / 7, 7)
    new = found["well-formed strings not in the training data"]
    assert (new.value, new.count) == (3 / 4, 4)
    assert found["well-formed strings in the held-out data"].value == 2 / 4


def test_strings_judge_compares_lengths_with_half_of_the_held_out_strings() -> None:
    """Of the held-out lengths 4, 3, 5 and 2, two are the baseline and two the reference."""
    found = judge(["abcdef", "abcdef", "abcdef"], documents())
    name = "total variation of lengths from held-out strings"
    assert found[name].value == 1.0
    assert found[f"{name}: other held-out strings"].value == 1.0  # all lengths differ
    assert found[f"{name}: other held-out strings"].count == 2


def test_strings_judge_without_well_formed_strings_has_no_shares_of_them() -> None:
    found = judge(["a b   ", "      "], documents())
    assert found["well-formed strings"].value == 0.0
    assert not [name for name in found if name.startswith("well-formed strings ")]


def test_strings_judge_of_held_out_names_reports_a_perfect_model() -> None:
    """The interval of the distance of names from names contains 0, and the baseline is as near."""
    names = load_bundled_names(length=16)
    drawn = np.random.default_rng(3).choice(names.validation["text"][:], 300).tolist()
    found = judge(drawn, names)
    assert found["well-formed strings"].value == 1.0
    assert found["well-formed strings in the held-out data"].value == 1.0
    assert found["well-formed strings not in the training data"].value == 1.0
    name = "total variation of lengths from held-out strings"
    for finding in (found[name], found[f"{name}: other held-out strings"]):
        assert finding.count == 300
        assert finding.interval is not None
        assert finding.interval[0] == 0.0
        assert finding.value < 0.1


def test_strings_judge_detects_names_that_are_too_short() -> None:
    names = load_bundled_names(length=16)
    short = [text[:4].ljust(16) for text in names.validation["text"][:300]]
    finding = judge(short, names)["total variation of lengths from held-out strings"]
    assert finding.interval is not None
    assert finding.interval[0] > 0.5


def test_strings_judge_refuses_data_without_a_fill_symbol() -> None:
    rows = Markov.build(Markov.Config(rows=4, validation=2), length=4, seed=0, cache=None)
    digits = Digits.build(Digits.Config(), seed=0, cache=None)
    for data in (documents(fill=None), rows, digits):
        with pytest.raises(ArgumentError, match='"strings" needs rows of symbols that a fill'):
            StringsJudge.build(StringsJudge.Config(), documents=data)


@pytest.mark.parametrize("component", [DigitsJudge, ShapesJudge, VectorsJudge])
def test_judges_of_fields_refuse_documents_of_one_text(component: type) -> None:
    with pytest.raises(ArgumentError, match="got documents of one text"):
        component.build(component.Config(), documents=documents())
