"""The stranger: a distribution of its own, installed beside ddiff, that the engine has never heard of."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import DDIFF, EXAMPLES, code_lines, python

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
    """A target that pip has built and installed the distribution into, from a copy and without a network."""
    folder = tmp_path_factory.mktemp("stranger")
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


def test_its_process_is_one_class_of_at_most_sixty_lines() -> None:
    assert code_lines(SOURCE / "ddiff_kimura" / "process.py") <= 60
    assert code_lines(SOURCE / "ddiff_kimura" / "__init__.py") <= 10


def test_the_engine_has_never_heard_of_it() -> None:
    root = SOURCE.parents[1]
    named = [path for room in ("ddiff", "plugins") for path in (root / room).rglob("*.py")]
    # The gate's docstrings show a plugin by this name; no code does.
    assert not [
        path
        for path in named
        if re.search(r"^\s*(from|import) ddiff_kimura", path.read_text(), re.MULTILINE)
    ]
    assert "kimura" not in (root / "pyproject.toml").read_text()


@pytest.mark.slow
def test_an_installed_stranger_is_listed_with_its_distribution(
    installed: Path, tmp_path: Path
) -> None:
    listed = python(*DDIFF, "plugins", "--components", folder=tmp_path, path=installed)
    assert re.search(r"^kimura +ddiff_kimura, ddiff-kimura 1\.0\.0", listed, re.MULTILINE)
    assert re.search(r"^process +kimura", listed, re.MULTILINE)


@pytest.mark.slow
def test_a_stranger_obeys_every_law(installed: Path, tmp_path: Path) -> None:
    table = python(*DDIFF, "check", "kimura", folder=tmp_path, path=installed)
    assert "Chapman-Kolmogorov" in table
    python(*DDIFF, "check", "kimura", "--set", "ts=7.5", folder=tmp_path, path=installed)


@pytest.mark.slow
def test_a_stranger_trains_evaluates_and_samples_through_its_recipe(
    installed: Path, tmp_path: Path
) -> None:
    printed = python(str(SOURCE / "make_reads.py"), folder=tmp_path)
    entropy_rate = float(printed.partition("entropy rate is ")[2].split()[0])
    settings = [word for setting in SHORT for word in ("--set", setting)]
    python(*DDIFF, "run", str(SOURCE / "dna.toml"), *settings, folder=tmp_path, path=installed)

    evaluation = json.loads((tmp_path / "runs/dna/evaluation.json").read_text())
    low, high = evaluation["interval"]
    assert evaluation["unit"] == "symbol"
    # After 30 steps the law is about that of single letters, ln 4 at most. Half an interval is two standard errors:
    # one more of them on each side leaves a chance of 6e-5, and the seed is fixed.
    slack = (high - low) / 2
    assert entropy_rate <= high + slack
    assert low - slack <= math.log(4)
    assert json.loads((tmp_path / "runs/dna/environment.json").read_text())["components"][
        "process"
    ] == ("kimura (ddiff_kimura, ddiff-kimura 1.0.0)")

    shown = python(
        *DDIFF, "sample", "runs/dna", "--count", "2", "--seed", "7", folder=tmp_path, path=installed
    )
    samples = [json.loads(line) for line in shown.splitlines()]
    assert [len(sample["text"]) for sample in samples] == [64, 64]
    assert set("".join(sample["text"] for sample in samples)) <= set("ACGT")


@pytest.mark.slow
def test_without_the_stranger_its_recipe_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match='There is no plugin "kimura"'):
        python(*DDIFF, "run", str(SOURCE / "dna.toml"), "--dry-run", folder=tmp_path)
