"""Helpers that run commands of ddiff in this process and check their error messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ddiff.cli import main


class CommandResult(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., CommandResult]


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> CommandResult:
    """Run `ddiff ARGUMENTS` in this process, and return exit code, stdout and stderr."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    written = capsys.readouterr()
    return CommandResult(code, written.out, written.err)


@pytest.fixture
def ddiff(capsys: pytest.CaptureFixture[str]) -> Command:
    """Function that runs a command in this process, for example `ddiff("eval", "runs/tiny")`."""

    def call(*arguments: str) -> CommandResult:
        return run_command(capsys, *arguments)

    return call


def refusal(result: CommandResult) -> str:
    """Check that a command failed with exit code 2 and one paragraph, and return the paragraph."""
    assert result.code == 2, result
    assert "Traceback" not in result.err
    assert "Aborted" not in result.err
    assert len(result.err) < 3000
    return result.err


def is_refusal(result: CommandResult, *expected: str) -> bool:
    """Assert that a command failed with a message that contains all of `expected`."""
    message = refusal(result)
    missing = [text for text in expected if text not in message]
    assert missing == [], message
    return True


def read_evaluation(run_dir: Path) -> dict[str, Any]:
    """Return evaluation.json of a run without its provenance: the command and its duration."""
    found = json.loads((run_dir / "evaluation.json").read_text())
    del found["provenance"]
    return found
