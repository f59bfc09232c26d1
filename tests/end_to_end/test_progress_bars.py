"""Progress bars of the commands that can take longer than three seconds."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from rich.console import Console
from small import AUTOREGRESSIVE, FLAT, make_autoregressive_recipe, working_in

import ddiff as api


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the runs `flat`, `uniform`, and `judge` with an exact likelihood."""
    folder = tmp_path_factory.mktemp("bars")
    with working_in(folder):
        api.run("small.toml", settings=[*FLAT, 'name="flat"', "train.steps=7"])
        uniform = Path("small.toml").read_text().replace('"hdlm", "mdlm"', '"gidd"')
        uniform = uniform.replace('kind = "hdlm"', 'kind = "gidd"').replace("levelwise", "tokens")
        Path("uniform.toml").write_text(uniform)
        api.run("uniform.toml", settings=[FLAT[0], 'name="uniform"', "train.steps=2"])
        written = api.load("runs/flat").recipe.to_toml()
        Path("flat.toml").write_text(written)
        Path("judge.toml").write_text(make_autoregressive_recipe())
        api.run("judge.toml", settings=[*AUTOREGRESSIVE, 'name="judge"', "train.steps=2"])
        yield folder


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Text that a terminal in place of stderr receives."""
    received = io.StringIO()

    def open_console(stderr: bool = False, quiet: bool = False, **options: Any) -> Console:
        if quiet:
            return Console(quiet=True, force_terminal=False)
        return Console(file=received, force_terminal=True, width=120)

    monkeypatch.setattr("ddiff.progress.Console", open_console)
    monkeypatch.setattr("ddiff.testing.check_command.Console", open_console)
    return received


COMMANDS = {
    "run": (["run", "small.toml", "--set", 'name="new"', "--set", "train.steps=3"], ["training"]),
    "run: tokenizer": (
        ["run", "small.toml", "--set", 'name="bpe"', "--set", "tokenizer.size=280"],
        ["learning byte pairs", "tokenizing", "training", "evaluating", "sampling"],
    ),
    "data": (["data", "small.toml", "--set", "tokenizer.size=275"], ["tokenizing"]),
    "verify": (
        ["run", "flat.toml", "--verify-resume", "2"],
        ["training"],
    ),
    "eval": (["eval", "runs/flat"], ["evaluating"]),
    "eval --generate": (
        ["eval", "runs/flat", "--generate", "--judge", "runs/judge", "--count", "4"],
        ["sampling", "comparing the samples", "judging"],
    ),
    "eval --generate: self-correction": (
        ["eval", "runs/uniform", "--generate", "--count", "2"],
        ["correcting"],
    ),
    "sample": (["sample", "runs/flat", "--count", "1"], ["sampling"]),
    "edit": (["sample", "runs/flat", "--edit", "the old cat"], ["editing"]),
    "report": (
        ["report", "runs/flat", "--out", "r.html"],
        ["sampling", "comparing predictions"],
    ),
    # the last state of the bar; earlier ones are drawn only if they last long enough
    "check": (["check", "flat"], ["5/5 flat"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_shows_its_bars_on_a_terminal(
    name: str,
    place: Path,
    screen: io.StringIO,
    ddiff: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("DDIFF_CACHE", str(place / "cache"))
    arguments, titles = COMMANDS[name]
    found = ddiff(*arguments)
    assert found.code == 0, found.err
    shown = screen.getvalue()
    for title in titles:
        assert title in shown


def test_export_shows_an_activity_on_a_terminal(place: Path, screen: io.StringIO) -> None:
    api.export_run(place / "runs/flat", place / "weights.safetensors")
    assert "exporting the weights" in screen.getvalue()


@pytest.mark.parametrize("name", ["eval", "sample", "report", "check"])
def test_command_writes_no_control_characters_to_a_pipe(
    name: str, place: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("DDIFF_CACHE", str(place / "cache"))
    found = ddiff(*COMMANDS[name][0])
    assert found.code == 0
    assert "\x1b" not in found.err
    # a job of less than ten seconds prints few lines
    assert len(found.err.splitlines()) <= 12
