"""What the README writes down is what a reader who types it gets."""

from __future__ import annotations

import re

import pytest
from scripts import EXAMPLES

import ddiff
from ddiff.recipe.resolve import parse_recipe

README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_recipe_that_it_writes_resolves_and_keeps_what_it_says() -> None:
    (written,) = blocks("toml")
    recipe = parse_recipe(written, "mine.toml").to_dict()
    assert recipe["name"] == "mine"
    assert recipe["vocabulary"]["sizes"] == [100, 10]
    assert (recipe["process"]["kind"], recipe["process"]["gamma"]) == ("hdlm", 2.0)
    assert recipe["denoiser"]["kind"] == "dit"  # of the recipe that it extends


def test_the_sizes_that_it_tells_of_hdlm_small_are_those_of_the_recipe() -> None:
    assert (
        f"hdlm_small has {ddiff.read_recipe('hdlm_small').to_dict()['vocabulary']['sizes']}"
        in README
    )


def test_the_mistake_that_it_quotes_is_answered_in_those_words() -> None:
    with pytest.raises(ddiff.RecipeError) as caught:
        parse_recipe(blocks("toml")[0], "mine.toml", ["process.gama=2"])
    assert " ".join(str(caught.value).split()) in " ".join(README.split())


def test_every_public_name_that_its_python_uses_is_there() -> None:
    used = {name for block in blocks("python") for name in re.findall(r"\bddiff\.(\w+)", block)}
    assert used >= {"load", "run"}
    assert used - {"testing"} <= set(ddiff.__all__)
