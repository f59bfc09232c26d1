"""Wheel: contains the engine, first-party plugins, recipes, novels and type information."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
    )
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (built,) = folder.glob("discrete_diffusion-*.whl")
    return built


def files_under(folder: Path, pattern: str) -> set[str]:
    found = (path for path in folder.rglob(pattern) if "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


@pytest.mark.slow
def test_wheel_contains_modules_recipes_and_novels_but_no_tests(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"ddiff/{name}" for name in files_under(ROOT / "ddiff", "*.py")} <= inside
    assert files_under(ROOT / "plugins", "*.py") <= inside
    assert {f"ddiff/_recipes/{name}" for name in files_under(ROOT / "recipes", "*.toml")} <= inside
    assert {f"ddiff/_templates/{name}" for name in files_under(ROOT / "templates", "*.*")} <= inside
    assert {
        f"ddiff/data/novels/{name}" for name in files_under(ROOT / "ddiff/data/novels", "*.xz")
    } <= inside
    assert "ddiff/py.typed" in inside
    tops = {name.partition("/")[0] for name in inside}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ddiff"} | {
        path.name for path in (ROOT / "plugins").iterdir() if (path / "__init__.py").is_file()
    }


@pytest.mark.slow
def test_command_installed_from_wheel_finds_plugins_and_recipes(
    wheel: Path, tmp_path: Path
) -> None:
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet")
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(wheel)], check=True)
    program = (
        "import ddiff, ddiff_hdlm; print(ddiff.__file__, ddiff_hdlm.__file__);"
        "from ddiff.plugin.package_template import write_package;"
        "print(write_package('fresh', 'tokenizer'));"
        "from ddiff.cli import main; main(['run', 'hdlm_small', '--dry-run'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, written, *recipe = done.stdout.splitlines()
    assert written == "ddiff-fresh"
    assert all(place.startswith(str(tmp_path / "site")) for place in first.split())
    assert 'name = "hdlm_small"' in recipe
