"""Figures of samples in one column of `ddiff compare`: which settings must be equal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ddiff.errors import ArgumentError
from ddiff.evaluation.compared_run import select_settings
from ddiff.evaluation.generation_comparison import (
    Generated,
    Value,
    describe_generation_settings,
    find_common_generation,
    note_sampling_differences,
)
from ddiff.evaluation.intervals import student95
from ddiff.run_dir.generation_record import GenerationRecord

JUDGE: dict[str, Any] = {
    "judge": "runs/judge",
    "model": "weights",
    "revision": None,
    "step": 4,
    "weights": "trained",
    "tokenizer": "pieces",
    "dtype": "float32",
    "window": 64,
    "stride": 32,
    "first_token": "scored after the mask",
    "special_tokens": "end mark between documents",
    "retokenized": True,
}
PROTOCOL: dict[str, Any] = {
    "count": 8,
    "length": 16,
    "unit": "token",
    "tokenizer": "pieces",
    "data": "rows",
    "judge": JUDGE,
}
SAMPLING: dict[str, Any] = {
    "sampler": {"kind": "ancestral", "temperature": 0.9},
    "steps": 4,
    "nfe": 4.0,
    "count": 8,
    "length": 16,
    "seed": 0,
    "dtype": "float32",
    "precision": "float32",
}


def figure(value: float, unit: str, interval: tuple[float, float] | None = None) -> dict[str, Any]:
    return {"value": value, "interval": interval, "unit": unit, "protocol": "samples"}


FIGURES = {
    "entropy": figure(1.5, "nats/sample", (1.25, 1.75)),
    "perplexity": figure(20.0, "perplexity per token of the judge", (18.0, 23.0)),
    "distinct_2": figure(0.75, "share of n-grams"),
    "known_words": figure(0.5, "share of words", (0.25, 0.75)),
}


def make_record(
    protocol: dict[str, Any] | None = None,
    judge: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    figures: dict[str, Any] | None = None,
    weights: str = "ema",
) -> GenerationRecord:
    """Return a record, with changed settings of the protocol, the judge and the sampler."""
    changed = {**PROTOCOL, "judge": {**JUDGE, **(judge or {})}, **(protocol or {})}
    return GenerationRecord.from_tree(
        {
            "schema_version": 2,
            "run": "a",
            "step": 4,
            "weights": weights,
            "unit": "token",
            "figures": FIGURES if figures is None else figures,
            "protocol": {key: value for key, value in changed.items() if value is not None},
            "sampling": {**SAMPLING, **(sampling or {})},
            "samples": {},
            "held_out": {},
        }
    )


def find(other: GenerationRecord) -> dict[str, Any] | None:
    return find_common_generation({Path("a"): make_record(), Path("b"): other})


# ---------------------------------------------------------------------- equal settings


@pytest.mark.parametrize(
    ("key", "value"),
    [("count", 9), ("length", 17), ("unit", "symbol"), ("tokenizer", "words"), ("data", "other")],
)
def test_samples_of_another_protocol_are_refused_with_the_key(key: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{key}: {PROTOCOL[key]} in a, {value} in b"):
        find(make_record(protocol={key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "other weights"),
        ("tokenizer", "words"),
        ("dtype", "bfloat16"),
        ("window", 32),
        ("stride", 16),
        ("first_token", "context"),
        ("special_tokens", "removed"),
        ("retokenized", False),
    ],
)
def test_samples_of_another_judge_are_refused_with_the_key(key: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"judge\.{key}: {JUDGE[key]} in a, {value} in b"):
        find(make_record(judge={key: value}))


@pytest.mark.parametrize("key", ["judge", "revision", "step", "weights"])
def test_name_of_the_judge_may_differ_if_its_weights_are_equal(key: str) -> None:
    common = find(make_record(judge={key: "other"}))
    assert common is not None
    assert common["judge.window"] == 64


def test_name_of_the_judge_is_compared_if_its_weights_have_no_fingerprint() -> None:
    old = make_record(judge={"model": None})
    assert find(old) is not None
    with pytest.raises(ArgumentError, match=r"judge\.judge: runs/judge in a, other in b"):
        find(make_record(judge={"model": None, "judge": "other"}))


def test_run_without_judge_is_comparable_in_the_other_columns() -> None:
    common = find(make_record(protocol={"judge": None}))
    assert common is not None
    assert common["judge"] == "runs/judge"
    assert find_common_generation({}) is None


def test_error_about_different_settings_has_the_command_that_makes_them_equal() -> None:
    judge = {"retokenized": False}
    first = make_record(judge=judge)
    second = make_record(protocol={"count": 9}, judge=judge)
    with pytest.raises(ArgumentError) as caught:
        find_common_generation({Path("a"): first, Path("b"): second})
    command = "ddiff eval RUN_DIR --generate --count 8 --judge runs/judge --no-retokenize"
    assert command in str(caught.value)
    assert "--no-generation" in str(caught.value)


def test_common_settings_are_described_without_those_of_the_likelihood() -> None:
    common = find(make_record())
    assert common is not None
    assert describe_generation_settings(common) == (
        "Samples evaluated alike: count 8; judge runs/judge, model weights, tokenizer pieces, "
        "dtype float32, window 64, stride 32, first_token scored after the mask, "
        "special_tokens end mark between documents, retokenized True."
    )


def test_judge_without_fingerprint_is_named_once() -> None:
    common = find(make_record(judge={"model": None}))
    assert common is not None
    assert describe_generation_settings(common).count("runs/judge") == 1


# ---------------------------------------------------------------------- settings of the sampler


@pytest.mark.parametrize(
    ("sampling", "note"),
    [
        ({"seed": 3}, "seed: 0 in a, 3 in b"),
        ({"dtype": "bfloat16"}, "dtype: float32 in a, bfloat16 in b"),
        ({"precision": "bfloat16"}, "precision: float32 in a, bfloat16 in b"),
        (
            {"sampler": {**SAMPLING["sampler"], "top_p": 0.9}},
            "sampler.top_p: none in a, 0.9 in b",
        ),
        ({"guidance": 2.0}, "guidance: none in a, 2.0 in b"),
        ({"sampler": {"kind": "psi", "kappa": 0.5, "temperature": 1.0}}, None),
    ],
)
def test_other_settings_of_the_sampler_are_allowed_and_noted(
    sampling: dict[str, Any], note: str | None
) -> None:
    records = {Path("a"): make_record(), Path("b"): make_record(sampling=sampling)}
    assert find_common_generation(records) is not None
    notes = note_sampling_differences(records)
    # samplers of two kinds have different keys, which are not compared
    expected = [] if note is None else [f"Samples drawn with different {note}."]
    assert notes == expected


def test_weights_of_the_samples_are_noted_if_they_differ() -> None:
    records = {Path("a"): make_record(), Path("b"): make_record(weights="trained")}
    expected = ["Samples drawn with different weights: ema in a, trained in b."]
    assert note_sampling_differences(records) == expected


def test_steps_temperature_and_nfe_are_shown_in_columns() -> None:
    other = {"sampler": {"kind": "psi", "temperature": 0.5}, "steps": None, "nfe": 7.0}
    records = {Path("a"): make_record(), Path("b"): make_record(sampling=other)}
    assert note_sampling_differences(records) == []
    first, second = (Generated.of(record) for record in records.values())
    assert first.sampler == "ancestral, 4 steps, temperature 0.9"
    assert second.sampler == "psi, temperature 0.5"
    assert (first.nfe, second.nfe) == (4.0, 7.0)


# ---------------------------------------------------------------------- cells and means


def test_cells_show_perplexity_with_entropy_and_half_intervals() -> None:
    found = Generated.of(make_record())
    assert found.describe_perplexity() == "20 (18 to 23) at entropy 1.500"
    assert f"{found.entropy:.3f}" == "1.500 ± 0.250"
    assert f"{found.distinct_2:.3f}" == "0.750"
    without = {name: value for name, value in FIGURES.items() if name == "entropy"}
    bare = Generated.of(make_record(figures=without))
    assert bare.describe_perplexity() == "–"
    assert bare.known_words is None


def test_mean_over_seeds_has_students_interval_and_a_geometric_mean_perplexity() -> None:
    values = [20.0, 5.0, 10.0]
    found = []
    for number, value in enumerate(values):
        figures = {
            **FIGURES,
            "entropy": figure(1.0 + number, "nats/sample"),
            "perplexity": figure(value, "perplexity per token of the judge"),
        }
        found.append(Generated.of(make_record(figures=figures, sampling={"nfe": 1.0 + number})))
    mean = Generated.mean(found)
    assert mean is not None
    assert mean.nfe == 2.0
    # numbers 1, 2, 3: standard deviation 1
    half = student95(2) / math.sqrt(3)
    assert mean.entropy.value == 2.0
    assert mean.entropy.interval == pytest.approx((2.0 - half, 2.0 + half))
    # 20 * 5 * 10 = 1000; in units of ln 2 the logarithms are 1, -1 and 0 around ln 10
    assert mean.perplexity is not None
    assert mean.perplexity.value == pytest.approx(10.0)
    high = 10.0 * math.exp(half * math.log(2.0))
    assert mean.perplexity.interval == pytest.approx((100.0 / high, high))


def test_mean_over_seeds_is_missing_without_figures_of_every_run() -> None:
    found = Generated.of(make_record())
    assert Generated.mean([found, None]) is None
    assert Generated.mean([found, Generated.of(make_record(sampling={"steps": 9}))]) is None
    assert Generated.mean([found]) == found
    assert found.entropy == Value(1.5, (1.25, 1.75))


# ---------------------------------------------------------------------- likelihood


def test_number_of_draws_does_not_matter_with_until() -> None:
    settings = {"draws": 17, "until": 0.002, "window": [0.0, 1.0], "unit": "token"}
    assert select_settings(settings, "NELBO")["draws"] is None
    assert select_settings(settings, "NELBO")["until"] == 0.002
    assert select_settings({"draws": 17}, "NELBO")["draws"] == 17
    exact = select_settings(settings, "NLL")
    assert exact["window"] is exact["draws"] is exact["until"] is None
    assert exact["unit"] == "token"
