"""Recipes: reading, defaults, `extends`, `--set`, and reading back a resolved recipe."""

from __future__ import annotations

import tomllib
from dataclasses import fields

import fsspec
import pytest

from ddiff.errors import PluginError, RecipeError
from ddiff.plugin.loader import load_plugins
from ddiff.recipe.fields_recipe import FieldsRecipe, FieldTables
from ddiff.recipe.keys import TopLevelKeys
from ddiff.recipe.model import Recipe, diff_recipes
from ddiff.recipe.resolve import configure_component, parse_recipe, read_recipe
from ddiff.recipe.schema import FIELDS, GROUP, TEXT, Layout, component_field, keys_field

from .conftest import RECIPE


def test_read_recipe_fills_in_every_default(write):
    recipe = read_recipe(write())
    assert (recipe.name, recipe.seed, recipe.run_dir, recipe.plugins, recipe.length) == (
        "mine",
        0,
        "runs/mine",
        ("toy",),
        16,
    )
    assert {place: part.component.name for place, part in recipe.components().items()} == {
        "data": "plain",
        "tokenizer": "plain",
        "vocabulary": "clusters",
        "process": "toy",
        "denoiser": "net",
        "denoiser.head": "tied",
        "objective": "nelbo",
        "objective.loss": "elbo",
        "objective.times": "flat",
        "train.optimizer": "adamw",
        "backend": "single",
        "sample.sampler": "ancestral",
        "tracker": "none",
    }
    assert (recipe.train.warmup, recipe.train.schedule, recipe.train.clip) == (100, "cosine", 1.0)
    assert (recipe.backend_keys.device, recipe.backend_keys.processes) == ("auto", 1)
    assert recipe.evaluate.window == (1e-3, 0.999)
    assert (recipe.sample.steps, recipe.sample.count) == (64, 8)


def attributes_of(layout: Layout, groups: dict[str, dict[str, None]]) -> set[str]:
    """Names of the attributes that a layout defines for the tables outside and inside groups."""
    names = {component_field(path) for path in layout.list_slots(groups)}
    for path, table in layout.list_tables(groups).items():
        if table.keys is not None:
            names.add(keys_field(path, table))
    return names


def test_recipe_classes_have_the_attributes_that_their_layouts_define():
    common = {*TopLevelKeys.model_fields, "registry", "source"}
    assert {field.name for field in fields(Recipe)} == common | attributes_of(TEXT, {})
    expected = common | attributes_of(FIELDS, {}) | {"fields"}
    assert {field.name for field in fields(FieldsRecipe)} == expected
    of_a_field = Layout("a field", {GROUP: FIELDS.tables[GROUP]})
    expected = attributes_of(of_a_field, {GROUP: {"image": None}})
    assert {field.name for field in fields(FieldTables)} == expected


def test_resolved_recipe_reads_back_as_equal_recipe(write):
    recipe = read_recipe(
        write(), ["train.optimizer=muon", "process.clock.rates=[1, 2]", "sample.seed=3"]
    )
    again = read_recipe(write(recipe.to_toml(), "resolved.toml"))
    assert again == recipe
    assert again.to_dict() == recipe.to_dict() == tomllib.loads(recipe.to_toml())
    assert again.fingerprint == recipe.fingerprint


def test_recipe_fingerprint_changes_with_values_but_not_with_notation(write):
    recipe = read_recipe(write())
    assert read_recipe(write(), ["process.xi=0.9"]).fingerprint != recipe.fingerprint
    assert (
        read_recipe(write(), ["denoiser.head={kind = 'tied'}", "process.xi=1"]).fingerprint
        == recipe.fingerprint
    )


def test_recipe_string_is_shorthand_for_a_table_with_only_a_kind(write):
    text = RECIPE.replace('[tokenizer]\nkind = "plain"\n', "").replace(
        'name = "mine"', 'name = "mine"\ntokenizer = "plain"'
    )
    assert read_recipe(write(text)) == read_recipe(write())


def test_component_spec_builds_component_from_its_settings(write):
    process = read_recipe(write()).process
    assert process.build(vocabulary="words") == (2.0, "words")
    with pytest.raises(
        PluginError, match=r"cannot be built: .*missing a required argument: 'vocabulary'"
    ):
        process.build()


def test_recipe_origins_name_the_installed_package_of_each_component(write):
    assert read_recipe(write()).origins()["process"] == "toy (toy_pkg, toy-dist 1.0)"


def test_recipe_of_an_objective_without_process_may_omit_the_process(write):
    text = RECIPE.replace('[process]\nkind = "toy"\ngamma = 2\n', '[objective]\nkind = "next"\n')
    recipe = read_recipe(write(text))
    assert (recipe.process, recipe.loss, recipe.times) == (None, None, None)
    assert recipe.to_dict()["objective"] == {"kind": "next"}
    with pytest.raises(RecipeError, match=r'\[objective\] has no key "loss" for kind "next"'):
        read_recipe(write(text), ["objective.loss=elbo"])


def test_component_key_named_like_another_key_of_its_table_gets_its_value(write):
    recipe = read_recipe(write())
    assert recipe.backend.config.device == recipe.backend_keys.device == "auto"


def test_component_key_with_a_reserved_name_is_refused(write):
    with pytest.raises(PluginError, match=r'backbone "greedy" .*has the reserved key "head"'):
        read_recipe(write(), ["denoiser.kind=greedy"])


