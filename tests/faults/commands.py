"""Helpers that run the command line in this process, on two small recipes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ddiff.cli import main

TINY = """
name = "tiny"
extends = "hdlm_small"
[data]
kind = "bundled"
length = 16
[vocabulary]
kind = "clusters"
sizes = [16]
[denoiser]
kind = "dit"
width = 32
layers = 1
heads = 2
[train]
steps = 12
batch = 4
warmup = 2
checkpoint_every = 4
[evaluate]
rows = 8
batch = 8
[sample]
count = 2
steps = 4
batch = 2
"""

CORPUS = "\n".join(
    f"the {a} {b} sat on the {c}" for a in ("old", "red") for b in ("cat", "hat") for c in "xyzabcd"
)

FAST = """
name = "fast"
plugins = ["mdlm", "dit"]
[data]
kind = "text"
files = ["corpus.txt"]
split = "line"
held_out = 0.2
length = 8
[tokenizer]
kind = "bpe"
size = 270
[vocabulary]
kind = "flat"
[process]
kind = "mdlm"
[denoiser]
kind = "dit"
width = 16
layers = 1
heads = 2
[train]
steps = 2
batch = 4
warmup = 1
log_every = 1
[evaluate]
batch = 16
rows = 4
[sample]
steps = 2
count = 2
"""

Answer = tuple[int, str, str]


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> Answer:
    """Run `ddiff ARGUMENTS` in this process, and return exit code, stdout and stderr."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    written = capsys.readouterr()
    return code, written.out, written.err


def refusal(answer: Answer) -> str:
    """Check that a command failed with one short paragraph and no traceback.

    Return the paragraph.
    """
    code, _, err = answer
    assert code == 2, err
    assert "Traceback" not in err
    assert "Aborted" not in err
    assert len(err) < 3000
    return err


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Working directory with both recipes, the corpus and a separate cache; sets one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("tiny.toml").write_text(TINY)
    Path("fast.toml").write_text(FAST)
    Path("corpus.txt").write_text(CORPUS)
    yield Path.cwd()
    torch.set_num_threads(threads)


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


Call = Callable[..., Answer]
