"""Checkpoints load only with the process, network and vocabulary tree of their training."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, is_refusal
from tiny_run import RECIPE, files

import ddiff as api
from ddiff.checkpoint.atomic_folder import newest_state
from ddiff.errors import CheckpointError
from ddiff.recipe.resolve import parse_recipe
from ddiff.recipe.toml import write_toml
from ddiff.run_dir.files import RunRecord
from ddiff.run_dir.identity import check_recorded, flatten_keys

MEANING = ("process", "denoiser", "objective", "tokenizer", "vocabulary")
FREE = {
    "backend.device": "cpu:0",
    "backend.precision": "bfloat16",
    "data.held_out": 0.3,
    "data.files": ["elsewhere.txt"],
    "evaluate.draws": 3,
    "evaluate.rows": 4,
    "name": "renamed",
    "run_dir": "moved/here",
    "sample.steps": 9,
    "sample.sampler.kind": "confidence",
    "train.steps": 40,
    "train.keep": 5,
    "train.log_every": 1,
}


def parse_toml(text: str) -> dict[str, Any]:
    return tomllib.loads(text)


def replace_key(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy of nested tables with `value` at a dotted key; None removes the key."""
    copy = json.loads(json.dumps(tree))
    place = copy
    *tables, last = key.split(".")
    for table in tables:
        place = place.setdefault(table, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return copy


def change_value(value: Any) -> Any:
    """Return a value of the same type that differs from `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value + 0.125
    if isinstance(value, str):
        return f"{value}_other"
    return [*value, value[0]] if value else [1]


def iterate_mutations(text: str) -> Iterator[tuple[str, Any]]:
    for key, value in flatten_keys(parse_toml(text)).items():
        if key.startswith(tuple(f"{table}." for table in MEANING)) or key in (
            "data.length",
            "seed",
            "train.ema",
        ):
            yield key, change_value(value)
            yield key, None


def resolve_text() -> str:
    return parse_recipe(RECIPE).to_toml()


@pytest.mark.parametrize(("key", "value"), list(iterate_mutations(resolve_text())))
def test_load_raises_an_error_that_names_each_changed_key_of_the_trained_recipe(
    key: str, value: Any, run_dir: Path
) -> None:
    recipe = run_dir / "recipe.toml"
    recipe.write_text(
        write_toml(replace_key(parse_toml(recipe.read_text()), key, value), "resolved")
    )
    state = newest_state(str(run_dir / "checkpoints"))
    assert state is not None
    is_needed = value is None and (
        key == "seed" or key.endswith("kind")
    )  # the reader of a run's recipe requires these keys
    expected = (
        rf"recipe\.toml is damaged|{key}: was .*, is " if is_needed else f"{key}: was .*, is "
    )
    with pytest.raises(CheckpointError, match=expected):
        check_recorded(RunRecord.read(run_dir), state)


def test_load_refuses_keys_added_to_the_trained_recipe(run_dir: Path) -> None:
    """Keys with the value None, such as hdlm's `rates`, are absent in the recipe of the run."""
    recipe, before = run_dir / "recipe.toml", (run_dir / "recipe.toml").read_text()
    state = newest_state(str(run_dir / "checkpoints"))
    assert state is not None
    for key, value in {
        "process.rates": [1.0, 3.0],
        "process.powers": [1.0, 2.0],
        "process.new": 1,
    }.items():
        recipe.write_text(write_toml(replace_key(parse_toml(before), key, value), "resolved"))
        with pytest.raises(CheckpointError, match=f"{key}: was absent"):
            check_recorded(RunRecord.read(run_dir), state)


def test_iterate_mutations_changes_keys_that_affect_weights() -> None:
    keys = {key for key, _ in iterate_mutations(resolve_text())}
    assert {
        "process.xi",
        "process.decoding",
        "denoiser.heads",
        "denoiser.given",
        "vocabulary.sizes",
    } <= keys
    assert {
        "denoiser.head.kind",
        "objective.kind",
        "objective.times.kind",
        "tokenizer.size",
        "data.length",
    } <= keys


@pytest.mark.parametrize("key", FREE)
def test_load_accepts_changed_keys_that_do_not_affect_weights(key: str, run_dir: Path) -> None:
    recipe = run_dir / "recipe.toml"
    recipe.write_text(
        write_toml(replace_key(parse_toml(recipe.read_text()), key, FREE[key]), "resolved")
    )
    state = newest_state(str(run_dir / "checkpoints"))
    assert state is not None
    check_recorded(RunRecord.read(run_dir), state)


def test_resume_refuses_changed_training_keys_that_load_accepts(run_dir: Path) -> None:
    recipe, before = run_dir / "recipe.toml", (run_dir / "recipe.toml").read_text()
    state = newest_state(str(run_dir / "checkpoints"))
    assert state is not None
    for key, value in {
        "train.batch": 8,
        "train.warmup": 1,
        "train.optimizer.kind": "muon",
        "train.clip": 0.5,
    }.items():
        recipe.write_text(write_toml(replace_key(parse_toml(before), key, value), "resolved"))
        check_recorded(RunRecord.read(run_dir), state)
        with pytest.raises(CheckpointError, match=key):
            check_recorded(RunRecord.read(run_dir), state, training=True)


def edit_recipe(run_dir: Path, old: str, new: str) -> None:
    recipe = run_dir / "recipe.toml"
    assert old in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(old, new))


