"""The Python code of docs/fields.md runs, in the order of the page, with small sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import EXAMPLES

import ddiff
from ddiff.recipe.resolve import parse_recipe
from ddiff.recipe.schema import FIELDS
from ddiff.testing import assert_laws, check_gaussian

PAGE = EXAMPLES.parent / "docs" / "fields.md"
SMALLER = {
    "FlatVocabulary(1000)": "FlatVocabulary(20)",
    "randint(0, 1000": "randint(0, 20",
    "384": "6",
    "StreamSpec(256,": "StreamSpec(16,",
    "TokenHead(words, 256)": "TokenHead(words, 16)",
    "StreamSpec(128,": "StreamSpec(16,",
    "128, output": "16, output",
    "layers=6, heads=8, head_width=32": "layers=1, heads=2, head_width=8",
    "Sampler(64)": "Sampler(2)",
}


def blocks() -> list[str]:
    """Return the Python blocks of the page, with small sizes."""
    text = PAGE.read_text(encoding="utf-8")
    for large, small in SMALLER.items():
        assert large in text, f"{PAGE.name} no longer contains {large}"
        text = text.replace(large, small)
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def test_recipe_of_the_fields_page_is_a_fields_recipe() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    recipe = parse_recipe(text)
    assert isinstance(recipe, ddiff.FieldsRecipe)
    image = recipe.fields["image"]
    assert (image.head.component.name, image.sampler.component.name) == ("vector", "ddim")


def test_recipe_of_the_fields_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    Path("digits.toml").write_text(text)
    small = ["train.steps=2", "train.batch=4", "evaluate.samples=4", "evaluate.draws=2"]
    small += ["sample.count=2", "sample.steps=2", "denoiser.layers=1"]
    run = ddiff.run("digits.toml", settings=small)
    assert run.step == 2
    drawn = run.sample(2, "image | text", given={"text": "six"})
    assert [sample["fields"]["text"]["text"] for sample in drawn] == ["six", "six"]


def test_fields_page_lists_every_key_of_fields_recipes() -> None:
    rows = re.findall(r"^\| (`\[.*)$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    listed = {row.partition(" | ")[0]: row for row in rows}
    for name in ("fields.NAME", "objective", "evaluate", "sample"):
        table = FIELDS.tables[name.partition(".")[0]]
        for key in table.engine_keys():
            assert f"`{key}`" in listed[f"`[{name}]`"], f"[{name}] {key}"
    assert {name for row in listed for name in re.findall(r"\[(\w+)", row)} == set(FIELDS.tables)


@pytest.mark.slow
def test_python_code_of_the_fields_page_runs() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for code in blocks():
        exec(code, names)
    assert torch.equal(names["text"].states["latent"], names["z"][:8])
    assert names["found"].fields["text"].items == 64 * 64
    restored = names["restored"].squeeze(1).float()
    torch.testing.assert_close(restored, names["vectors"])
    process = ddiff.GaussianProcess(names["Steep"](), 2)
    assert_laws(check_gaussian(process))
