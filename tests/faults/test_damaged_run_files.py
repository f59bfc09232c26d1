"""Commands on damaged files of a run: they succeed, or name the file and the remedy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Command, is_refusal
from tiny_run import files

import ddiff as api
from ddiff.errors import CheckpointError
from ddiff.run_dir.files import (
    GAPS,
    GENERATION,
    OBJECTS,
    read_json,
    read_json_lines,
    read_recipe_tree,
)
from ddiff.runs.generation import evaluate_generation

STEP = "checkpoints/step_00000004"
FILES = [
    "recipe.toml",
    "environment.json",
    "tokenizer.json",
    "vocabulary.safetensors",
    "metrics.jsonl",
    "evaluation.json",
    "samples.jsonl",
    "sampling.json",
    f"{STEP}/complete.json",
    f"{STEP}/state.json",
    f"{STEP}/manifest.json",
    f"{STEP}/model.safetensors",
]


def replace_by_null(content: bytes) -> bytes:
    """Replace every value of a JSON object by null, and any other JSON file by null."""
    try:
        lines = [json.loads(line) for line in content.splitlines()]
    except ValueError:
        lines = []
    if len(lines) > 1 or (lines and isinstance(lines[0], dict)):
        return "".join(json.dumps(dict.fromkeys(line)) + "\n" for line in lines).encode()
    try:
        return json.dumps(dict.fromkeys(json.loads(content))).encode()
    except ValueError:
        return b"null"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "not UTF-8": lambda content: b"\xff\xfe{}",
    "UTF-16": lambda content: "{}".encode("utf-16"),
    "empty": lambda content: b"",
    "a text": lambda content: b'"x"',
    "a list": lambda content: b"[1]",
    "an empty object": lambda content: b"{}",
    "null": lambda content: b"null",
    "null values": replace_by_null,
    "cut off": lambda content: content[
        : content.rindex(b'"')
    ],  # inside a string, so that the rest is never valid JSON
    "deeply nested": lambda content: b"[" * 100_000,
    "strings for numbers": lambda content: content.replace(b": 4", b': "4"').replace(
        b"= 4", b'= "4"'
    ),
}

COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("run", "tiny.toml"),
    "more steps": ("run", "tiny.toml", "--set", "train.steps=5"),
    "dry run": ("run", "tiny.toml", "--dry-run"),
    "eval": ("eval", "runs/tiny"),
    "sample": ("sample", "runs/tiny", "--count", "1"),
    "export": ("export", "runs/tiny", "weights.safetensors"),
    "compare": ("compare", "runs/tiny"),
    "report": ("report", "runs/tiny", "--draws", "0"),
    "verify": ("run", "tiny.toml", "--verify-resume", "1"),
    "init": (
        "run",
        "tiny.toml",
        "--dry-run",
        "--set",
        "name=other",
        "--set",
        'train.init={run="runs/tiny"}',
    ),
}
READS_NO_DATA = ("dry run", "export", "compare", "report", "sample")


def damage_file(run_dir: Path, file: str, kind: str) -> None:
    path = run_dir / file
    if kind == "a folder":
        path.unlink()
        (path / "within").mkdir(parents=True)
    else:
        path.write_bytes(DAMAGES[kind](path.read_bytes()))


def works_or_names(answer: Any, file: str) -> bool:
    """Return whether a command succeeded, or failed with a message that names `file`."""
    assert "Traceback" not in answer.err
    if answer.code in (0, 1):  # 1: a verification that found a difference
        return answer.code == 0 or "NOT equal" in answer.out
    return is_refusal(answer, Path(file).name)


def check_commands(file: str, kind: str, run_dir: Path, ddiff: Command, commands: Any) -> None:
    whole = Path("whole").absolute()
    shutil.copytree(run_dir, whole)
    for name in commands:
        shutil.rmtree(run_dir)
        shutil.copytree(whole, run_dir)
        damage_file(run_dir, file, kind)
        before = files(run_dir)
        answer = ddiff(*COMMANDS[name])
        assert works_or_names(answer, file), (name, answer)
        if answer.code == 2:
            assert files(run_dir) == before, (
                name,
                "something was written though the command was refused",
            )


WORST = ("not UTF-8", "a list", "null values", "deeply nested", "a folder")
"""Kinds of damage that are tested with every command. All others are tested with the reader."""


@pytest.mark.parametrize("kind", WORST)
@pytest.mark.parametrize("file", FILES)
def test_commands_that_read_no_data_succeed_or_name_the_damaged_file_in_an_error(
    file: str, kind: str, run_dir: Path, ddiff: Command
) -> None:
    check_commands(file, kind, run_dir, ddiff, READS_NO_DATA)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORST)
@pytest.mark.parametrize("file", [file for file in FILES if "/" not in file])
def test_commands_that_read_data_succeed_or_name_the_damaged_file_in_an_error(
    file: str, kind: str, run_dir: Path, ddiff: Command
) -> None:
    check_commands(
        file, kind, run_dir, ddiff, [name for name in COMMANDS if name not in READS_NO_DATA]
    )


# ---------------------------------------------------------------------- readers


@pytest.fixture(scope="session")
def generation(finished: Path) -> str:
    """Content of generation.json of the finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished.parents[1])
        patch.setenv("DDIFF_CACHE", str(finished.parents[1] / "cache"))
        return evaluate_generation(api.load(finished)).to_json()