COMMANDS = {
    "eval": ("eval", "runs/tiny"),
    "sample": ("sample", "runs/tiny"),
    "export": ("export", "runs/tiny", "out.safetensors"),
    "compare": ("compare", "runs/tiny", "--out", "."),
    "verify": ("run", "tiny.toml", "--verify-resume", "1", "--set", "process.xi=0.7"),
    "resume": ("run", "tiny.toml", "--set", "train.steps=6", "--set", "process.xi=0.7"),
    "init": ("run", "tiny.toml", "--set", "name=other", "--set", 'train.init={run="runs/tiny"}'),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_checkpoint_of_another_forward_process(
    command: str, run_dir: Path, ddiff: Command
) -> None:
    """The recipe of the run directory was edited after training.

    The commands "verify" and "resume" are called with a recipe that is changed in the same way.
    """
    edit_recipe(run_dir, "xi = 1.0", "xi = 0.7")
    before = files(run_dir)
    assert is_refusal(ddiff(*COMMANDS[command]), "process.xi: was 1.0, is 0.7", "recipe.toml")
    assert files(run_dir) == before
    assert not Path("out.safetensors").exists()
    assert not Path("compare.json").exists()


def replace_tree(run_dir: Path) -> None:
    """Replace the vocabulary tree of a run by another tree over the same tokens."""
    path = str(run_dir / "vocabulary.safetensors")
    vocabulary = api.Vocabulary.load(path)
    parents = (
        vocabulary.parent(torch.arange(vocabulary.num_tokens)) - vocabulary.offsets[1]
    ).tolist()
    other = [(parent + 1) % vocabulary.level_sizes[1] for parent in parents[:100]] + parents[100:]
    api.HierarchicalVocabulary(
        [other], tokenizer_fingerprint=vocabulary.tokenizer_fingerprint
    ).save(path)


@pytest.mark.parametrize("command", ["eval", "sample", "init"])
def test_load_refuses_another_vocabulary_tree_over_the_same_tokens(
    command: str, run_dir: Path, ddiff: Command
) -> None:
    replace_tree(run_dir)
    before = files(run_dir)
    assert is_refusal(ddiff(*COMMANDS[command]), "vocabulary: was ")
    assert files(run_dir) == before


# ---------------------------------------------------------------------- components from Python


@pytest.fixture(scope="module")
def run_with_overrides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run whose vocabulary and process were given from Python instead of the recipe."""
    place = tmp_path_factory.mktemp("given")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DDIFF_CACHE", str(place / "cache"))
        (place / "corpus.txt").write_text(
            "\n".join(f"the cat sat on {c}" for c in "abcdefghij" * 3)
        )
        recipe = parse_recipe(RECIPE)
        documents = recipe.data.build(length=recipe.length, seed=recipe.seed, cache=None)
        size = recipe.tokenizer.build(documents=documents, cache=None).num_tokens
        vocabulary = api.HierarchicalVocabulary([[token % 5 for token in range(size)]])
        api.run(recipe, vocabulary=vocabulary, process=build_process(vocabulary, (1.0, 2.0)))
    return place


def build_process(vocabulary: api.Vocabulary, rates: tuple[float, float]) -> api.ForwardProcess:
    return api.TreeProcess(vocabulary, api.LogTimeClock(rates))


@pytest.fixture
def overridden_run(
    run_with_overrides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    shutil.copytree(run_with_overrides / "runs", tmp_path / "runs")
    monkeypatch.setenv("DDIFF_CACHE", str(run_with_overrides / "cache"))
    shutil.copy(run_with_overrides / "corpus.txt", tmp_path / "corpus.txt")
    monkeypatch.chdir(tmp_path)
    return Path("runs/tiny")


@pytest.mark.parametrize("environment", [None, "{}", '{"parameters": 1, "given": {}}'])
def test_load_requires_the_process_that_was_passed_to_training(
    environment: str | None, overridden_run: Path, ddiff: Command
) -> None:
    (overridden_run / "environment.json").unlink()
    if environment is not None:
        (overridden_run / "environment.json").write_text(environment)
    assert is_refusal(ddiff("eval", "runs/tiny"))
    with pytest.raises(CheckpointError):
        api.load(overridden_run)
    if environment is None:
        with pytest.raises(CheckpointError, match="process that was passed from Python"):
            api.load(overridden_run)


def test_load_refuses_another_process_than_that_passed_to_training(overridden_run: Path) -> None:
    vocabulary = api.Vocabulary.load(str(overridden_run / "vocabulary.safetensors"))
    right = build_process(vocabulary, (1.0, 2.0))
    assert api.load(overridden_run, process=right).process is right
    with pytest.raises(CheckpointError, match="process"):
        api.load(overridden_run, process=build_process(vocabulary, (1.0, 2.5)))


def test_load_refuses_a_process_that_differs_from_that_of_the_recipe(run_dir: Path) -> None:
    vocabulary = api.Vocabulary.load(str(run_dir / "vocabulary.safetensors"))
    same = build_process(vocabulary, (1.0, 1.0))
    assert api.load(run_dir, process=same).process is same
    with pytest.raises(CheckpointError, match="process"):
        api.load(run_dir, process=build_process(vocabulary, (2.0, 1.0)))


def test_checkpoint_records_components_passed_as_python_objects(overridden_run: Path) -> None:
    state = newest_state(str(overridden_run / "checkpoints"))
    assert state is not None
    assert set(state["made_with"]["given"]) == {"vocabulary", "process"}
    assert state["made_with"]["given"]["process"].endswith(":TreeProcess")
