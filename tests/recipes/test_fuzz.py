"""Fuzzer `benchmarks/fuzz.py`: makes random changes to recipes, and checks how ddiff handles them.

A mutated recipe is a valid recipe with random changes. ddiff must accept it, or refuse it with a
message.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ddiff.errors import DdiffError
from ddiff.plugin.loader import survey_plugins
from ddiff.recipe.resolve import parse_recipe


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks/fuzz.py"
    spec = importlib.util.spec_from_file_location("ddiff_fuzz", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ddiff_fuzz"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "DDIFF_CACHE", str(tmp_path / "cache")
    )  # main() sets this variable, which must not affect the next test
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_25_mutated_recipes_are_accepted_or_refused_with_a_message(
    fuzz: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuzz.main(["--recipes", "25", "--runs", "1", "--seed", "2"]) == 0
    output = capsys.readouterr().out
    assert "25 recipes: " in output
    assert "25 recipes: 0 accepted" not in output


def test_100_mutated_fields_recipes_are_read_back_or_refused_with_a_message(
    fuzz: ModuleType,
) -> None:
    trees = [tree for tree in fuzz.bases() if "fields" in tree]
    component_names: dict[str, list[str]] = {}
    for component in survey_plugins().registry.components():
        component_names.setdefault(component.kind, []).append(component.name)
    num_read = 0
    refusals = []
    for number in range(100):
        text = fuzz.mutant(number, 2, trees, component_names)
        try:
            recipe = parse_recipe(text)
        except DdiffError as error:
            refusals.append(str(error))
            continue
        num_read += 1
        assert parse_recipe(recipe.to_toml()) == recipe
    assert num_read > 10
    assert len(refusals) > 10
    assert all(refusal.startswith("<text>") for refusal in refusals)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda *_, **__: 1 / 0, "ZeroDivisionError"),
        (lambda *_, **__: Path("left.txt").write_text("x"), "files are left"),
        (lambda *_, **__: "", "no verdict"),
    ],
)
def test_fuzzer_detects_tracebacks_leftover_files_and_missing_results(
    fuzz: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Any,
    expected: str,
) -> None:
    monkeypatch.setattr("ddiff.runs.dry_run.rehearse", damage)
    if expected == "no verdict":
        monkeypatch.setattr("ddiff.runs.dry_run.rehearse", lambda *_, **__: "all is well")
    assert fuzz.main(["--recipes", "40", "--runs", "0", "--seed", "2"]) == 1
    assert expected in capsys.readouterr().out


def test_fuzzer_makes_the_same_recipe_again_for_the_same_number_and_seed(fuzz: ModuleType) -> None:
    """Two calls give the same mutated recipe, and 20 numbers give more than 5 different recipes."""
    recipes = [{"a": {"b": 1}, "train": {"kind": "x"}, "data": {"kind": "y"}}]
    component_names = {"dataset": ["y"]}
    first = fuzz.mutant(5, 3, recipes, component_names)
    second = fuzz.mutant(5, 3, recipes, component_names)
    assert first == second
    others = {fuzz.mutant(number, 3, recipes, component_names) for number in range(20)}
    assert len(others) > 5