FILLED_GAP = {
    "step": 4,
    "index": 0,
    "document": 1,
    "position": 12,
    "before": "The cat sat",
    "model": " on a",
    "original": " on the",
    "after": " mat.",
    "nfe": 3.5,
}


@pytest.fixture
def complete_run(run_dir: Path, generation: str) -> Path:
    """Copy of the finished run, with every file that a run of one text may have."""
    (run_dir / GENERATION).write_text(generation)
    # The corpus of the run has no sentence with a gap.
    (run_dir / GAPS).write_text(json.dumps(FILLED_GAP) + "\n")
    return run_dir


@pytest.mark.parametrize("command", ["compare", "report"])
@pytest.mark.parametrize("kind", WORST)
def test_commands_name_a_damaged_record_of_samples(
    kind: str, command: str, complete_run: Path, ddiff: Command
) -> None:
    damage_file(complete_run, GENERATION, kind)
    assert is_refusal(ddiff(*COMMANDS[command]), GENERATION, "--generate to write it again")


def read_file(path: Path) -> Any:
    if path.name == "recipe.toml":
        return read_recipe_tree(path)
    return read_json_lines(path) if path.suffix == ".jsonl" else read_json(path)


@pytest.mark.parametrize("kind", [*DAMAGES, "a folder"])
@pytest.mark.parametrize("file", OBJECTS)
def test_errors_of_run_file_readers_name_the_damaged_file(
    file: str, kind: str, complete_run: Path
) -> None:
    before = read_file(complete_run / file)
    damage_file(complete_run, file, kind)
    if kind == "empty" and file.endswith(".jsonl"):
        assert read_file(complete_run / file) == []
    elif kind == "strings for numbers" and file in ("environment.json", "recipe.toml"):
        assert read_file(complete_run / file).keys() == before.keys(), (
            "keys of the file are missing, although unused keys may have any value"
        )
    else:
        with pytest.raises(CheckpointError, match=re.escape(f"{complete_run / file} is damaged: ")):
            read_file(complete_run / file)


KEYS = [(file, key) for file, shape in OBJECTS.items() for key in shape if file != "recipe.toml"]


@pytest.mark.parametrize("value", ["text", [1], {"a": "b"}, True, 1.5, None], ids=str)
@pytest.mark.parametrize(("file", "key"), KEYS)
def test_run_file_check_raises_an_error_that_names_the_key_of_a_value_of_wrong_type(
    file: str, key: str, value: Any, complete_run: Path
) -> None:
    path = complete_run / file
    lines = [
        json.loads(line) for line in path.read_text().split("\n") if line and file.endswith("l")
    ]
    lines = lines or [json.loads(path.read_text())]
    right = lines[-1].get(key)
    if type(value) is type(right) or (right is None and value is None):
        return
    path.write_text("".join(json.dumps({**line, key: value}) + "\n" for line in lines))
    if is_also_valid(right, key, value):
        assert read_file(path)
        return
    with pytest.raises(CheckpointError, match=f'"{key}".* has the invalid value'):
        read_file(path)


def is_also_valid(right: Any, key: str, value: Any) -> bool:
    """Return whether `value` is valid at a key although its type differs from that of `right`.

    Examples are 1.5 for a number, and null for an optional key.
    """
    if value is None:
        return key in OPTIONAL
    if isinstance(value, dict):
        return key in ("given", "protocol", "init")
    return isinstance(value, float) and (isinstance(right, float) or key == "nfe")


