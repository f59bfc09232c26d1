"""Differences between trees and masked diffusion in benchmarks/natural_trees.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import ddiff
from ddiff.evaluation.intervals import student95

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "natural_trees.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("natural_trees_script", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def make_runs(script: ModuleType, nats: list[list[float]], tokens: list[float]) -> list[Any]:
    return [script.Bounds(np.array(row), np.array(tokens)) for row in nats]


def test_difference_and_its_intervals_equal_the_formulas_of_paired_means(
    script: ModuleType,
) -> None:
    """Two seeds, three documents of 10 tokens; the tree is better by 1, 2, 3 and 3, 4, 5 nats."""
    flat = make_runs(script, [[20.0, 30.0, 40.0], [21.0, 31.0, 41.0]], [10.0] * 3)
    tree = make_runs(script, [[19.0, 28.0, 37.0], [18.0, 27.0, 36.0]], [10.0] * 3)
    mean, over_seeds, over_documents = script.describe_difference(tree, flat)
    assert mean == "-0.3000"
    # The differences of the seeds are -0.2 and -0.4, those of the documents -0.2, -0.3 and -0.4.
    assert float(over_seeds) == pytest.approx(student95(1) * 0.1, abs=1e-4)
    assert float(over_documents) == pytest.approx(student95(2) * 0.1 / 3**0.5, abs=1e-4)


def test_difference_of_one_seed_has_no_interval_over_seeds(script: ModuleType) -> None:
    flat = make_runs(script, [[20.0, 30.0]], [10.0, 30.0])
    tree = make_runs(script, [[21.0, 33.0]], [10.0, 30.0])
    assert script.describe_difference(tree, flat)[:2] == ("+0.1000", "–")


@pytest.mark.parametrize(
    ("data", "num_tokens"), [("code", 1024), ("digits", 17), ("dna", 64), ("music", 56)]
)
def test_every_compared_recipe_resolves_and_has_its_own_directory(
    script: ModuleType, data: str, num_tokens: int
) -> None:
    compared = script.DATA[data]
    files = script.RowFiles.named(Path("data"), data)
    given = script.name_files(files) if compared.source else ()
    trees = compared.trees
    for tree, trained in trees.items():
        recipe = ddiff.read_recipe(trained.recipe, (*trained.settings, *given))
        vocabulary = recipe.vocabulary.preview(num_tokens=num_tokens)
        assert (vocabulary.num_levels == 1) == (tree == script.FLAT)
    places = {script.find_run_dir(Path("runs"), data, tree, 0) for tree in trees}
    assert len(places) == len(trees)
