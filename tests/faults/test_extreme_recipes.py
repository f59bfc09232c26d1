"""Extreme recipes and --set values are refused in one paragraph, without a traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from commands import refusal, run_command
from tiny_run import RECIPE, entries

from ddiff.errors import RecipeError
from ddiff.recipe.resolve import read_recipe
from ddiff.recipe.settings import read_settings
from ddiff.recipe.toml import read_toml

BUILT_IN = ["corpus.txt", "tiny.toml"]


def dry(capsys, recipe: str, *settings: str) -> tuple[int, str, str]:
    return run_command(
        capsys, "run", recipe, "--dry-run", *(f"--set={setting}" for setting in settings)
    )


NESTED = {
    "lists": "deep = " + "[" * 3000 + "]" * 3000,
    "lists that the parser takes": "deep = " + "[" * 60 + "]" * 60,
    "tables": "deep = " + "{a = " * 3000 + "1" + "}" * 3000,
    "dotted keys": ".".join(["a"] * 3000) + " = 1",
    "headers": "[" + ".".join(["a"] * 500) + "]\nx = 1",
}


@pytest.mark.parametrize("name", NESTED)
def test_deeply_nested_recipe_is_refused_without_a_traceback(
    name: str, folder: Path, capsys
) -> None:
    Path("deep.toml").write_text(f'name = "x"\nextends = "mdlm_small"\n{NESTED[name]}\n')
    assert "more than 16 levels" in refusal(dry(capsys, "deep.toml"))
    if "\n" not in NESTED[name] and "=" in NESTED[name]:
        refusal(dry(capsys, "tiny.toml", NESTED[name]))


LONG = "n" * 300
TOO_LONG = {
    "name": (f"name={LONG}", "the recipe name: name must have at most 200 bytes"),
    "name in bytes": (f"name={'é' * 150}", "300 bytes"),
    "run_dir": (f"run_dir=runs/{LONG}/x", "run_dir must have at most 200 bytes"),
    "whole run_dir": (
        "run_dir=" + "/".join(["part"] * 1000),
        "run_dir must have at most 3800 bytes",
    ),
    "extends": (f"extends={LONG}", "extends is only valid in a recipe file"),
    "device": (f"backend.device={LONG}", "device must be"),
    "plugin": (f'plugins=["{LONG}"]', "There is no plugin"),
    "kind": (f"process.kind={LONG}", "There is no process"),
    "key": (f"train.{LONG}=1", "has no key"),
    "table": (f"{LONG}.x=1", "has no key or table"),
    "files": (f'data={{kind="text", files=["{LONG}"]}}', "[data]"),
    "init": (f"train.init.run={LONG}", "train"),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_names_too_long_for_a_file_system_are_refused(name: str, folder: Path, capsys) -> None:
    setting, expected = TOO_LONG[name]
    assert expected in refusal(dry(capsys, "tiny.toml", setting))
    assert entries(folder) == BUILT_IN


def test_recipe_path_too_long_for_the_system_is_not_found(folder: Path, capsys) -> None:
    assert "there is no such file" in refusal(dry(capsys, LONG))
    Path("a.toml").write_text(f'extends = "{LONG}"\n')
    assert "a.toml:1: extends " in refusal(dry(capsys, "a.toml"))


OUT_OF_RANGE = {
    "seed": "99999999999999999999999",
    "evaluate.seed": "18446744073709551616",
    "sample.seed": "-1",
    "vocabulary.seed": "99999999999999999999999",
    "data.length": "9223372036854775807",
    "train.steps": "1000000000000000000000000000000",
    "train.batch": "18446744073709551616",
    "train.warmup": "2147483648",
    "train.keep": "2147483648",
    "evaluate.draws": "1000000000000000000000000000000",
    "evaluate.rows": "2147483648",
    "sample.steps": "1000000000000",
    "sample.count": "2147483648",
    "backend.workers": "100000",
    "backend.processes": "1000000",
    "tokenizer.size": "2147483647",
    "vocabulary.sizes": "[2147483648]",
    "vocabulary.width": "2147483647",
    "denoiser.layers": "2147483647",
    "train.optimizer.betas": "[0.9, 1.5]",
    "train.clip": "1e300",
    "sample.guidance": "1e308",
    "sample.conditions": "{author = 99999999999999999999}",
}


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_dry_run_prints_an_error_that_names_the_key_of_a_number_out_of_range(
    key: str, folder: Path, capsys
) -> None:
    kind = ["train.optimizer.kind=adamw"] if "optimizer" in key else []
    message = refusal(dry(capsys, "tiny.toml", *kind, f"{key}={OUT_OF_RANGE[key]}"))
    assert key.split(".")[-1] in message


FLOATS = [
    "train.clip", "train.floor", "train.ema", "train.prefix", "process.gamma", "process.xi",
    "denoiser.dropout", "sample.guidance", "sample.sampler.temperature", "sample.sampler.top_p",
    "sample.sampler.min_p", "data.held_out", "vocabulary.min_share", "vocabulary.max_share",
    "train.optimizer.lr", "objective.times.start", "objective.times.stop",
]  # fmt: skip


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("key", FLOATS)
def test_every_float_key_of_a_recipe_refuses_nan_and_infinity(
    key: str, value: str, folder: Path
) -> None:
    with pytest.raises(RecipeError, match=key.split(".")[-1]):
        read_recipe("tiny.toml", [f"{key}={value}"])


def test_recipe_keys_with_two_floats_refuse_nan_and_infinity(folder: Path) -> None:
    for setting in ("evaluate.window=[nan, 0.9]", "evaluate.window=[0.1, inf]"):
        with pytest.raises(RecipeError, match="window"):
            read_recipe("tiny.toml", [setting])


ABSURD = {
    "width": ("denoiser.width=1000000000",),
    "width that overflows": ("denoiser.width=2147483520",),
    "length": ("data.length=2147483647",),
    "batch": ("train.batch=2147483647",),
    "sampled rows": ("sample.batch=2147483647", "sample.count=2147483647"),
    "labels": ("denoiser.conditions={author = {classes = 2147483647}}",),
    "generated rows": (
        'data={kind="markov", rows=2147483647}',
        'tokenizer={kind="alphabet", symbols="abcd"}',
    ),
}


@pytest.mark.parametrize("name", ABSURD)
def test_huge_model_sizes_are_refused_before_memory_is_allocated(
    name: str, folder: Path, capsys
) -> None:
    message = refusal(dry(capsys, "tiny.toml", *ABSURD[name]))
    assert any(
        text in message
        for text in ("does not fit into memory", "fewer than 2^63 bytes", "must have at most")
    )
    assert entries(folder) == BUILT_IN


def chain(length: int) -> None:
    for link in range(length):
        Path(f"c{link}.toml").write_text(f'extends = "c{link + 1}.toml"\n')
    Path(f"c{length}.toml").write_text(RECIPE)


def test_long_chain_of_extended_recipes_is_refused(folder: Path, capsys) -> None:
    chain(1200)
    assert "a chain of extends has more than 32 recipes" in refusal(dry(capsys, "c0.toml"))
    assert dry(capsys, "c1185.toml")[0] == 0


def test_recipe_that_extends_itself_is_refused(folder: Path, capsys) -> None:
    Path("a.toml").write_text('extends = "b.toml"\n')
    Path("b.toml").write_text('extends = "./a.toml"\n')
    assert "in a cycle" in refusal(dry(capsys, "a.toml"))
    Path("self.toml").write_text('extends = "self.toml"\n')
    assert "in a cycle" in refusal(dry(capsys, "self.toml"))


SETTINGS = [
    "train.steps=5\nseed=3",
    "train.steps=5\r\nseed=3",
    "train.steps=5\n[evaluate]\nrows=3",
    "train.steps\n=5",
    "a=1\nb",
    "=5",
    "train..steps=5",
    "train.steps",
    "train.steps=",
    "train.steps=[1",
    "train.steps={a=1",
    'name="a',
    "seed=0x" + "f" * 20000,
    "seed=" + "9" * 20000,
    "seed=1979-05-27",
    "seed=07:32:00",
    "train.steps.x=3",
    "train=3",
    'name="\\ud800"',
    "name=\x7f",
    "name=\x00",
]


@pytest.mark.parametrize("setting", SETTINGS, ids=[ascii(setting)[:30] for setting in SETTINGS])
def test_malformed_set_options_are_refused(setting: str, folder: Path, capsys) -> None:
    refusal(dry(capsys, "tiny.toml", setting))
    assert entries(folder) == BUILT_IN


def test_set_option_accepts_a_value_of_several_lines() -> None:
    assert read_settings(["data.files=[\n'a',\n'b']"], "x").values == {
        "data": {"files": ["a", "b"]}
    }


@pytest.mark.parametrize("value", ["a/😀", '"a/😀"', "naïve", "日本"])
def test_set_option_accepts_any_text_with_or_without_quotes(value: str, folder: Path) -> None:
    assert read_recipe("tiny.toml", [f"run_dir={value}"]).run_dir == value.strip('"')


def test_recipe_error_shortens_a_long_value(folder: Path, capsys) -> None:
    for setting in (
        f"train.steps={'x' * 100_000}",
        f"{'y' * 100_000}=1",
        f"train.schedule={'z' * 100_000}",
    ):
        assert "more characters" in refusal(dry(capsys, "tiny.toml", setting))


def test_recipes_and_set_options_refuse_text_that_is_not_utf8(folder: Path, capsys) -> None:
    Path("latin.toml").write_bytes(RECIPE.replace('"tiny"', '"café"').encode("latin-1"))
    assert "cannot be read" in refusal(dry(capsys, "latin.toml"))
    Path("utf16.toml").write_text(RECIPE, encoding="utf-16")
    assert "cannot be read" in refusal(dry(capsys, "utf16.toml"))
    assert "not UTF-8" in refusal(dry(capsys, "tiny.toml", os.fsdecode(b"name=caf\xe9")))
    assert "there is no such file" in refusal(dry(capsys, os.fsdecode(b"caf\xe9.toml")))


def test_recipe_reader_skips_a_byte_order_mark(folder: Path) -> None:
    Path("bom.toml").write_text(RECIPE, encoding="utf-8-sig")
    assert read_recipe("bom.toml").name == "tiny"


def test_file_too_large_for_a_recipe_is_refused(folder: Path, capsys) -> None:
    Path("big.toml").write_text(RECIPE + "#" * 2**20)
    assert "more than 1,048,576 bytes" in refusal(dry(capsys, "big.toml"))
    Path("folder.toml").mkdir()
    assert "is a directory" in refusal(dry(capsys, "folder.toml"))


def test_line_numbers_of_keys_take_linear_time_in_the_length_of_a_recipe() -> None:
    """A recipe with many keys is read in seconds, and the line numbers are exact."""
    draft = read_toml("\n".join(f"k{i} = [1,\n2]" for i in range(20_000)), "x.toml")
    assert draft.places[("k0",)] == "x.toml:1"
    assert draft.places[("k19999",)] == "x.toml:39999"
    assert draft.places[("k19999", 1)] == "x.toml:40000"
