"""`make` without a suitable Python, and examples and links in the README."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("sh", "make", "touch")


@pytest.fixture
def bare_machine(tmp_path: Path) -> Path:
    """Folder with the shell commands that make needs, but without Python."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"there is no {tool} on this machine")
        (commands / tool).symlink_to(found)
    return commands


def make(commands: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `make` in a copy of the repository with `commands` as the only folder on PATH."""
    folder = commands.parent / "clone"
    (folder / "ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "ci/constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment | {"PATH": str(commands)},
        capture_output=True,
        text=True,
    )


def write_command(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("target", ["run", "test"])
def test_make_refuses_python_3_9_before_running_pip(bare_machine: Path, target: str) -> None:
    write_command(
        bare_machine / "python3", 'case "$1" in --version) echo "Python 3.9.2";; *) exit 1;; esac'
    )
    done = make(bare_machine, target)
    assert done.returncode != 0
    assert "ddiff needs Python 3.11 or newer. Found: python3 (Python 3.9.2)." in done.stderr
    assert "pip" not in done.stdout
    assert not (bare_machine.parent / "clone" / ".venv").exists()


def test_make_fails_with_a_message_if_python_is_missing(bare_machine: Path) -> None:
    done = make(bare_machine, "run")
    assert done.returncode != 0
    assert "ddiff needs Python 3.11 or newer. Found: none." in done.stderr


def test_make_uses_newer_python_if_python3_is_too_old(bare_machine: Path) -> None:
    write_command(
        bare_machine / "python3", 'case "$1" in --version) echo "Python 3.9.2";; *) exit 1;; esac'
    )
    write_command(
        bare_machine / "python3.12", 'echo "$@" >> "$0.log"; case "$1" in -m) exit 7;; esac'
    )
    done = make(bare_machine, "install")
    assert done.returncode != 0  # the fake python3.12 cannot create an environment
    assert "Making .venv with python3.12" in done.stdout
    assert "-m venv --clear .venv" in (bare_machine / "python3.12.log").read_text()
    assert not (bare_machine.parent / "clone" / ".venv" / ".made").exists()


def test_make_leaves_an_environment_made_by_hand_as_it_is(bare_machine: Path) -> None:
    """It may have another version of torch, and it is not cleared."""
    scripts = bare_machine.parent / "clone" / ".venv" / "bin"
    scripts.mkdir(parents=True)
    write_command(scripts / "python", 'echo "$@" >> "$0.log"; exit 0')
    done = make(bare_machine, "docs")
    assert done.returncode != 0
    assert ".venv was not made by make" in done.stderr
    assert "VENV=.venv-make" in done.stderr
    assert (scripts / "python.log").read_text() == "-m pip --version\n"


def test_make_names_missing_package_if_python_has_no_venv_module(bare_machine: Path) -> None:
    write_command(
        bare_machine / "python3",
        'case "$*" in *ensurepip*) exit 1;; --version) echo "Python 3.11.2";; esac',
    )
    done = make(bare_machine, "run")
    assert done.returncode != 0
    assert "apt install python3-venv" in done.stderr


def test_ci_script_runs_make_commands_of_the_readme() -> None:
    readme, script = (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        (ROOT / ".ci/run").read_text(),
    )
    assert os.access(ROOT / ".ci/run", os.X_OK)
    for command in ("make run", "make test"):
        assert command in readme
        assert command in script


def test_minimum_python_version_is_equal_in_all_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert "(3, 11)" in (ROOT / "Makefile").read_text()
    assert "3.11" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_example_process_of_the_readme_passes_check_process() -> None:
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (written,) = [block for block in blocks if "check_process" in block]
    exec(written, {})


def test_links_in_readmes_point_to_existing_files() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    pages += [*(ROOT / "plugins").glob("*/README.md"), *(ROOT / "examples").glob("*/README.md")]
    assert len(pages) >= 6
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"
