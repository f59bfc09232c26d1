"""Options that messages advise exist, and belong to a command that the message names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from ddiff.cli.app import app

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for folder in ("ddiff", "plugins") for path in sorted((ROOT / folder).rglob("*.py"))
]
FOREIGN = {
    "--no-deps",  # of pip
    "--repo-type",  # of hf
    "--local-dir",
    "--revision",
    "--model_args",  # of lm_eval
    "--apply_chat_template",
}
"""Options of other programs."""

OWN_FRESH = {
    "cli/evaluation.py",
    "cli/sharing.py",
    "cli/training.py",
    "run_dir/protection.py",
    "runs/importing.py",
    "runs/pareto.py",
}
"""Modules that only commands with the option --fresh use for their messages."""

OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*(?![\w-]*[:;)])")


def list_options() -> dict[str, set[str]]:
    """Return the long options of every command, and of `ddiff` itself as ""."""
    group: Any = typer.main.get_command(app)
    found = {}
    for name, command in {"": group, **group.commands}.items():
        found[name] = {"--help"}
        for parameter in command.params:
            found[name].update([*parameter.opts, *parameter.secondary_opts])
    return found


def read_texts(tree: ast.Module) -> Iterator[str]:
    """Yield the texts of a module that are no docstrings, with {} for the values in them."""
    left_out: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):  # docstrings of modules, functions and constants
            left_out.add(node.value)
        if isinstance(node, ast.JoinedStr):
            left_out.update(node.values)
            parts = [
                str(value.value) if isinstance(value, ast.Constant) else "{}"
                for value in node.values
            ]
            yield "".join(parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left_out:
            yield node.value


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    """Pairs of the module, relative to its package folder, and a text that names an option."""
    found = []
    for path in SOURCES:
        if "report" in path.parts:  # style sheets, whose variables look like options
            continue
        name = path.relative_to(ROOT).as_posix().partition("/")[2]
        for text in read_texts(ast.parse(path.read_text())):
            if "--" in text:
                found.append((name, text))
    assert len(found) > 100
    return found


def test_every_option_in_a_message_exists(texts: list[tuple[str, str]]) -> None:
    known = {option for options in list_options().values() for option in options} | FOREIGN
    unknown = {
        (name, option)
        for name, text in texts
        for option in OPTION.findall(text)
        if option not in known
    }
    assert unknown == set()


def test_command_in_a_message_has_its_options(texts: list[tuple[str, str]]) -> None:
    options = list_options()
    wrong = []
    checked = 0
    for name, text in texts:
        for line in re.findall(r"`ddiff ([^`]*)`", text):
            command = line.split()[0]
            for option in OPTION.findall(line):
                checked += 1
                if option not in options[command]:
                    wrong.append((name, line))
    assert checked > 10
    assert wrong == []


def test_message_of_many_commands_names_the_one_with_the_option_fresh(
    texts: list[tuple[str, str]],
) -> None:
    """Sampling, for example, reads a checkpoint like training, but has no option --fresh."""
    advising = [(name, text) for name, text in texts if re.search(r"--fresh\b", text)]
    assert len(advising) > 10
    assert [
        (name, text)
        for name, text in advising
        if name not in OWN_FRESH and "`ddiff run`" not in text
    ] == []
