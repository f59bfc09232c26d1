"""`ddiff eval` refuses data that differ from those of the training run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command, is_refusal, read_evaluation
from small import CORPUS
from tiny_run import files

import ddiff as api

EVAL = ("eval", "runs/tiny")
LINES = CORPUS.splitlines()


def held_out() -> set[str]:
    documents = api.load("runs/tiny").data.documents
    return {text.strip() for text in documents.validation["text"]}


def write(lines: list[str]) -> None:
    Path("corpus.txt").write_text("\n".join(lines))


def change(lines: list[str]) -> list[str]:
    return [line.replace("cat", "CAT") for line in lines]


def add_training(lines: list[str]) -> list[str]:
    return [*lines, *(f"one more line {number}" for number in range(20))]


def drop_training(lines: list[str]) -> list[str]:
    kept = held_out()
    first = next(line for line in lines if line not in kept)
    return [line for line in lines if line != first]


def drop_validation(lines: list[str]) -> list[str]:
    first = next(iter(sorted(held_out())))
    return [line for line in lines if line != first]


def reverse(lines: list[str]) -> list[str]:
    return lines[::-1]


CHANGES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "changed lines": (change, "validation rows"),
    "added lines": (add_training, "training rows"),
    "a training line dropped": (drop_training, "training rows"),
    "a validation line dropped": (drop_validation, "validation rows"),
    "another order": (reverse, "rows"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_eval_refuses_changed_data_and_names_the_difference(
    name: str, run_dir: Path, ddiff: Command
) -> None:
    changed, expected = CHANGES[name]
    write(changed(LINES))
    before = files(run_dir)
    assert is_refusal(ddiff(*EVAL), expected, "runs/tiny", "--out")
    assert files(run_dir) == before


def test_eval_of_unchanged_data_writes_the_same_results(run_dir: Path, ddiff: Command) -> None:
    before = read_evaluation(run_dir)
    answer = ddiff(*EVAL)
    assert answer.code == 0, answer.err
    assert read_evaluation(run_dir) == before


def test_eval_accepts_the_same_data_at_another_path(run_dir: Path, ddiff: Command) -> None:
    """The corpus is moved, and the recipe of the run names the new path."""
    Path("moved.txt").write_text(CORPUS)
    Path("corpus.txt").unlink()
    recipe = run_dir / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('"corpus.txt"', '"moved.txt"'))
    assert ddiff(*EVAL).code == 0


def test_eval_with_option_out_evaluates_changed_data_and_keeps_results(
    run_dir: Path, ddiff: Command
) -> None:
    write(change(LINES))
    before = files(run_dir)
    answer = ddiff(*EVAL, "--out", "other/data.json")
    assert answer.code == 0, answer.err
    assert "evaluation of runs/tiny" in answer.err
    assert files(run_dir) == before
    written = json.loads(Path("other/data.json").read_text())
    own = json.loads(before["evaluation.json"])
    assert written["nelbo_nats_per_token"] != own["nelbo_nats_per_token"]
    assert any("validation rows" in line for line in written["changed_data"])
    assert [path.name for path in Path("other").iterdir()] == ["data.json"]


def test_eval_with_option_out_on_the_same_data_reports_no_change(
    run_dir: Path, ddiff: Command
) -> None:
    before = files(run_dir)
    answer = ddiff(*EVAL, "--set", "evaluate.draws=2", "--out", "two.json")
    assert (answer.code, "other data" in answer.err) == (0, False)
    assert files(run_dir) == before
    written = json.loads(Path("two.json").read_text())
    assert written["protocol"]["draws"] == 2
    assert "changed_data" not in written


def test_run_evaluate_refuses_changed_data(run_dir: Path) -> None:
    write(change(LINES))
    with pytest.raises(api.CheckpointError, match="validation rows"):
        api.load(run_dir).evaluate()
    evaluation, _ = api.load(run_dir).evaluate(changed_data=True)
    assert evaluation.tokens > 0


def test_repeated_run_refuses_changed_data(run_dir: Path, ddiff: Command) -> None:
    """Only the validation text has changed, and the run is not yet evaluated."""
    write(drop_validation(LINES))
    (run_dir / "evaluation.json").unlink()
    before = files(run_dir)
    assert is_refusal(ddiff("run", "tiny.toml"), "rows")
    assert files(run_dir) == before


LABELS = (
    "--set",
    'data={kind="jsonl", files=["rows.jsonl"], labels=["topic"], held_out=0.3, length=8}',
)


def labelled(shift: int) -> None:
    rows = [{"text": line, "topic": (number + shift) % 2} for number, line in enumerate(LINES)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_eval_refuses_changed_labels(folder: Path, ddiff: Command) -> None:
    labelled(0)
    told = ("--set", "denoiser.conditions.topic={classes=2}")
    answer = ddiff("run", "tiny.toml", "--set", "train.steps=2", *LABELS, *told)
    assert answer.code == 0, answer.err
    assert ddiff(*EVAL).code == 0
    labelled(1)
    assert is_refusal(ddiff(*EVAL), "conditions", "--out")


@pytest.mark.parametrize(
    "place", ["runs/tiny/evaluation.json", "runs/tiny/checkpoints/x.json", "corpus.txt", "."]
)
def test_eval_with_option_out_refuses_to_overwrite_files_of_the_run(
    place: str, run_dir: Path, ddiff: Command
) -> None:
    before = files(Path())
    assert is_refusal(ddiff(*EVAL, "--out", place), "ddiff eval --out")
    assert files(Path()) == before
