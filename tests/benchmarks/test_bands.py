"""Bands of healthy runs, as `benchmarks/bands.py` computes them."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bands.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("bands_script", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_band_is_the_prediction_interval_of_three_seeds(script: ModuleType) -> None:
    values = np.array([[1.0], [2.0], [3.0]])
    found = script.predict_range([10], values, values.var(0, ddof=1))
    # mean 2, variance 1, Student's 97.5 % quantile with 2 degrees of freedom
    width = 4.302653 * math.sqrt(1 + 1 / 3)
    assert found.low == pytest.approx([2 - width], abs=1e-4)
    assert found.high == pytest.approx([2 + width], abs=1e-4)


def test_band_contains_another_seed_in_95_percent_of_the_cases(script: ModuleType) -> None:
    generator = np.random.default_rng(0)
    trials = 4000
    values = generator.normal(3.0, 0.2, size=(4, trials))
    found = script.predict_range(list(range(trials)), values, values.var(0, ddof=1))
    other = generator.normal(3.0, 0.2, size=trials)
    share = np.mean((other > found.low) & (other < found.high))
    # the standard error of the share is 0.0034
    assert share == pytest.approx(0.95, abs=0.014)