@pytest.mark.parametrize(("kind", "key"), [("choosy", "rates=[1.0]"), ("halving", "rate=2.0")])
def test_component_config_that_does_not_survive_writing_to_toml_is_refused(write, kind, key):
    with pytest.raises(PluginError, match=f'process "{kind}" .* every default is written out'):
        read_recipe(write(), [f"process.kind={kind}", f"process.{key}"])


# extends


def test_extends_key_merges_recipes_table_by_table(write):
    write()
    recipe = read_recipe(
        write('extends = "mine.toml"\nname = "child"\n[process]\nxi = 0.5\n', "child.toml")
    )
    assert (recipe.name, recipe.run_dir, recipe.process.config.gamma, recipe.process.config.xi) == (
        "child",
        "runs/child",
        2.0,
        0.5,
    )


def test_extends_finds_base_recipe_in_folder_of_extending_file(write):
    write(name="base/mine.toml")
    assert (
        read_recipe(write('extends = "mine.toml"\nname = "child"', "base/child.toml")).length == 16
    )


def test_recipe_table_with_changed_kind_inherits_only_common_keys(write):
    write(
        RECIPE.replace('head = "tied"', 'head = "tied"\nwidth = 32').replace(
            "steps = 10", 'steps = 10\noptimizer = {kind = "muon", lr = 1.0}'
        )
    )
    recipe = read_recipe(
        write(
            'extends = "mine.toml"\n[vocabulary]\nkind = "clusters"\n[train]\noptimizer = "adamw"',
            "child.toml",
        )
    )
    assert recipe.vocabulary.config.sizes == (64, 8)
    assert recipe.optimizer.component.name == "adamw"
    changed = read_recipe("mine.toml", ["data.kind=plain", "objective.kind=next"])
    assert changed.length == 16
    with pytest.raises(
        RecipeError, match=r'\[process\] kind = "other": There is no process "other"'
    ):
        read_recipe("mine.toml", ["process.kind=other"])


def test_cycle_of_extends_is_refused(write):
    write('extends = "two.toml"', "one.toml")
    write('extends = "./one.toml"', "two.toml")
    with pytest.raises(RecipeError, match=r"two.toml:1 .*cycle: .*one.toml"):
        read_recipe("one.toml")


def test_recipe_is_read_from_fsspec_address(toy):
    with fsspec.open("memory://recipes/mine.toml", "w") as file:
        file.write(RECIPE)
    assert read_recipe("memory://recipes/mine.toml").name == "mine"


# --set


@pytest.mark.parametrize(
    ("setting", "table", "key", "value"),
    [
        ("train.steps=200", "train", "steps", 200),
        ("train.schedule=constant", "train", "schedule", "constant"),
        ("train.schedule='constant'", "train", "schedule", "constant"),
        ("backend.device=cuda:0", "backend", "device", "cuda:0"),
        ("evaluate.window=[0.01, 0.9]", "evaluate", "window", [0.01, 0.9]),
        ("train.clip=2", "train", "clip", 2.0),
        ("process.note=1e-x", "process", "note", "1e-x"),
        ("process={kind = 'toy', gamma = 3.0}", "process", "gamma", 3.0),
    ],
)
def test_set_option_accepts_toml_values_and_unquoted_strings(write, setting, table, key, value):
    assert read_recipe(write(), [setting]).to_dict()[table][key] == value


def test_set_option_replaces_a_top_level_list(write):
    assert read_recipe(write(), ['plugins=["toy", "toy"]']).plugins == ("toy",)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.optimizer=muon", "train.optimizer.lr=0.5"],
        ["train.optimizer.lr=0.5", "train.optimizer=muon"],
        ["train.optimizer.lr=0.5", "train.optimizer.kind=muon"],
        ["train.optimizer={kind='muon', lr=0.5}"],
    ],
)
def test_set_option_combines_shorthand_and_keys_in_any_order(write, settings):
    optimizer = read_recipe(write(), settings).optimizer
    assert (optimizer.component.name, optimizer.config.lr) == ("muon", 0.5)


def test_set_option_changes_key_of_component_given_by_shorthand(write):
    path = write(RECIPE.replace("steps = 10", 'steps = 10\noptimizer = "muon"'))
    assert read_recipe(path, ["train.optimizer.lr=0.5"]).optimizer.config.lr == 0.5


def test_configure_component_needs_no_recipe(toy):
    component = load_plugins(["toy"]).component("process", "toy")
    assert configure_component(component, ["gamma=0.5", "xi=0.9"]).config.gamma == 0.5
    with pytest.raises(
        RecipeError, match=r'--set gama=0.5: .* has no key "gama"\. Did you mean "gamma"\?'
    ):
        configure_component(component, ["gama=0.5"])


def test_diff_recipes_lists_dotted_keys_with_both_values(write):
    old = read_recipe(write()).to_dict()
    new = read_recipe(
        write(), ["train.steps=20", "train.optimizer=muon", "vocabulary.sizes=[64]"]
    ).to_dict()
    assert sorted(diff_recipes(old, new)) == [
        ("train.optimizer.kind", "adamw", "muon"),
        ("train.optimizer.lr", None, 0.02),
        ("train.steps", 10, 20),
        ("vocabulary.sizes", [64, 8], [64]),
    ]
    assert diff_recipes(old, parse_recipe(RECIPE).to_dict()) == []


def test_text_recipe_may_have_a_judge(write):
    assert read_recipe(write()).judge is None
    recipe = read_recipe(write(), ["judge=plain"])
    assert recipe.judge.component.name == "plain"
    assert read_recipe(write(recipe.to_toml(), "resolved.toml")) == recipe
