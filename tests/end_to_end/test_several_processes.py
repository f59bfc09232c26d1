"""Commands in two processes give the same files as in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small import working_in

SETTINGS = [
    "run_dir=two",
    "backend.kind=ddp",
    "backend.processes=2",
    "train.steps=2",
    "evaluate.batch=1",
    "evaluate.draws=2",
    "sample.count=7",
    "sample.batch=2",
    *['vocabulary={kind="flat"}', 'process={kind="mdlm"}', 'denoiser.head="tokens"'],
]


def command(*arguments: str) -> str:
    """Run a ddiff command in a new process, which launches its workers; return its output."""
    line = [sys.executable, "-m", "ddiff", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(path: str) -> Any:
    """Return a record without its provenance, the only part that differs between two commands."""
    tree = json.loads(Path(path).read_text())
    del tree["provenance"]
    return tree


@pytest.mark.slow
def test_run_eval_and_sample_by_two_processes_equal_those_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All figures and samples are bitwise equal, since each process has one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with working_in(tmp_path):
        command("run", "small.toml", *(f"--set={setting}" for setting in SETTINGS))
        command("eval", "two", "--processes", "1", "--out", "one.json")
        assert read("two/evaluation.json") == read("one.json")
        output = command("eval", "two", "--out", "again.json")
        assert output.count("Written to") == 1  # only rank 0 prints
        assert read("again.json") == read("one.json")
        lines = command("sample", "two", "--processes", "1").splitlines()
        written = [json.loads(line) for line in Path("two/samples.jsonl").read_text().splitlines()]
        assert [{"step": 2, **json.loads(line)} for line in lines] == written
        command("eval", "two", "--generate", "--out", "figures-two.json")
        command("eval", "two", "--generate", "--processes", "1", "--out", "figures-one.json")
        assert read("figures-two.json") == read("figures-one.json")
