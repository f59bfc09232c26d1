"""Whatever stands in a file of a run: a command works, or says in one paragraph which file it is and the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Command, files, is_refusal

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


def nulls(content: bytes) -> bytes:
    """Every value of every object is null; other files become the word."""
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
    "null values": nulls,
    "half": lambda content: content[: len(content) // 2],
    "deeply nested": lambda content: b"[" * 100_000,
    "strings for numbers": lambda content: content.replace(b": 4", b': "4"').replace(b"= 4", b'= "4"'),
}

COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("run", "tiny.toml"),
    "more steps": ("run", "tiny.toml", "--set", "train.steps=5"),
    "dry run": ("run", "tiny.toml", "--dry-run"),
    "eval": ("eval", "runs/tiny"),
    "sample": ("sample", "runs/tiny", "--count", "1"),
    "export": ("export", "runs/tiny", "weights.safetensors"),
    "compare": ("compare", "runs/tiny"),
    "verify": ("run", "tiny.toml", "--verify-resume", "1"),
    "init": ("run", "tiny.toml", "--dry-run", "--set", "name=other", "--set", 'train.init={run="runs/tiny"}'),
}
READS_NO_DATA = ("dry run", "export", "compare", "sample")


def damage(run_dir: Path, file: str, kind: str) -> None:
    path = run_dir / file
    if kind == "a folder":
        path.unlink()
        (path / "within").mkdir(parents=True)
    else:
        path.write_bytes(DAMAGES[kind](path.read_bytes()))


def holds(answer: Any, file: str) -> bool:
    """Whether a command has worked, or was refused by the name of the file and not by a traceback."""
    assert "Traceback" not in answer.err
    if answer.code in (0, 1):  # 1: a verification that found a difference
        return answer.code == 0 or "NOT equal" in answer.out
    return is_refusal(answer, Path(file).name)


def check(file: str, kind: str, run_dir: Path, ddiff: Command, commands: Any) -> None:
    whole = Path("whole").absolute()
    shutil.copytree(run_dir, whole)
    for name in commands:
        shutil.rmtree(run_dir)
        shutil.copytree(whole, run_dir)
        damage(run_dir, file, kind)
        before = files(run_dir)
        answer = ddiff(*COMMANDS[name])
        assert holds(answer, file), (name, answer)
        if answer.code == 2:
            assert files(run_dir) == before, (name, "something was written though the command was refused")


@pytest.mark.parametrize("kind", [*DAMAGES, "a folder"])
@pytest.mark.parametrize("file", FILES)
def test_commands_that_read_no_data_work_or_name_the_file(file: str, kind: str, run_dir: Path, ddiff: Command) -> None:
    check(file, kind, run_dir, ddiff, READS_NO_DATA)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DAMAGES, "a folder"])
@pytest.mark.parametrize("file", FILES)
def test_every_other_command_works_or_names_the_file(file: str, kind: str, run_dir: Path, ddiff: Command) -> None:
    check(file, kind, run_dir, ddiff, [name for name in COMMANDS if name not in READS_NO_DATA])
