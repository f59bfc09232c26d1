"""Partial files in a run directory, left by a kill or a full disk, are removed by the next run."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ddiff
from ddiff import atomic
from ddiff.errors import CheckpointError
from ddiff.evaluation.comparison import write_comparison
from ddiff.runs import record
from ddiff.runs.directory import remove_leftovers

LEFT = [
    "tokenizer.json.partial-e555366c",
    "evaluation.json.part",
    "samples.jsonl.part",
    "vocabulary.safetensors.0a1b2c3d.part",
    "metrics.jsonl.part",
    "recipe.toml.part",
]
OWN = [
    "notes.part",
    "tokenizer.json.partial",
    "tokenizer.json.bak",
    "evaluation.json.part.txt",
    "x.partial-e555366c",
]


def test_remove_leftovers_removes_only_partial_files_of_the_run(tmp_path: Path) -> None:
    for name in (*LEFT, *OWN, "recipe.toml"):
        (tmp_path / name).write_text(name)
    (tmp_path / "sampling.json.part").mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*OWN, "recipe.toml", "sampling.json.part"}
    remove_leftovers(tmp_path / "none")


def test_run_removes_partial_files_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("the cat sat on the mat\n" * 60)
    Path("b.txt").write_text("a dog sat on the cat\n" * 60)
    settings = [
        'data={kind="text", files=["a.txt"], split="line", length=8, validation=["b.txt"]}',
        'tokenizer={kind="bpe", size=257}',
        'denoiser={kind="dit", width=16, layers=1, heads=1, time=false, head="tokens"}',
        "train.steps=1",
        "train.batch=4",
        "evaluate.rows=4",
        "sample.count=1",
        "sample.steps=2",
    ]
    folder = Path("runs/mdlm_small")
    folder.mkdir(parents=True)
    for name in (*LEFT, *OWN):
        (folder / name).write_text(name)
    ddiff.run("mdlm_small", settings=settings)
    assert not {path.name for path in folder.iterdir()} & set(LEFT)
    assert {path.name for path in folder.iterdir()} >= set(OWN)


@pytest.mark.parametrize("stage", ["write", "rename"])
def test_failed_write_of_a_run_file_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text("before")
    if stage == "write":
        partial = tmp_path / "evaluation.json.partial-e555366c"
        partial.symlink_to("/dev/full")
        monkeypatch.setattr(atomic, "partial_name", lambda name: str(partial))
        expected: type[Exception] = OSError  # the command line has one sentence for every full disk
    else:

        def refuse(source: str, target: str) -> None:
            raise OSError(errno.EROFS, "read-only")

        monkeypatch.setattr("ddiff.atomic.os.replace", refuse)
        expected = CheckpointError
    with pytest.raises(expected):
        record.write_run_file(path, "after" * 9999)
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluation.json"]
    assert path.read_text() == "before"


def test_failed_write_of_a_comparison_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    monkeypatch.setattr("ddiff.atomic.os.replace", full)
    comparison: Any = SimpleNamespace(to_dict=dict, to_markdown=str)
    with pytest.raises(
        OSError, match="No space left"
    ):  # the command line has one sentence for every full disk
        write_comparison(comparison, tmp_path, "ddiff compare")
    assert os.listdir(tmp_path) == []
