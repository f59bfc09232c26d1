"""Edits of texts with trained runs: `Run.edit` and `ddiff sample --edit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command, is_refusal

import ddiff as api
from ddiff.errors import ArgumentError
from ddiff.evaluation.editing import attribute_accuracy, summarize_edits
from ddiff.runs.prompts import encode_source, make_frame
from ddiff.runs.run import Run

pytestmark = pytest.mark.slow


def lines_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# ---------------------------------------------------------------------- edits


def test_edit_toward_a_label_changes_only_the_edited_symbols(labelled: Run) -> None:
    """With ratio 1 the texts are samples of the target label. With ratio 0 they do not change."""
    sources = ["abbaabab", "aabb", "bbbbbbb"] * 8

    def classify(texts: Any) -> list[int]:
        return [int(sum(symbol in "cd" for symbol in text) > len(text) / 2) for text in texts]

    ids = labelled.tokenizer.encode(sources)
    for mode in ("random", "entropy", "suffix"):
        edits = labelled.edit(sources, 0.5, mode, conditions={"kind": 1})
        figures = summarize_edits(edits, ids)
        assert figures["untouched_share"] == 1.0
        assert 0.3 < figures["edited_share"] < 0.7
        assert [len(edit["text"]) for edit in edits] == [len(source) for source in sources]
    whole = labelled.edit(sources, 1.0, conditions={"kind": 1})
    accuracy = attribute_accuracy([edit["text"] for edit in whole], [1] * 24, classify)
    assert accuracy > 0.9
    same = labelled.edit(sources, 0.0, conditions={"kind": 1})
    assert [edit["text"] for edit in same] == sources
    assert {edit["nfe"] for edit in same} == {0}


@pytest.mark.parametrize("sampler", ["ancestral", "confidence", "remdm", "tau_leaping"])
def test_edit_of_a_tree_process_restores_text_and_keeps_clamped_tokens(
    small: Run, sampler: str
) -> None:
    sources = ["the old cat sat on the x", "red hat"]
    edits = small.edit(sources, 0.4, "entropy", sampler=sampler, steps=3)
    ids = small.tokenizer.encode(sources)
    for source, edit in zip(ids, edits, strict=True):
        assert len(edit["ids"]) == len(source)
        assert len(edit["edited"]) == int(0.4 * len(source) + 0.5)
        others = set(range(len(source))) - set(edit["edited"])
        assert all(edit["ids"][place] == source[place] for place in others)
        assert max(edit["ids"]) < small.vocabulary.num_tokens


def test_special_tokens_in_a_source_are_never_editable(labelled: Run) -> None:
    class WithSpecialToken:
        """Tokenizer of the run, in which symbol b is a special token."""

        special_ids = (1,)

        def encode(self, texts: list[str]) -> list[list[int]]:
            return labelled.tokenizer.encode(texts)

    template = encode_source("abcab", WithSpecialToken(), 8)  # type: ignore[arg-type]
    assert template.given.tolist() == [False, True, False, False, True]
    frame = make_frame([template], 8, labelled.tokenizer)
    assert frame.clamped[0].tolist() == [False, True, False, False, True, True, True, True]


def test_edit_does_not_depend_on_the_batch_size(small: Run) -> None:
    sources = ["the old cat", "red", "the red hat sat on", "a"]
    together = small.edit(sources, 0.5, "entropy", steps=3, batch=4)
    assert together == small.edit(sources, 0.5, "entropy", steps=3, batch=1)
    assert together != small.edit(sources, 0.5, "entropy", steps=3, seed=9)


def test_guidance_of_an_edit_doubles_the_evaluations(labelled: Run) -> None:
    """The choice of the positions is guided too."""
    plain, guided = (
        labelled.edit("abab", 0.5, "suffix", conditions={"kind": 1}, guidance=weight)[0]["nfe"]
        for weight in (1.0, 2.0)
    )
    assert guided == 2 * plain > 0


def test_sample_command_prints_edits_as_json_lines(
    place: Path, labelled: Run, ddiff: Command
) -> None:
    run_dir = str(place / "runs/labelled")
    code, out, _ = ddiff(
        *("sample", run_dir, "--edit", "abba", "--edit", "ababab", "--ratio", "0.5"),
        *("--mode", "entropy", "--condition", "kind=1", "--steps", "4", "--seed", "3"),
    )
    assert code == 0
    expected = labelled.edit(
        ["abba", "ababab"], 0.5, "entropy", conditions={"kind": 1}, steps=4, seed=3
    )
    assert lines_of(out) == expected
    assert list(expected[0]) == [
        *("index", "source", "text", "ids", "edited", "ratio", "mode", "nfe")
    ]
    code, out, _ = ddiff("sample", run_dir, "--edit", "abba", "--no-ids")
    assert "ids" not in lines_of(out)[0]
    assert [(line["ratio"], line["mode"]) for line in lines_of(out)] == [(0.3, "random")]


def test_toward_option_passes_the_vectors_of_a_file(place: Path, ddiff: Command) -> None:
    run = api.load(place / "runs/styled")
    run_dir = str(place / "runs/styled")
    one, two = [0.5, 2.0], [[0.5, 2.0], [0.5, 0.0]]
    for number, vectors in enumerate((one, two)):
        file = place / f"target{number}.npy"
        np.save(file, np.array(vectors))
        code, out, _ = ddiff(
            *("sample", run_dir, "--edit", "abcd", "--edit", "dcba"), "--toward", str(file)
        )
        assert code == 0
        assert lines_of(out) == run.edit(["abcd", "dcba"], conditions={"style": vectors})


# ---------------------------------------------------------------------- refusals

REFUSALS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "ratio above 1": ("labelled", ("--edit", "ab", "--ratio", "1.5"), ("ratio", "[0, 1]", "1.5")),
    "negative ratio": ("labelled", ("--edit", "ab", "--ratio=-0.1"), ("ratio", "[0, 1]", "-0.1")),
    "empty text": ("labelled", ("--edit", ""), ("edit", "at least one token")),
    "long text": ("labelled", ("--edit", "abababababab"), ("edit", "8 tokens", "12 tokens")),
    "unknown symbol": ("labelled", ("--edit", "abx"), ("'abx'", "'x'")),
    "unknown mode": ("labelled", ("--edit", "ab", "--mode", "sufix"), ("mode", '"suffix"')),
    "sampler with its own times": (
        "labelled",
        ("--edit", "ab", "--sampler", "first_hitting"),
        ("FirstHittingSampler", "chooses its own times", "ancestral"),
    ),
    "unknown condition": ("labelled", ("--edit", "ab", "--condition", "kid=1"), ('"kind"',)),
    "prompt": ("labelled", ("--edit", "ab", "--prompt", "a"), ("--edit", "--prompt", "exclude")),
    "count": ("labelled", ("--edit", "ab", "--count", "2"), ("--edit", "--count", "exclude")),
    "ratio without edit": ("labelled", ("--ratio", "0.5"), ("--ratio needs --edit",)),
    "no vector condition": (
        "labelled",
        ("--edit", "ab", "--toward", "x.npy"),
        ("exactly one vector condition", "none"),
    ),
    "missing file": ("styled", ("--edit", "ab", "--toward", "x.npy"), ("--toward", "x.npy")),
    "text file": ("styled", ("--edit", "ab", "--toward", "rows.jsonl"), ("rows.jsonl", ".npy")),
    "wrong width": ("styled", ("--edit", "ab", "--toward", "three.npy"), ("width 2",)),
    "vector given twice": (
        "styled",
        ("--edit", "ab", "--toward", "three.npy", "--condition", "style=[1.0, 2.0]"),
        ("--toward", '"style"', "once"),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_invalid_edit_is_refused_before_any_output(
    place: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(place)
    np.save("three.npy", np.zeros(3))
    run, arguments, expected = REFUSALS[case]
    result = ddiff("sample", f"runs/{run}", *arguments)
    assert is_refusal(result, *expected)
    assert result.out == ""


def test_edit_refuses_an_autoregressive_run_and_an_empty_list(
    place: Path, labelled: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("DDIFF_CACHE", str(place / "cache"))
    recipe = Path("labelled.toml").read_text()
    recipe = recipe.replace('[process]\nkind = "mdlm"', '[objective]\nkind = "ar"')
    recipe = recipe.replace('plugins = ["mdlm", "dit"]', 'plugins = ["ar", "dit"]')
    Path("left.toml").write_text(recipe.replace('"labelled"', '"left"'))
    with pytest.raises(ArgumentError, match="autoregressive"):
        api.run("left.toml", settings=["train.steps=2", 'sample.sampler="left_to_right"']).edit(
            "abab"
        )
    with pytest.raises(ArgumentError, match="at least one text"):
        labelled.edit([], 0.5)
