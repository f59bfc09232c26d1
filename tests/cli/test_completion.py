"""Shell completion: the protocol of each shell, the completed names, and the import time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from startup import is_fast, run_script, start_command

from ddiff.cli.completion import CHECKED_KINDS
from ddiff.plugin.loader import find_installed_plugins, survey_plugins
from ddiff.recipe.files import find_shipped_recipes
from ddiff.testing.check_command import MAKERS

DDIFF = "import sys; sys.argv[0] = 'ddiff'; from ddiff.cli import main; main()"
SHELLS = {
    "bash": ("complete -o default -F _ddiff_completion ddiff", "_DDIFF_COMPLETE=complete_bash"),
    "zsh": ("compdef _ddiff_completion ddiff", "_DDIFF_COMPLETE=complete_zsh"),
    "fish": ("complete --command ddiff", "_DDIFF_COMPLETE=complete_fish"),
}


def run_ddiff(
    *arguments: str, folder: Path | None = None, program: str = DDIFF, **variables: str
) -> subprocess.CompletedProcess[str]:
    return run_script(program, *arguments, folder=folder, **variables)


def make_request(line: str) -> dict[str, str]:
    """Return the variables with which bash asks for completions of the last word of a line."""
    number = str(len(line.split(" ")) - 1)
    return {"_DDIFF_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": number}


def complete(line: str, folder: Path | None = None, program: str = DDIFF) -> list[str]:
    """Return the completions of the last word of a line, as bash asks for them."""
    done = run_ddiff(folder=folder, program=program, **make_request(line))
    if program == DDIFF:
        assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Folder with two run directories, another folder, and a recipe file."""
    for name in ("runs/small", "runs/other", "alone"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.toml").write_text("")
    (tmp_path / "runs/notes").mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.toml").write_text("")
    return tmp_path


def test_commands_and_options_are_completed() -> None:
    assert complete("ddiff sam") == ["sample"]
    assert complete("ddiff sample x --sampl") == ["--sampler"]


def test_recipes_are_completed_by_name_and_by_path(runs: Path) -> None:
    shipped = find_shipped_recipes()
    assert complete("ddiff run hdlm_s", runs) == [
        name for name in shipped if name.startswith("hdlm_s")
    ]
    assert complete("ddiff run recipes/m", runs) == ["recipes/mine.toml"]
    assert "recipes/mine.toml" in complete("ddiff data ", runs)


@pytest.mark.parametrize(
    "command", ["eval", "sample", "export", "compare alone", "report", "eval x --judge"]
)
def test_run_directories_are_completed_in_two_folders(command: str, runs: Path) -> None:
    assert complete(f"ddiff {command} runs/", runs) == ["runs/other", "runs/small"]
    assert complete(f"ddiff {command} r", runs) == ["runs/other", "runs/small"]
    assert complete(f"ddiff {command} al", runs) == ["alone"]


def test_check_completes_only_components_that_have_checks(runs: Path) -> None:
    found = set(complete("ddiff check ", runs)) - {"recipes/mine.toml"}
    registry = survey_plugins().registry
    components = [one for one in registry.components() if one.kind in MAKERS]
    checked = {component.name for component in components}
    plugins = {component.plugin for component in components}
    assert found == checked | plugins | {"alone/recipe.toml"}
    assert set(CHECKED_KINDS) == set(MAKERS)


def test_samplers_and_plugins_are_completed() -> None:
    names = survey_plugins().registry.names("sampler")
    assert complete("ddiff sample runs/x --sampler ") == names
    assert complete("ddiff report runs/x --sampler e") == [
        name for name in names if name.startswith("e")
    ]
    assert complete("ddiff plugins ") == sorted(find_installed_plugins())


@pytest.mark.parametrize(
    "line", ["ddiff run h", "ddiff sample r", "ddiff check h", "ddiff sample x --sampler "]
)
def test_completion_is_fast_and_without_torch(line: str, runs: Path) -> None:
    start = start_command(folder=runs, **make_request(line))
    assert start.code == 0, start.stderr
    assert "torch" not in start.modules
    assert is_fast(start)


def test_broken_plugin_and_invalid_path_print_no_error(tmp_path: Path) -> None:
    information = tmp_path / "broken-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[ddiff]\nbroken = broken_plugin\n")
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no')\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{DDIFF}"
    assert complete("ddiff check hdl", program=program) == ["hdlm"]
    assert complete("ddiff eval [", program=program) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_script_of_each_shell_calls_the_completion(shell: str) -> None:
    done = run_ddiff("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    for part in SHELLS[shell]:
        assert part in done.stdout


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_zsh_and_fish_complete_recipe_names(shell: str) -> None:
    done = run_ddiff(
        _DDIFF_COMPLETE=f"complete_{shell}",
        _TYPER_COMPLETE_ARGS="ddiff run hdlm_three",
        _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    assert "hdlm_three_level" in done.stdout


def test_installed_script_completes_in_bash(tmp_path: Path) -> None:
    """Install into an empty home, and let bash itself complete a line."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/ddiff"
    command.write_text(f"#!{sys.executable}\n{DDIFF}\n")
    command.chmod(0o755)
    home = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    run_ddiff("--install-completion", "bash", **home)
    script = (
        f"PATH={tmp_path}/bin:$PATH; source {tmp_path}/.bash_completions/ddiff.sh\n"
        "COMP_WORDS=(ddiff run mdlm_sma); COMP_CWORD=2; _ddiff_completion ddiff\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["mdlm_small"]
    assert "ddiff.sh" in (tmp_path / ".bashrc").read_text()
