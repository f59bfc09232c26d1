"""Execute the snippets of a tutorial page in the order of the page, with small settings.

| language | the snippet is |
|---|---|
| `toml` | saved under the name in its first line, a comment |
| `sh` | a list of commands: `ddiff ...` runs in this process, `pip install -e FOLDER` is imitated |
| `python` | executed; all snippets of a page share their names |
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from scripts import EXAMPLES

from ddiff.cli import main

DOCS = EXAMPLES.parent / "docs"
TUTORIAL = DOCS / "tutorial"


def read_snippets(name: str) -> Iterator[tuple[str, str]]:
    """Return language and text of every snippet of a page, of the tutorial or else of docs/."""
    page = TUTORIAL / f"{name}.md"
    if not page.is_file():
        page = DOCS / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "fence":
            yield token.info, token.content


def imitate_pip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package on the import path, with the metadata that pip would write for it."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    information.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = [f"{key} = {value}" for key, value in project["entry-points"]["ddiff"].items()]
    information.joinpath("entry_points.txt").write_text("\n".join(["[ddiff]", *points, ""]))
    monkeypatch.syspath_prepend(str(folder.resolve()))


class TutorialPage:
    """Runs the snippets of one page.

    Args:
        name: name of the page.
        small: settings that are added to every training.
        patch: fixture for changes of the import path.
        of_names: settings that are added to every training on names, too.
    """

    def __init__(
        self,
        name: str,
        small: list[str],
        patch: pytest.MonkeyPatch,
        of_names: tuple[str, ...] = ("data.held_out=0.002",),
    ) -> None:
        self.name = name
        self.small = small
        self.of_names = of_names
        self.patch = patch
        self.names: dict[str, Any] = {"__name__": "tutorial"}
        self.commands = 0

    def execute(self) -> dict[str, Any]:
        """Execute all snippets, and return the names that the Python snippets define."""
        runners = {"python": self.run_python, "toml": self.save_recipe, "sh": self.run_commands}
        for language, text in read_snippets(self.name):
            runners[language](text)
        return self.names

    def settings_of(self, text: str) -> list[str]:
        """Return the settings to add to the trainings in a text."""
        return [*self.small, *(self.of_names if "names_" in text else ())]

    def run_python(self, text: str) -> None:
        small = "".join(f', "{setting}"' for setting in self.settings_of(text))
        text = re.sub(r'settings=\["([^"]*)"', rf'settings=["\1"{small}', text)
        exec(compile(text, f"{self.name}.md", "exec", dont_inherit=True), self.names)

    def save_recipe(self, text: str) -> None:
        found = re.match(r"# (\w+\.toml)\n", text)
        assert found, "the first line of a recipe is a comment with its file name"
        Path(found[1]).write_text(text)

    def run_commands(self, text: str) -> None:
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            if program == "pip":
                assert arguments[:2] == ["install", "-e"]
                imitate_pip(Path(arguments[2]), self.patch)
                continue
            assert program == "ddiff", line
            if arguments[0] == "run" and "--dry-run" not in arguments:
                small = self.settings_of(line)
                arguments += [word for setting in small for word in ("--set", setting)]
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert not ended.value.code, line
            self.commands += 1


def forget_modules_in(folder: Path) -> None:
    """Remove modules of packages in `folder` from the imported modules."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(f"{folder}{os.sep}"):
            del sys.modules[name]
