"""Intervals of the figures of the lm-evaluation-harness, from its results alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ddiff.evaluation.conditional import error_of_sum
from ddiff.evaluation.intervals import student95, wilson95
from ddiff.run_dir.evaluation_record import Figure
from ddiff.runs.lm_eval.record import make_figures
from ddiff.runs.lm_eval.scoring import TaskErrors

PROTOCOL = {"likelihood": "exact"}
HARNESS = {"version": "0"}


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    return dict(make_figures(results, PROTOCOL, HARNESS))


def test_interval_of_few_documents_uses_students_t() -> None:
    """Two documents with the values 1 and 2: Student's interval has 12.7 standard errors."""
    results = {
        "results": {"task": {"f1,none": 1.5, "f1_stderr,none": 0.5}},
        "n-samples": {"task": {"effective": 2}},
    }
    half = student95(1) * 0.5
    assert half == pytest.approx(12.706 * 0.5, rel=1e-4)
    assert figures(results)["task: f1"].interval == pytest.approx((1.5 - half, 1.5 + half))
    results["n-samples"]["task"]["effective"] = 1
    assert figures(results)["task: f1"].interval is None


def test_interval_of_a_perplexity_uses_students_t_in_the_logarithm() -> None:
    results = {
        "results": {"task": {"perplexity,none": 8.0, "perplexity_stderr,none": 2.0}},
        "n-samples": {"task": {"effective": 5}},
    }
    ratio = math.exp(student95(4) * 2.0 / 8.0)
    assert figures(results)["task: perplexity"].interval == pytest.approx((8 / ratio, 8 * ratio))


def test_share_of_a_group_has_wilsons_interval_of_all_its_documents() -> None:
    """All 10 documents of a group are right: its standard error is 0, but not its uncertainty."""
    results = {
        "results": {"group": {"acc,none": 1.0, "acc_stderr,none": 0.0}},
        "n-samples": {"first": {"effective": 4}, "second": {"effective": 6}},
        "group_subtasks": {"group": ["first", "inner"], "inner": ["second"]},
    }
    assert figures(results)["group: acc"].interval == pytest.approx(wilson95(10, 10))
    del results["n-samples"]["second"]
    assert figures(results)["group: acc"].interval == (1.0, 1.0)  # that of the harness


def test_errors_of_answers_with_common_random_numbers_add_up() -> None:
    """A question with two equal answers has twice the error of one, not the root of 2 times.

    By hand, for the draws 1, 3: error |1 - 3| / 2 = 1. Two questions are independent.
    """
    errors = TaskErrors()
    draws = np.array([1.0, 3.0])
    errors.add("task/0", draws)
    errors.add("task/0", draws)
    found = errors.to_dict()
    assert found["requests"] == 2
    assert found["nats"] == 4.0
    assert found["standard_error_nats"] == pytest.approx(2.0)
    assert found["request_standard_error_nats"] == pytest.approx(1.0)
    errors.add("task/1", draws)
    assert errors.to_dict()["standard_error_nats"] == pytest.approx(math.sqrt(2.0**2 + 1.0**2))


def test_interval_of_many_questions_with_common_random_numbers_covers_the_sum() -> None:
    """90 % to 98 % of 300 intervals contain the sum: 20 questions with four answers each.

    The standard deviation of the share is 1.3 %. As if all answers were independent, the intervals
    would have half the width, and 67 % of them would contain it.
    """
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        errors = TaskErrors()
        for question in range(20):
            draws = generator.normal(5.0, 1.0, 16)
            for _ in range(4):
                errors.add(f"task/{question}", draws)
        found = errors.to_dict()
        covered += abs(found["nats"] - 400.0) <= found["half_width_nats"]
    assert 0.90 <= covered / 300 <= 0.98
    assert error_of_sum(np.zeros((0, 2))) is None
