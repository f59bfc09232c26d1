"""Every shipped recipe trains, evaluates and samples with reduced sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ddiff
from ddiff.recipe.files import find_shipped_recipes, read_file
from ddiff.recipe.sources import read_sources

# read without the components, whose plugins are slow to import
SHIPPED = {
    name: read_sources(read_file(name)).values
    for name in find_shipped_recipes()
    if not name.startswith("paper/")
}


def find_recipes(*kinds: str) -> list[str]:
    """Return the shipped recipes of one text with these kinds of data, outside of paper/."""
    return [
        name
        for name, tables in SHIPPED.items()
        if "fields" not in tables and tables["data"]["kind"] in kinds
    ]


RECIPES = find_recipes("bundled", "standard_library")
ROWS_RECIPES = find_recipes("names")
"""Recipes of rows of symbols, whose data and tokenizer the tests keep."""
DIGITS_RECIPES = find_recipes("digit_rows")
"""Recipes of digits as rows of symbols, whose data and tokenizer the tests keep."""
FIELDS_RECIPES = [name for name, tables in SHIPPED.items() if "fields" in tables]
PACKAGE_RECIPES = ["a2d_chat_small"]
"""Recipes of a model in a package; test_a2d.py runs them with a package of the same name."""
LENGTH = 32  # two windows of the width that the recipes have
TINY = [
    f'data={{kind="text", files=["train.txt"], validation=["validation.txt"], length={LENGTH}}}',
    "tokenizer.size=400",
    "train.steps=2",
    "train.batch=4",
    "train.warmup=1",
    "train.log_every=1",
    "evaluate.draws=1",
    "sample.steps=2",
    "sample.count=2",
    "backend.device=cpu",
]
TINY_FIELDS = [
    "train.steps=2",
    "train.batch=4",
    "train.warmup=1",
    "train.log_every=1",
    "evaluate.draws=1",
    "evaluate.samples=4",
    "sample.steps=2",
    "sample.count=4",
    "backend.device=cpu",
]
NETWORK = ["denoiser.width=32", "denoiser.layers=1", "denoiser.heads=2"]
BERT = ["hidden_size=32", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=64"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with a part of the bundled novels, and with a cache that all tests share."""
    folder = tmp_path_factory.mktemp("recipes")
    novels = ddiff.load_bundled_novels()
    (folder / "train.txt").write_text(novels.train["text"][0], encoding="utf-8")
    (folder / "validation.txt").write_text(novels.validation["text"][0][:1500], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


def test_every_shipped_recipe_is_in_one_list_of_tested_recipes() -> None:
    """A recipe with another kind of data needs a list and a test."""
    lists = (RECIPES, ROWS_RECIPES, DIGITS_RECIPES, FIELDS_RECIPES, PACKAGE_RECIPES)
    assert all(lists)
    assert sorted(name for names in lists for name in names) == sorted(SHIPPED)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipe_with_reduced_sizes_trains_and_samples(name: str, place: Path) -> None:
    """The recipe is changed only in sizes and corpus. After two steps the bound is near ln V."""
    network = (
        [f"denoiser.settings.{setting}" for setting in BERT] if name.startswith("hf_") else NETWORK
    )
    run = ddiff.run(name, settings=[*TINY, *network])
    assert run.recipe.name == name

    logged = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in logged if "step" in line) == 2
    evaluation = run.evaluate()[0]
    assert 1.0 < evaluation.nelbo_nats_per_token < 1.5 * math.log(run.vocabulary.num_tokens)
    samples = [
        json.loads(line) for line in (run.run_dir / "samples.jsonl").read_text().splitlines()
    ]
    ids = torch.tensor([sample["ids"] for sample in samples])
    assert ids.shape == (2, LENGTH)
    assert 0 <= int(ids.min()) <= int(ids.max()) < run.vocabulary.num_tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS_RECIPES)
def test_shipped_recipe_of_rows_with_reduced_sizes_is_judged(name: str, place: Path) -> None:
    """After two steps the bound is below ln V, and the samples and gaps have names."""
    settings = [setting for setting in TINY if not setting.startswith(("data=", "tokenizer."))]
    run = ddiff.run(name, settings=[*settings, "evaluate.rows=64", *NETWORK])
    evaluation = run.evaluate()[0]
    assert evaluation.unit == "symbol"
    assert 1.0 < evaluation.nelbo_nats_per_token < 1.5 * math.log(run.vocabulary.num_tokens)
    judged = json.loads((run.run_dir / "judged.json").read_text())["targets"]
    assert judged["text"][0]["count"] == 2
    filled = run.sample(infill="[MASK:5]son", count=2)
    assert {(len(sample["text"]), sample["text"][5:]) for sample in filled} == {(8, "son")}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIGITS_RECIPES)
def test_shipped_recipe_of_digits_with_reduced_sizes_trains_and_samples(
    name: str, place: Path
) -> None:
    """After two steps the bound is near ln V, and a sample is an image of 64 symbols."""
    settings = [setting for setting in TINY if not setting.startswith(("data=", "tokenizer."))]
    run = ddiff.run(name, settings=[*settings, "evaluate.rows=32", *NETWORK])
    evaluation = run.evaluate()[0]
    assert (evaluation.unit, evaluation.documents) == ("symbol", 32)
    assert 1.0 < evaluation.nelbo_nats_per_token < 1.5 * math.log(17)
    assert [len(sample["text"]) for sample in run.sample(2)] == [64, 64]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS_RECIPES)
def test_shipped_fields_recipe_with_reduced_sizes_is_judged(name: str, place: Path) -> None:
    """After two steps every target has a finite bound, samples, and findings of the judge."""
    run = ddiff.run(name, settings=[*TINY_FIELDS, *NETWORK])
    targets = list(run.recipe.sample.targets)
    evaluation = json.loads((run.run_dir / "evaluation.json").read_text())["targets"]
    assert list(evaluation) == list(run.recipe.evaluate.targets)
    for target, bounds in evaluation.items():
        assert math.isfinite(bounds["nats_per_sample"])
        # every training mixture covers the controls
        expected = {"shuffled", "noise"} if "|" in target else set()
        assert set(bounds["controls"]) == expected
    lines = (run.run_dir / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert {sample["target"] for sample in samples} == set(targets)
    assert len(samples) == 4 * len(targets)
    judged = json.loads((run.run_dir / "judged.json").read_text())["targets"]
    assert set(judged) == set(targets)
    assert all(judged.values())
