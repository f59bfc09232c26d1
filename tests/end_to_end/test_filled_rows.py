"""Runs of rows that a fill symbol fills up: infill texts, prompts and edits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Command
from filled import RECIPE, TRAINING, VALIDATION
from small import working_in

import ddiff as api
from ddiff import ArgumentError
from ddiff.data.tokenizer import AlphabetTokenizer
from ddiff.runs.generation import generate_and_evaluate
from ddiff.runs.prompts import encode_infill, encode_prompt, make_frame
from ddiff.runs.run import Run


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with working_in(tmp_path_factory.mktemp("filled")):
        Path("filled.toml").write_text(RECIPE)
        Path("filled.txt").write_text("\n".join(TRAINING))
        Path("filled_validation.txt").write_text("\n".join(VALIDATION))
        yield api.run("filled.toml")


def test_frame_of_an_infill_text_gives_the_fill_symbol_after_its_end() -> None:
    tokenizer = AlphabetTokenizer(" abs", fill=" ")
    template = encode_infill("[MASK:2]s", tokenizer, 5)
    frame = make_frame([template], 5, tokenizer)
    assert frame.tokens.tolist() == [[0, 0, 3, 0, 0]]
    assert frame.clamped.tolist() == [[False, False, True, True, True]]
    assert frame.valid is None


def test_frame_of_a_prompt_samples_the_positions_after_its_end() -> None:
    tokenizer = AlphabetTokenizer(" abs", fill=" ")
    frame = make_frame([encode_prompt("ab", tokenizer, 5)], 5, tokenizer)
    assert frame.clamped.tolist() == [[True, True, False, False, False]]


def test_frame_without_a_fill_symbol_ends_after_the_infill_text() -> None:
    tokenizer = AlphabetTokenizer("abs")
    frame = make_frame([encode_infill("[MASK:2]s", tokenizer, 5)], 5, tokenizer)
    assert frame.clamped.tolist() == [[False, False, True, True, True]]
    assert frame.valid is not None
    assert frame.valid.tolist() == [[True, True, True, False, False]]


@pytest.mark.slow
def test_infill_text_equals_the_text_with_explicit_fill(filled: Run) -> None:
    """The explicit text gives the fill symbol at the same positions, so the draws are equal."""
    short = filled.sample(infill="[MASK:2]b", count=16)
    explicit = filled.sample(infill="[MASK:2]b   ", count=16)
    assert [sample["text"] + "   " for sample in short] == [sample["text"] for sample in explicit]
    assert {len(sample["text"]) for sample in short} == {3}
    assert {sample["text"][2] for sample in short} == {"b"}
    assert len({sample["text"] for sample in short}) > 1


@pytest.mark.slow
def test_infill_texts_of_several_lengths_do_not_depend_on_their_batch(filled: Run) -> None:
    texts = ["[MASK:2]b", "a[MASK:4]", "[MASK:1]"]
    together = filled.sample(infill=texts, batch=3)
    assert together == filled.sample(infill=texts, batch=1)
    assert [len(sample["text"]) for sample in together] == [3, 5, 1]


@pytest.mark.slow
def test_prompt_of_a_filled_run_draws_the_rest_of_the_row(filled: Run) -> None:
    samples = filled.sample(prompt="ab", count=4)
    assert {(sample["text"][:2], len(sample["text"])) for sample in samples} == {("ab", 6)}


@pytest.mark.slow
def test_edit_of_a_filled_run_keeps_the_length_of_its_source(filled: Run) -> None:
    edited = filled.edit(["dbb"], 0.4, "random", steps=3)
    assert [len(sample["text"]) for sample in edited] == [3]


@pytest.mark.slow
def test_bound_of_a_short_text_is_that_of_its_filled_row(filled: Run) -> None:
    short = filled.nelbo(["dbb", "abcda"])
    rows = filled.nelbo(["dbb   ", "abcda "])
    assert short.tokens == 12
    assert short == rows
    exact = filled.chain_rule(["dbb"])
    assert exact.nll.tolist() == filled.chain_rule(["dbb   "]).nll.tolist()


@pytest.mark.slow
def test_eval_of_a_file_fills_up_its_lines(filled: Run, ddiff: Command) -> None:
    Path("lines.txt").write_text("dbb\nabcda\n")
    code, _, _ = ddiff("eval", str(filled.run_dir), "--data", "lines.txt", "--split", "line")
    assert code == 0
    found = json.loads((filled.run_dir / "evaluation-lines.json").read_text())
    assert found["symbols"] == 12


NAMES = [
    "well-formed strings",
    "well-formed strings not in the training data",
    "well-formed strings in the held-out data",
    "total variation of lengths from held-out strings",
    "total variation of lengths from held-out strings: other held-out strings",
]


@pytest.mark.slow
def test_samples_of_a_text_run_are_judged(filled: Run) -> None:
    judged = json.loads((filled.run_dir / "judged.json").read_text())
    found = {finding["name"]: finding for finding in judged["targets"]["text"]}
    assert set(found) <= set(NAMES)
    lines = (filled.run_dir / "samples.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    good = [text for text in texts if text.strip() and " " not in text.rstrip()]
    assert found[NAMES[0]]["value"] == len(good) / 16
    assert found[NAMES[3]]["interval"] is not None


@pytest.mark.slow
def test_generated_samples_of_a_text_run_are_judged(
    filled: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    report = generate_and_evaluate(filled.run_dir, count=32)
    found = {finding["name"]: finding for finding in report.written["findings"]}
    assert found[NAMES[0]]["count"] == 32
    assert report.record.figures[f"judged: {NAMES[0]}"].value == found[NAMES[0]]["value"]
    assert NAMES[0] in capsys.readouterr().out


@pytest.mark.slow
def test_run_with_a_judge_of_other_data_writes_nothing(filled: Run) -> None:
    """The judge is built before training."""
    settings = ["run_dir=runs/refused", 'judge={kind="digits"}']
    with pytest.raises(ArgumentError, match=r"\[judge\].*got documents of one text"):
        api.run("filled.toml", settings=settings)
    assert not Path("runs/refused").exists()


@pytest.mark.slow
def test_sample_command_fills_gaps_in_rows_of_symbols(filled: Run, ddiff: Command) -> None:
    run_dir = str(filled.run_dir)
    code, out, _ = ddiff("sample", run_dir, "--infill", "[MASK:2]b", "--count", "2")
    assert code == 0
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    assert texts == [sample["text"] for sample in filled.sample(infill="[MASK:2]b", count=2)]
