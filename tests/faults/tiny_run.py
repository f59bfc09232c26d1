"""Recipe that trains in less than a second, and fixtures with a finished run of the recipe."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from small import CORPUS

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
every = 2
"""


def prepare(place: Path) -> None:
    """Write the recipe and its corpus into a folder."""
    (place / "tiny.toml").write_text(RECIPE)
    (place / "corpus.txt").write_text(CORPUS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with tiny.toml and corpus.txt; the cache is outside this directory."""
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


def files(place: Path) -> dict[str, bytes]:
    """Return the content of every file below the folder `place`, by relative path."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }


def entries(folder: Path) -> list[str]:
    """Return the sorted names of the files in a folder."""
    return sorted(os.listdir(folder))
