"""`ddiff new plugin`: the package of every kind passes its own tests, installs, checks and runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ddiff.cli import main
from ddiff.cli.completion import NEW_KINDS
from ddiff.errors import ArgumentError
from ddiff.plugin import package_template
from ddiff.plugin.loader import API_VERSION, load_plugins
from ddiff.plugin.package_template import SYNONYMS, find_templates, write_package
from ddiff.plugin.registry import KINDS
from ddiff.testing.check_command import MAKERS

ROOT = Path(__file__).parents[2]


def install(folder: Path, name: str) -> None:
    """Write the metadata that pip would write for the package in `folder`, next to its module."""
    information = folder / f"ddiff_{name}-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: ddiff-{name}\nVersion: 0.1.0\n"
    )
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    points = [f"{key} = {value}" for key, value in project["entry-points"]["ddiff"].items()]
    (information / "entry_points.txt").write_text("\n".join(["[ddiff]", *points, ""]))


# ---------------------------------------------------------------------- packages


def test_kinds_of_the_help_are_the_templates() -> None:
    assert sorted(SYNONYMS.get(kind, kind) for kind in NEW_KINDS) == sorted(find_templates())


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEW_KINDS)
def test_package_of_each_kind_passes_its_own_tests(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"made_{kind}"
    folder = write_package(name, kind, tmp_path / "package")
    install(folder, name)
    monkeypatch.syspath_prepend(str(folder))
    # in this process, because importing torch takes seconds
    before = set(sys.modules)
    code = pytest.main(
        ["--import-mode=importlib", "-p", "no:cacheprovider", "-q", str(folder / "tests")]
    )
    # the test modules of all packages have the same names
    for module in set(sys.modules) - before:
        if module.partition(".")[0] in ("tests", f"ddiff_{name}"):
            del sys.modules[module]
    assert code == pytest.ExitCode.OK


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_package_registers_a_component_that_can_be_checked(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"listed_{kind}"
    folder = write_package(name, kind, tmp_path / "package")
    install(folder, name)
    monkeypatch.syspath_prepend(str(folder))
    registry = load_plugins([name])
    (component,) = [one for one in registry.components() if one.plugin == name]
    assert (component.kind, component.name) == (SYNONYMS.get(kind, kind), name)
    assert component.members().build is not None
    assert component.kind in MAKERS


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_package_has_no_placeholder_and_declares_the_api_version(kind: str, tmp_path: Path) -> None:
    folder = write_package("two_words", kind, tmp_path / "package")
    texts = {path: path.read_text() for path in folder.rglob("*.*") if path.is_file()}
    for path, text in texts.items():
        assert not re.search("plugin.?name|pluginname|plugin_kind", str(path) + text, re.I), path
    assert f"DDIFF_API = {API_VERSION} " in texts[folder / "ddiff_two_words" / "__init__.py"]
    (component,) = (folder / "ddiff_two_words").glob("[!_]*.py")
    assert "class TwoWords" in texts[component]
    assert 'name = "ddiff-two-words"' in texts[folder / "pyproject.toml"]


@pytest.mark.slow
def test_wheel_of_a_package_installs_lists_and_checks(tmp_path: Path) -> None:
    """Build a wheel, install it into a new virtual environment offline, and call `ddiff`."""
    folder = write_package("waves", "process", tmp_path / "ddiff-waves")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh"], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    subprocess.run([*pip, *build, tmp_path / "wheels", folder], check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    python = tmp_path / "fresh" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True
    )
    # the new environment has no torch: it uses the libraries of this one, after its own
    libraries = [str(ROOT), str(ROOT / "plugins"), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(libraries), "COLUMNS": "200"}
    program = (
        "from ddiff.testing.check_command import check_component\n"
        "from ddiff.cli import main\n"
        "assert check_component('waves', []) == 0\n"
        "main(['plugins', '--components'])\n"
    )
    done = subprocess.run(
        [python, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Chapman-Kolmogorov" in done.stdout
    assert re.search(r"^waves +ddiff_waves, ddiff-waves 0\.1\.0 +1$", done.stdout, re.MULTILINE)
    assert re.search(r"^process +waves +waves +ddiff_waves\.process:Waves", done.stdout, re.M)


# ---------------------------------------------------------------------- names and folders


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("Ising", "process", 'lower-case letters.*got "Ising"'),
        ("2d", "process", "begin with a letter"),
        ("a__b", "process", "single underscores"),
        ("a-b", "process", "single underscores"),
        ("", "process", 'got ""'),
        ("x" * 41, "process", "at most 40 characters"),
        ("mdlm", "dataset", 'a plugin "mdlm" is installed already'),
        ("ancestral", "sampler", r'there is a sampler "ancestral" \(from ddiff_core.*\) already'),
        ("strings", "metric", 'there is a judge "strings"'),
        ("dense_process", "process", "gives the class DenseProcess, which the package uses"),
        ("fresh", "proces", 'no kind of plugin "proces".*Did you mean "process".*judge'),
        ("fresh", "backend", r"no template for the kind \"backend\".*plugins\.md#backend"),
    ],
)
def test_wrong_name_or_kind_is_refused_and_nothing_is_written(
    name: str, kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=message):
        write_package(name, kind)
    assert list(tmp_path.iterdir()) == []


def test_package_is_written_into_an_empty_folder_but_not_into_another(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert write_package("fresh", "dataset", target) == target
    before = sorted(target.rglob("*"))
    with pytest.raises(ArgumentError, match=r"needs a new or empty folder; .* has files"):
        write_package("fresh", "dataset", target)
    assert sorted(target.rglob("*")) == before
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ArgumentError, match="is a file or a link"):
        write_package("fresh", "dataset", file)
    with pytest.raises(ArgumentError, match="there is no folder"):
        write_package("fresh", "dataset", tmp_path / "missing" / "target")


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package_template.os, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        write_package("fresh", "dataset", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_new_command_writes_the_package_and_prints_the_next_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["new", "plugin", "two_words", "--kind", "tokenizer"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "pip install -e ddiff-two-words" in printed
    assert "ddiff check two_words" in printed
    assert (tmp_path / "ddiff-two-words" / "ddiff_two_words" / "tokenizer.py").is_file()


def test_templates_are_folders_of_registered_kinds() -> None:
    folders = {path.name for path in (ROOT / "templates").iterdir()}
    assert folders - {package_template.COMMON} <= set(KINDS)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(find_templates())))
def test_kind_without_template_names_its_section_of_the_page(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no template for the kind") as caught:
        write_package("fresh", kind, tmp_path / "target")
    file, _, section = str(caught.value).partition("(")[2].partition(")")[0].partition("#")
    assert section == kind
    page = (ROOT / file).read_text(encoding="utf-8")
    example = page.partition(f"\n### {section}\n")[2].partition("\n### ")[0]
    assert "```python" in example
    assert "def build(" in example


def test_page_lists_the_kinds_with_a_template() -> None:
    page = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    sentence = page.partition("The kinds with a template are ")[2].partition(". ")[0]
    named = set(re.findall(r"`(\w+)`", sentence))
    assert named == {*NEW_KINDS, *SYNONYMS.values()}
