"""examples/ddiff_kimura: an external plugin with one process, installed by pip."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import DDIFF, EXAMPLES, count_tokens, run_python

SOURCE = EXAMPLES / "ddiff_kimura"
SHORT = (
    "train.steps=30",
    "train.batch=16",
    "evaluate.draws=1",
    "sample.steps=16",
    "sample.count=3",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which pip has installed a copy of the example plugin, offline."""
    folder = tmp_path_factory.mktemp("kimura")
    shutil.copytree(SOURCE, folder / "source")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
    )
    subprocess.run([*pip, "--target", str(folder / "site"), str(folder / "source")], check=True)
    return folder / "site"


def test_example_plugin_kimura_has_at_most_390_code_tokens() -> None:
    assert count_tokens(SOURCE / "ddiff_kimura" / "process.py") <= 350
    assert count_tokens(SOURCE / "ddiff_kimura" / "__init__.py") <= 40


def test_ddiff_does_not_import_its_example_plugin_kimura() -> None:
    root = SOURCE.parents[1]
    modules = [path for room in ("ddiff", "plugins") for path in (root / room).rglob("*.py")]
    # Docstrings of the plugin loader mention the name as an example; only imports count.
    importing = [
        path
        for path in modules
        if re.search(r"^\s*(from|import) ddiff_kimura", path.read_text(), re.MULTILINE)
    ]
    assert not importing
    assert "kimura" not in (root / "pyproject.toml").read_text()


@pytest.mark.slow
def test_plugins_command_lists_kimura_with_the_name_of_its_python_package(
    installed: Path, tmp_path: Path
) -> None:
    listed = run_python(*DDIFF, "plugins", "--components", folder=tmp_path, path=installed)
    assert re.search(r"^kimura +ddiff_kimura, ddiff-kimura 1\.0\.0", listed, re.MULTILINE)
    assert re.search(r"^process +kimura", listed, re.MULTILINE)


@pytest.mark.slow
def test_example_process_kimura_passes_every_conformance_check(
    installed: Path, tmp_path: Path
) -> None:
    table = run_python(*DDIFF, "check", "kimura", folder=tmp_path, path=installed)
    assert "Chapman-Kolmogorov" in table
    run_python(*DDIFF, "check", "kimura", "--set", "ts=7.5", folder=tmp_path, path=installed)


@pytest.mark.slow
def test_kimura_recipe_trains_evaluates_and_samples(installed: Path, tmp_path: Path) -> None:
    printed = run_python(str(SOURCE / "make_reads.py"), folder=tmp_path)
    entropy_rate = float(printed.partition("entropy rate is ")[2].split()[0])
    settings = [word for setting in SHORT for word in ("--set", setting)]
    run_python(*DDIFF, "run", str(SOURCE / "dna.toml"), *settings, folder=tmp_path, path=installed)

    evaluation = json.loads((tmp_path / "runs/dna/evaluation.json").read_text())
    low, high = evaluation["interval"]
    assert evaluation["unit"] == "symbol"
    # After 30 steps the prediction is about the unigram distribution, of at most ln 4. Half an
    # interval is two standard errors: two more on each side leave a chance of 6e-5.
    slack = (high - low) / 2
    assert entropy_rate <= high + slack
    assert low - slack <= math.log(4)
    environment = json.loads((tmp_path / "runs/dna/environment.json").read_text())
    process = environment["components"]["process"]
    assert process == "kimura (ddiff_kimura, ddiff-kimura 1.0.0)"

    shown = run_python(
        *DDIFF, "sample", "runs/dna", "--count", "2", "--seed", "7", folder=tmp_path, path=installed
    )
    samples = [json.loads(line) for line in shown.splitlines()]
    assert [len(sample["text"]) for sample in samples] == [64, 64]
    assert set("".join(sample["text"] for sample in samples)) <= set("ACGT")


@pytest.mark.slow
def test_dry_run_prints_an_error_that_names_a_missing_plugin(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match='There is no plugin "kimura"'):
        run_python(*DDIFF, "run", str(SOURCE / "dna.toml"), "--dry-run", folder=tmp_path)
