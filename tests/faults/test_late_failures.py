"""Recipe values that would fail late in a run are refused by a dry run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from commands import refusal, run_command
from pydantic import ValidationError
from tiny_run import entries

from ddiff import ArgumentError, ComponentConfig, CounterRng, load
from ddiff.plugin.config import (
    COUNTS,
    LARGEST,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from ddiff.plugin.loader import survey_plugins
from ddiff.recipe.keys import TopLevelKeys
from ddiff.recipe.schema import FIELDS, TEXT

BUILT_IN = ["corpus.txt", "tiny.toml"]


class Every(ComponentConfig):
    count: PositiveInt = 1
    label: NonNegativeInt = 0
    seed: Seed = 0
    rate: PositiveFloat = 1.0
    share: NonNegativeFloat = 0.0


def test_bounded_config_types_refuse_values_outside_their_limits() -> None:
    most = Every(
        count=COUNTS - 1, label=COUNTS - 1, seed=2**64 - 1, rate=LARGEST / 2, share=LARGEST / 2
    )
    assert (most.count, most.seed) == (2**31 - 1, 2**64 - 1)
    outside = {"count": COUNTS, "label": COUNTS, "seed": 2**64, "rate": LARGEST, "share": LARGEST}
    outside_below = {"count": 0, "label": -1, "seed": -1, "rate": 0.0, "share": -1e-9}
    for key, value in [
        *outside.items(),
        *outside_below.items(),
        ("rate", math.nan),
        ("share", math.inf),
    ]:
        with pytest.raises(ValidationError):
            Every(**{key: value})


def find_keys() -> dict[str, dict[str, Any]]:
    """Return the JSON schema of every key of every component, and of the tables of ddiff itself.

    The name of a key has the component or the model of the table before it.
    """
    models = {str(one): one.config_class() for one in survey_plugins().registry.components()}
    tables = [table.keys for layout in (TEXT, FIELDS) for table in layout.tables.values()]
    models |= {keys.__name__: keys for keys in (TopLevelKeys, *tables) if keys is not None}
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        whole = model.model_json_schema()
        # "$defs" has the tables inside of the table, such as [denoiser] lora
        for part in (whole, *whole.get("$defs", {}).values()):
            found |= {f"{name}: {key}": keys for key, keys in part.get("properties", {}).items()}
    return found


def has_unlimited_integer(schema: dict[str, Any]) -> bool:
    """Return whether a key accepts integers, alone or in a list, without an upper limit."""
    if "additionalProperties" in schema:
        return False
    branches = [schema, *schema.get("anyOf", ())]
    return any(
        number.get("type") == "integer"
        and not {"maximum", "exclusiveMaximum", "enum", "const"} & number.keys()
        for branch in branches
        for number in (branch, branch.get("items", {}))
    )


def test_every_integer_key_of_a_recipe_has_an_upper_limit() -> None:
    """Integers that torch cannot represent must be refused by a dry run, not late in a run."""
    keys = find_keys()
    assert {"TrainKeys: batch", "DenoiserKeys: rank", "FieldsTrainKeys: batch"} <= keys.keys()
    assert [key for key, schema in keys.items() if has_unlimited_integer(schema)] == []


def test_unlimited_integers_are_found_in_keys_and_lists() -> None:
    class Open(ComponentConfig):
        bare: int = 1
        many: tuple[int, ...] = ()
        optional: int | None = None
        limited: PositiveInt = 1

    properties = Open.model_json_schema()["properties"]
    found = [key for key, schema in properties.items() if has_unlimited_integer(schema)]
    assert found == ["bare", "many", "optional"]


LATE = {
    "sample.seed": "99999999999999999999999",
    "evaluate.seed": "99999999999999999999999",
    "vocabulary.seed": "99999999999999999999999",
    "evaluate.draws": "1000000000000000000000000000000",
    "train.batch": "18446744073709551616",
    "sample.steps": "1000000000000",
    "train.steps": "1000000000000000000000000000000",
}


@pytest.mark.parametrize("key", LATE)
def test_dry_run_refuses_values_that_would_fail_late_in_a_run(
    key: str, folder: Path, capsys
) -> None:
    for dry in ([], ["--dry-run"]):
        message = refusal(
            run_command(capsys, "run", "tiny.toml", *dry, "--set", f"{key}={LATE[key]}")
        )
        assert key.split(".")[1] in message
    assert entries(folder) == BUILT_IN


def test_run_with_the_largest_seeds_finishes(folder: Path, capsys) -> None:
    most = 2**64 - 1
    seeds = [f"--set={key}={most}" for key in ("seed", "evaluate.seed", "sample.seed")]
    code, _, err = run_command(capsys, "run", "tiny.toml", *seeds)
    assert code == 0, err
    assert len(load("runs/tiny").sample(1, seed=most)) == 1


def test_run_with_temperature_near_zero_finishes(folder: Path, capsys) -> None:
    code, _, err = run_command(
        capsys, "run", "tiny.toml", "--set", "sample.sampler.temperature=1e-320"
    )
    assert code == 0, err
    assert Path("runs/tiny/samples.jsonl").read_text().count("\n") == 2


# ---------------------------------------------------------------------- options of a trained run


ASKED = {
    "gap of many digits": ("--infill", "[MASK:99999999999999999999]"),
    "gap longer than the canvas": ("--infill", "a [MASK:9] b"),
    "gap of five thousand digits": ("--infill", f"[MASK:{'9' * 5000}]"),
    "gap of no tokens": ("--infill", "[MASK:0]"),
    "gap of other digits": ("--infill", "[MASK:٣]"),
    "gap below zero": ("--infill", "[MASK:-3]"),
    "no gap": ("--infill", "MASK"),
    "seed": ("--seed", "99999999999999999999999"),
    "count": ("--count", "99999999999999999999999"),
    "steps": ("--steps", "99999999999999999999999"),
    "batch": ("--batch", "99999999999999999999999"),
    "guidance": ("--guidance", "1e308"),
    "guidance nan": ("--guidance", "nan"),
    "guidance inf": ("--guidance", "inf"),
    "condition of a run without": ("--condition", "author=1"),
    "condition without a name": ("--condition", "=1"),
    "condition over two lines": ("--condition", "author=1\nb=2"),
    "condition nested": ("--condition", "author=" + "[" * 400 + "]" * 400),
    "sampler": ("--sampler", "n" * 300),
    "setting": ("--set", "temperature=nan"),
    "setting of a table": ("--set", "sample.steps=3"),
    "setting of two keys": ("--set", "top_k=1\ntop_p=0.5"),
    "prompt too long": ("--prompt", "the cat " * 5000),
    "prompt of lone surrogates": ("--prompt", "\udce9"),
    "prompts file": ("--prompts", "n" * 300),
    "prompts folder": ("--prompts", "."),
}


@pytest.mark.parametrize("name", ASKED)
def test_sample_command_refuses_options_out_of_range(name: str, finished: Path, capsys) -> None:
    refusal(run_command(capsys, "sample", str(finished), *ASKED[name]))


@pytest.mark.parametrize(
    "asked",
    [
        {"seed": 2**64},
        {"seed": -1},
        {"count": 2**31},
        {"steps": 2**31},
        {"batch": 0},
        {"guidance": -1.0},
    ],
    ids=str,
)
def test_sample_in_python_refuses_arguments_out_of_range(asked: dict, finished: Path) -> None:
    with pytest.raises(ArgumentError, match=next(iter(asked))):
        load(finished).sample(**asked)


def test_counter_rng_accepts_every_64_bit_seed() -> None:
    import torch

    assert 0.0 <= CounterRng(2**64 - 1, 0, torch.arange(1), 1).uniform_per_group("x") < 1.0
