"""Recipe that trains in less than a second, and fixtures with a finished run of the recipe."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import run_command

import ddiff as api

RECIPE = """
name = "tiny"
plugins = ["hdlm", "mdlm", "dit"]

[data]
kind = "text"
files = ["corpus.txt"]
split = "line"
held_out = 0.2
length = 8

[tokenizer]
kind = "bpe"
size = 262

[vocabulary]
kind = "clusters"
sizes = [8]

[process]
kind = "hdlm"

[denoiser]
kind = "dit"
width = 16
layers = 1
heads = 2
head = "levelwise"

[train]
steps = 4
batch = 4
warmup = 2
checkpoint_every = 2

[evaluate]
batch = 16

[sample]
steps = 2
count = 2
"""

CORPUS = "\n".join(
    f"the {a} {b} sat on the {c}" for a in ("old", "red") for b in ("cat", "hat") for c in "xyzabcd"
)


class Answer(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., Answer]


def prepare(place: Path) -> None:
    """Write the recipe and its corpus into a folder."""
    (place / "tiny.toml").write_text(RECIPE)
    (place / "corpus.txt").write_text(CORPUS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with tiny.toml and corpus.txt, and a cache outside this directory."""
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    prepare(work)
    return work


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a finished run, which tests copy."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DDIFF_CACHE", str(place / "cache"))
        torch.set_num_threads(1)
        prepare(place)
        api.run("tiny.toml")
    return place / "runs/tiny"


@pytest.fixture
def run_dir(finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the finished run, `runs/tiny` in the working directory."""
    monkeypatch.setenv("DDIFF_CACHE", str(finished.parents[1] / "cache"))
    shutil.copytree(finished, "runs/tiny")
    return Path("runs/tiny")


@pytest.fixture
def ddiff(capsys: pytest.CaptureFixture[str]) -> Command:
    """Function that runs a command in this process, for example `ddiff("eval", "runs/tiny")`."""

    def call(*arguments: str) -> Answer:
        return Answer(*run_command(capsys, *arguments))

    return call


def files(place: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }


def is_refusal(answer: Answer, *expected: str) -> bool:
    """Whether a command failed with exit code 2 and a message that contains all of `expected`."""
    assert answer.code == 2, answer
    assert "Traceback" not in answer.err
    missing = [text for text in expected if text not in answer.err]
    assert missing == [], answer.err
    return True
