"""A run with the tokenizer `letters` reports bits per byte only for texts that it restores."""

from __future__ import annotations

from pathlib import Path

import pytest

import ddiff as api


@pytest.mark.slow
def test_letters_run_has_bits_per_byte_only_for_folded_texts(folder: Path) -> None:
    settings = ["train.steps=2", "data.length=24", 'tokenizer="letters"']
    api.run("small.toml", settings=settings)
    run = api.load("runs/small")
    assert run.vocabulary.num_tokens == 27
    folded = run.nelbo(["the old cat sat"])
    assert folded.unit == "token"
    assert folded.bits_per_byte is not None
    changed = run.nelbo(["The old cat sat."])
    assert changed.bits_per_byte is None
    # the same characters: the full stop becomes a space
    assert changed.tokens == folded.tokens + 1
    sample = run.sample(1, infill="The [MASK:3] sat")[0]["text"]
    assert sample.startswith("the")
    assert sample.endswith(" sat")
    assert len(sample) == len("the") + 3 + len(" sat")
