"""Helpers that run commands of ddiff in this process and check their error messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from ddiff.cli import main


class Answer(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., Answer]


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> Answer:
    """Run `ddiff ARGUMENTS` in this process, and return exit code, stdout and stderr."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    written = capsys.readouterr()
    return Answer(code, written.out, written.err)


@pytest.fixture
def ddiff(capsys: pytest.CaptureFixture[str]) -> Command:
    """Function that runs a command in this process, for example `ddiff("eval", "runs/tiny")`."""

    def call(*arguments: str) -> Answer:
        return run_command(capsys, *arguments)

    return call


def refusal(answer: Answer) -> str:
    """Check that a command failed with exit code 2 and one paragraph, and return the paragraph."""
    assert answer.code == 2, answer
    assert "Traceback" not in answer.err
    assert "Aborted" not in answer.err
    assert len(answer.err) < 3000
    return answer.err


def is_refusal(answer: Answer, *expected: str) -> bool:
    """Assert that a command failed with a message that contains all of `expected`."""
    message = refusal(answer)
    missing = [text for text in expected if text not in message]
    assert missing == [], message
    return True