OPTIONAL = ("init", "interval", "ppl", "bits_per_byte", "judge")


@pytest.mark.parametrize(("file", "key"), KEYS)
def test_run_file_check_raises_an_error_that_names_a_missing_key(
    file: str, key: str, complete_run: Path
) -> None:
    path = complete_run / file
    lines = [
        json.loads(line) for line in path.read_text().split("\n") if line and file.endswith("l")
    ]
    for line in lines or [json.loads(path.read_text())]:
        line.pop(key)
        path.write_text(json.dumps(line) + "\n")
        break
    if key in OPTIONAL:
        assert read_file(path)
        return
    with pytest.raises(CheckpointError, match=f'"{key}" is missing'):
        read_file(path)


def test_read_samples_raises_an_error_that_names_the_number_of_a_damaged_line(
    run_dir: Path,
) -> None:
    path = run_dir / "samples.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n[]\n")
    with pytest.raises(CheckpointError, match=r"samples\.jsonl is damaged: .* in line 2"):
        read_json_lines(path)


def test_run_file_readers_return_empty_results_for_missing_files(run_dir: Path) -> None:
    assert (read_json(run_dir / "no.json"), read_json_lines(run_dir / "no.jsonl")) == ({}, [])


@pytest.mark.parametrize("command", ["run", "eval", "compare", "export"])
def test_commands_print_an_error_that_names_a_file_in_place_of_the_checkpoints_folder(
    command: str, run_dir: Path, ddiff: Command
) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").write_text("not a folder")
    answer = ddiff(*COMMANDS[command])
    assert answer.code == 0 if command == "compare" else is_refusal(answer, "checkpoint"), answer
    assert "Traceback" not in answer.err


MARKERS = {
    "null": "null",
    "a list": "[]",
    "a null format": '{"format": null, "files": {}}',
    "a text as format": '{"format": "2", "files": {}}',
    "null files": '{"format": 2, "files": null}',
    "a list of files": '{"format": 2, "files": []}',
    "null seals": '{"format": 2, "files": {"state.json": null}}',
    "null in seals": '{"format": 2, "files": {"state.json": {"bytes": null, "sha256": null}}}',
    "a negative size": '{"format": 2, "files": {"state.json": {"bytes": -1, "sha256": ""}}}',
    "no files": '{"format": 2, "files": {}}',
}


@pytest.mark.parametrize("name", MARKERS)
def test_commands_refuse_a_complete_json_of_wrong_structure(
    name: str, run_dir: Path, ddiff: Command
) -> None:
    (run_dir / STEP / "complete.json").write_text(MARKERS[name])
    for command in ("sample", "export", "compare", "dry run"):
        assert is_refusal(ddiff(*COMMANDS[command]), "complete.json is damaged")


FIGURES = {
    "nelbo_nats_per_token": "a text",
    "terms_nats_per_token": {"closing": None},
    "parts_nats_per_token": [1.0],
    "tokens": 1.5,
    "interval": [1.0],
    "bound": "NLL",
    "unit": "symbol",
    "baselines": {"unigram": 1.0},
}


@pytest.mark.parametrize("key", FIGURES)
def test_run_command_refuses_evaluation_json_of_wrong_structure(
    key: str, run_dir: Path, ddiff: Command
) -> None:
    path = run_dir / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: FIGURES[key]}))
    answer = ddiff(*COMMANDS["run"])
    assert is_refusal(answer, "evaluation.json is damaged")


def test_run_command_reads_baselines_in_any_order_of_keys(run_dir: Path, ddiff: Command) -> None:
    before = ddiff(*COMMANDS["run"]).out
    path = run_dir / "evaluation.json"
    # sorted by name, the bigram comes before the unigram
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    after = ddiff(*COMMANDS["run"]).out
    printed = [[line for line in out.splitlines() if "gram" in line] for out in (before, after)]
    assert printed[0]
    assert printed[0] == printed[1]


def test_compare_accepts_a_run_initialised_from_a_pretrained_model(
    run_dir: Path, ddiff: Command
) -> None:
    path = run_dir / "environment.json"
    init = {"model": "some/model", "parts": "embeddings", "tokenizer": "0"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "init": init}))
    answer = ddiff(*COMMANDS["compare"])
    assert answer.code == 0, answer.err
    assert "started from the weights of some/model" in answer.out
