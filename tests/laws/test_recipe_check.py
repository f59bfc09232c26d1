"""`ddiff check RECIPE.toml`: the components and paths of a recipe that are checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddiff.core.paths import Leg
from ddiff.errors import ArgumentError
from ddiff.recipe.resolve import parse_recipe
from ddiff.testing import check_command, recipe_check

RECIPE = """
name = "pair"
plugins = ["dit", "mdlm", "gaussian"]
data = "digits"

[fields.image]
process = {kind = "mdlm", schedule = "cosine"}
[fields.latent]
process = {kind = "gaussian", schedule = "flow"}

[denoiser]
kind = "mmdit"
width = 64

[objective.times]
kind = "mixture"
parts = [{path = "shared"}, {path = "shared", clean = ["latent"]}]

[train]
steps = 10
batch = 4

[evaluate]
targets = ["joint", "image | latent"]

[sample]
targets = ["joint"]
path = {kind = "first", order = ["latent", "image"], power = {latent = 0.5}}
"""


def test_recipe_check_lists_every_path_of_the_recipe_once() -> None:
    paths = recipe_check.list_paths(parse_recipe(RECIPE))
    assert {label: dict(path.legs) for label, path in paths.items()} == {
        "[objective] times, path 1": {"image": Leg(0.0, 1.0), "latent": Leg(0.0, 1.0)},
        "[objective] times, path 2": {"image": Leg(0.0, 1.0), "latent": "clean"},
        "[sample] joint": {"image": Leg(0.0, 0.5), "latent": Leg(0.5, 1.0)},
    }


def test_recipe_check_leaves_out_paths_with_noisy_fields() -> None:
    text = RECIPE.replace('clean = ["latent"]', "noisy = {latent = 0.3}")
    text = text.replace('"image | latent"', '"image through latent"')
    assert list(recipe_check.list_paths(parse_recipe(text))) == [
        "[objective] times, path 1",
        "[sample] joint",
    ]


def test_recipe_check_distinguishes_paths_by_their_power() -> None:
    text = RECIPE.replace('targets = ["joint"]', 'targets = ["joint", "latent"]')
    text = text.replace('"first", order = ["latent", "image"]', '"shared"')
    paths = recipe_check.list_paths(parse_recipe(text))
    assert list(paths)[2:] == ["[sample] joint", "[sample] latent"]


def test_recipe_check_lists_components_with_the_settings_of_the_recipe() -> None:
    specs = recipe_check.list_specs(parse_recipe(RECIPE))
    assert {spec.component.kind for spec in specs} <= set(recipe_check.KINDS)
    configs = {spec.component.name: spec.config.model_dump() for spec in specs}
    assert configs["mdlm"]["schedule"] == "cosine"
    assert configs["gaussian"]["schedule"] == "flow"
    assert "tokens" in configs
    assert "vector" not in configs


def test_recipe_check_refuses_a_rule_of_training_as_a_path_of_evaluation() -> None:
    text = RECIPE.replace("[evaluate]", '[evaluate]\npath = "independent"')
    with pytest.raises(ArgumentError, match=r"\[evaluate\] path: independent times"):
        recipe_check.list_paths(parse_recipe(text))


def test_check_command_checks_the_paths_and_components_of_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processes and samplers have their own tests, and take longer.
    monkeypatch.setattr(recipe_check, "KINDS", ("time_rule",))
    file = tmp_path / "pair.toml"
    file.write_text(RECIPE)
    assert check_command.check_component(str(file), ["sample.steps=4"]) == 0
    out = capsys.readouterr().out
    assert "[objective] times, path 1" in out
    assert "path: draws are unbiased" in out
    assert "flat" in out
    assert "on 4 instance(s), 0 broken" in out
