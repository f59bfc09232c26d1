"""repr() of public objects is one short line with settings and without tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import ddiff as api
from ddiff.core.elbo import Likelihood, NelboTerms
from ddiff.plugin.loader import survey_plugins


def is_short(text: str) -> bool:
    """Return True if a text is one short line without tensors and memory addresses."""
    return "\n" not in text and len(text) <= 240 and "tensor(" not in text and " at 0x" not in text


def components() -> list[str]:
    return [component.name for component in survey_plugins().registry.components("process")]


@pytest.mark.parametrize("name", components())
def test_process_repr_is_one_short_line(name: str) -> None:
    component = survey_plugins().registry.component("process", name)
    examples = getattr(component.load(), "examples", list)()
    for process in examples:
        assert is_short(repr(process)), repr(process)
        assert repr(process).startswith(f"{type(process).__name__}(")
        if hasattr(process, "vocabulary"):
            assert " < ".join(map(str, process.vocabulary.level_sizes)) in repr(process)
    texts = {repr(process) for process in examples}
    assert not examples or len(texts) > 1 or len(examples) == 1, (
        "the texts of different examples are equal"
    )


def test_tree_process_repr_contains_clock_and_xi() -> None:
    vocabulary = api.HierarchicalVocabulary([[0, 1, 0, 1]])
    process = api.TreeProcess(vocabulary, api.LogTimeClock((1.0, 2.5)), xi=0.9)
    assert "clock=LogTimeClock(rates=(1, 2.5))" in repr(process)
    assert "4 < 2 < 1" in repr(process)
    assert "xi=(0.9, 1.0)" in repr(process) or "xi=0.9" in repr(process)
    powers = api.CdfClock((api.PowerSchedule(0.5), api.PowerSchedule(2.0)))
    assert repr(powers) == "CdfClock(schedules=(PowerSchedule(power=0.5), PowerSchedule(power=2)))"


def test_nelbo_terms_repr_contains_the_mean_of_each_term() -> None:
    ones = torch.ones(2, 3, dtype=torch.float64)
    noisy = api.Noisy(ones.long(), ones, ones.bool())
    terms = NelboTerms(0 * ones, 2 * ones, ones / 4, noisy)
    assert repr(terms) == (
        "NelboTerms(closing 0.0000, diffusion 2.0000, decoding 0.2500; "
        "mean nats per position of 2 x 3)"
    )
    assert is_short(repr(Likelihood({"closing": ones}, {"level 1": ones})))
    on_meta = terms._replace(diffusion=ones.to("meta"))
    assert "on meta" in repr(on_meta)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (api.AlphabetTokenizer("ACGT"), r"AlphabetTokenizer\(4 symbols; [0-9a-f]{16}\)"),
        (
            api.BytePairTokenizer.train(["the cat sat"], 257),
            r"BytePairTokenizer\(257 tokens; [0-9a-f]{16}\)",
        ),
    ],
)
def test_tokenizer_repr_contains_size_and_fingerprint(
    tokenizer: api.Tokenizer, expected: str
) -> None:
    assert re.fullmatch(expected, repr(tokenizer))


def test_vocabulary_and_prior_reprs_contain_their_sizes() -> None:
    assert repr(api.FlatVocabulary(5)) == "FlatVocabulary(num_tokens=5, mask=True)"
    assert repr(api.FlatVocabulary(5, mask=False)) == "FlatVocabulary(num_tokens=5, mask=False)"
    tree = api.HierarchicalVocabulary([[0, 0, 1, 1]])
    assert repr(tree) == "HierarchicalVocabulary(level_sizes=(4, 2, 1))"
    assert repr(api.Prior.point(5, 6)) == "Prior(state 5 of 6)"


def test_reprs_of_run_evaluation_and_checkpoint_are_one_line(folder: Path) -> None:
    run = api.run("small.toml", settings=["train.steps=2"])
    for text in (repr(run), repr(api.load("runs/small"))):
        assert is_short(text), text
        assert text.startswith("Run('runs/small': ")
        assert "step 2 of 2" in text
    evaluation = run.nelbo(["the old cat sat"], draws=1)
    assert is_short(repr(evaluation))
    assert f"NELBO {evaluation.nelbo_nats_per_token:.4f}" in repr(evaluation)
    assert is_short(repr(run.checkpoints.newest()))
