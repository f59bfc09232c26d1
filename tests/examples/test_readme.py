"""Examples in the README do what the README says."""

from __future__ import annotations

import re

import pytest
from scripts import EXAMPLES

import ddiff
from ddiff.recipe.resolve import parse_recipe

README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_readme_recipe_resolves_with_the_keys_it_shows() -> None:
    (written,) = blocks("toml")
    recipe = parse_recipe(written, "mine.toml").to_dict()
    assert recipe["name"] == "mine"
    assert recipe["vocabulary"]["sizes"] == [100, 10]
    assert (recipe["process"]["kind"], recipe["process"]["gamma"]) == ("hdlm", 2.0)
    assert recipe["denoiser"]["kind"] == "dit"  # from the recipe that it extends


def test_readme_gives_the_cluster_sizes_of_hdlm_small() -> None:
    assert (
        f"hdlm_small has {ddiff.read_recipe('hdlm_small').to_dict()['vocabulary']['sizes']}"
        in README
    )


def test_readme_gives_the_steps_of_the_continued_run() -> None:
    found = re.search(r"hdlm_small --set train.steps=(\d+) +# continue for (\d+) steps", README)
    assert found is not None
    stop, added = map(int, found.groups())
    assert ddiff.read_recipe("hdlm_small").to_dict()["train"]["steps"] + added == stop


def test_readme_quotes_the_error_message_of_a_misspelt_key() -> None:
    with pytest.raises(ddiff.RecipeError) as caught:
        parse_recipe(blocks("toml")[0], "mine.toml", ["process.gama=2"])
    assert " ".join(str(caught.value).split()) in " ".join(README.split())


def test_readme_python_uses_only_public_names() -> None:
    used = {name for block in blocks("python") for name in re.findall(r"\bddiff\.(\w+)", block)}
    assert used >= {"load", "run"}
    assert used - {"testing"} <= set(ddiff.__all__)
