"""Recipes of several fields: reading, defaults, `extends`, `--set`, reading back, and messages."""

from __future__ import annotations

import re
import tomllib

import pytest

from ddiff.errors import ArgumentError, RecipeError
from ddiff.recipe.fields_recipe import FieldsRecipe, require_text_recipe
from ddiff.recipe.listing import list_plugin
from ddiff.recipe.resolve import configure_field_sampler, read_recipe

from .conftest import FIELDS_RECIPE, RECIPE
from .test_messages import line_of, message


@pytest.fixture
def recipe(write) -> FieldsRecipe:
    read = read_recipe(write(FIELDS_RECIPE))
    assert isinstance(read, FieldsRecipe)
    return read


def test_fields_recipe_lists_its_components_by_path(recipe):
    assert {place: spec.component.name for place, spec in recipe.components().items()} == {
        "data": "plain",
        **{
            f"fields.{name}.{slot}": kind
            for name in ("image", "text", "latent")
            for slot, kind in {
                "vocabulary": "flat",
                "process": "normal" if name == "latent" else "toy",
                "head": {"text": "tied", "image": "tokens", "latent": "vector"}[name],
                "loss": "elbo",
                "times": "flat",
                "sampler": "ddim" if name == "latent" else "ancestral",
                "normalizer": "pca" if name == "latent" else "none",
            }.items()
        },
        "fields.text.tokenizer": "plain",
        "denoiser": "streams",
        "objective.times": "mixture",
        "train.optimizer": "adamw",
        "backend": "single",
        "evaluate.path": "shared",
        "sample.path": "shared",
        "tracker": "none",
        "encoder": "plain",
    }
    assert recipe.fields["text"].process.table == "[fields.text.process]"
    assert recipe.origins()["fields.image.process"] == "toy (toy_pkg, toy-dist 1.0)"


def test_fields_recipe_fills_in_every_default(recipe):
    assert recipe.run_dir == "runs/pair"
    assert list(recipe.fields) == ["image", "text", "latent"]
    image, text, latent = recipe.fields.values()
    assert (image.keys.weight, image.keys.length, image.keys.encode) == (2.0, None, None)
    assert (image.tokenizer, image.keys.steps) == (None, None)
    assert (text.keys.weight, text.keys.length, text.process.config.gamma) == (1.0, 5, 2.0)
    assert (latent.keys.encode, latent.normalizer.config.width) == ("text", 2)
    assert (recipe.evaluate.draws, recipe.evaluate.samples, recipe.evaluate.controls) == (
        1,
        None,
        True,
    )
    assert recipe.evaluate.targets == ("joint", "image | text")
    assert (recipe.sample.targets, recipe.sample.update) == (("joint",), "jacobi")
    assert recipe.sample.guidance["image"].without == {"text": "absent"}
    assert recipe.train.ema == 0.0
    assert recipe.judge is None


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["judge=plain", "seed=3", "train.ema=0.5", "evaluate.weights=ema"],
        ["objective.times=shared", "objective.normalization=sample", "train.warmup=3"],
        ["objective.decoding_share=0", "fields.latent.normalizer=none", "fields.image.steps=7"],
        ["fields.extra.process={kind = 'toy', xi = [0.5, 1.0]}"],
    ],
)
def test_resolved_fields_recipe_reads_back_as_equal_recipe(write, settings):
    recipe = read_recipe(write(FIELDS_RECIPE), settings)
    again = read_recipe(write(recipe.to_toml(), "resolved.toml"))
    assert again == recipe
    assert again.to_dict() == recipe.to_dict() == tomllib.loads(recipe.to_toml())
    assert again.fingerprint == recipe.fingerprint


def test_written_fields_recipe_keeps_the_order_of_the_fields(write):
    recipe = read_recipe(write(FIELDS_RECIPE))
    written = tomllib.loads(recipe.to_toml())
    assert list(written["fields"]) == ["image", "text", "latent"]
    assert list(written) == [*list(read_recipe(write()).to_dict())[:4], *list(written)[4:]]


@pytest.mark.parametrize(
    ("setting", "table", "key", "value"),
    [
        ("fields.image.weight=3", "image", "weight", 3.0),
        ("fields.image.process.gamma=0.5", "image", "process", 0.5),
        ("fields.text.length=9", "text", "length", 9),
        ("fields.text.process={kind = 'toy', gamma = 3.0}", "text", "process", 3.0),
    ],
)
def test_set_option_changes_keys_of_a_field(write, setting, table, key, value):
    changed = read_recipe(write(FIELDS_RECIPE), [setting]).to_dict()["fields"][table][key]
    assert (changed["gamma"] if key == "process" else changed) == value


def test_fields_recipe_inherits_fields_of_the_extended_recipe(write):
    write(FIELDS_RECIPE)
    text = (
        'extends = "mine.toml"\n[fields.text]\nweight = 0.5\n'
        '[fields.text.process]\nkind = "choosy"\n[fields.extra]\nprocess = "toy"\n'
    )
    child = read_recipe(write(text, "child.toml"))
    assert (child.name, list(child.fields)) == ("child", ["image", "text", "latent", "extra"])
    assert (child.fields["text"].keys.weight, child.fields["text"].keys.length) == (0.5, 5)
    # the keys of another kind are not inherited
    assert child.fields["text"].process.to_dict() == {
        "kind": "choosy",
        "rate": 1.0,
        "rates": None,
    }
    assert child.fields["image"].keys.weight == 2.0


def test_recipe_without_fields_table_extends_a_fields_recipe(write):
    write(FIELDS_RECIPE)
    child = read_recipe(
        write('extends = "mine.toml"\n[denoiser]\nwidth = 32\n[data]\nkind = "plain"', "c.toml")
    )
    assert isinstance(child, FieldsRecipe)
    assert child.denoiser.config.width == 32


def test_component_of_a_field_with_changed_kind_drops_the_keys_of_the_old_kind(write):
    changed = read_recipe(write(FIELDS_RECIPE), ["fields.latent.normalizer=none"])
    assert changed.fields["latent"].normalizer.to_dict() == {"kind": "none"}
    kept = read_recipe(write(FIELDS_RECIPE), ["fields.latent.normalizer.kind=pca"])
    assert kept.fields["latent"].normalizer.config.width == 2


REPLACED = [
    (
        "weight = 2\n",
        "wieght = 2\n",
        '[fields.image] has no key "wieght". Did you mean "weight"? Valid keys: tokenizer, '
        "vocabulary, process, head, loss, times, sampler, normalizer, weight, length, "
        "long, encode, steps.",
    ),
    ("weight = 2\n", "weight = -1\n", "[fields.image] weight must be greater than or equal to 0"),
    (
        "gamma = 2",
        "gama = 2",
        '[fields.text.process] has no key "gama" for kind "toy" (from toy_pkg, toy-dist 1.0). '
        'Did you mean "gamma"?',
    ),
    ("gamma = 2", "gamma = true", "[fields.text.process] gamma must be a number; got true."),
    ("length = 5", "length = 0", "[fields.text] length must be greater than 0; got 0."),
    (
        'head = "tied"',
        'head = "tide"',
        '[fields.text.head] kind = "tide": There is no head "tide". Did you mean "tied"?',
    ),
    (
        'head = "tied"',
        "head = 3",
        "fields.text.head must be a table, or the name of the head in quotes; got 3.",
    ),
    (
        'encode = "text"',
        'encode = "txt"',
        '[fields.latent] encode: there is no field "txt". Did you mean "text"? '
        "Fields: image, text, latent.",
    ),
    (
        'encode = "text"',
        'encode = "latent"',
        "[fields.latent] encode must name a field of texts; got itself.",
    ),
    (
        'targets = ["joint", "image | text"]',
        'targets = ["image | text", "image|text"]',
        "[evaluate] targets: targets must not repeat a target; got 'image | text' twice.",
    ),
    (
        'targets = ["joint", "image | text"]',
        "targets = []",
        "[evaluate] targets must have at least 1 item; got [].",
    ),
    (
        'targets = ["joint", "image | text"]',
        "window = [0.1, 0.9]",
        '[evaluate] has no key "window". Valid keys: path, every, batch, samples, draws, seed, '
        "weights, targets, deviation, unnamed, controls. Only a recipe without tables "
        "[fields.NAME] has this key.",
    ),
    (
        '[sample]\npath = "shared"\n',
        '[sample]\nsampler = "ancestral"\n',
        '[sample] has no key "sampler". Valid keys: path, steps, count, given, batch, seed, '
        "every, targets, unnamed, update, guidance. In a recipe with fields, this key belongs to "
        "the tables [fields.NAME].",
    ),
    (
        '[sample]\npath = "shared"\n',
        '[sample]\npath = "sharde"\n',
        '[sample.path] kind = "sharde": There is no path_rule "sharde". Did you mean "shared"?',
    ),
    (
        '[sample]\npath = "shared"\n',
        '[sample]\nupdate = "jacoby"\n',
        '[sample] update must be "jacobi" or "gauss-seidel"; got "jacoby" (a string). '
        'Did you mean "jacobi"?',
    ),
    (
        'without = {text = "absent"}',
        'without = {txt = "absent"}',
        '[sample.guidance.image] without: there is no field "txt". Did you mean "text"?',
    ),
    (
        'without = {text = "absent"}',
        'without = {image = "prior"}',
        '[sample.guidance.image] without must name other fields than "image"',
    ),
    (
        'without = {text = "absent"}',
        'wihtout = {text = "absent"}',
        '[sample.guidance.image] has no key "wihtout". Did you mean "without"?',
    ),
    (
        'data = "plain"',
        'data = "plain"\nfields.joint.process = "toy"',
        'must not be "joint", which means all fields; got "joint" (a string). Rename the field.',
    ),
    (
        'data = "plain"',
        'data = "plain"\nfields."a b".process = "toy"',
        "the name of a field must be 1 to 64 letters, digits and _, must not begin with a digit",
    ),
    (
        'data = "plain"',
        'data = "plain"\nfields.process = "toy"',
        '"process" is a key of a field, and cannot be the name of a field. Write the name of a '
        "field before the key, as in fields.text.process.",
    ),
    (
        'data = "plain"',
        'data = "plain"\nfields.other = "toy"',
        'fields.other must be a table with the keys of a field; got "toy" (a string).',
    ),
    (
        'data = "plain"',
        'data = "plain"\nprocess = "toy"',
        'a recipe with fields has no key or table "process". Did you mean "fields.NAME.process"?',
    ),
    (
        'data = "plain"',
        'data = "plain"\ntokenizer = {kind = "plain"}',
        'a recipe with fields has no key or table "tokenizer". '
        'Did you mean "fields.NAME.tokenizer"?',
    ),
    (
        'data = "plain"',
        'data = {kind = "plain", length = 4}',
        '[data] has no key "length" for kind "plain" (from toy_pkg, toy-dist 1.0). Valid keys: '
        "none. In a recipe with fields, this key belongs to the tables [fields.NAME].",
    ),
    (
        "batch = 4",
        "batch = 4\nprefix = 0.5",
        "Only a recipe without tables [fields.NAME] has this key.",
    ),
    (
        "batch = 4",
        "batch = 4\nbackend = {processes = 3}",
        '[train] has no key "backend".',
    ),
    ("batch = 4", "batch = 4\naccumulate = 3", "batch must be a multiple of accumulate"),
    (
        "[objective]\n",
        "[objective]\nkind = 'nelbo'\n",
        '[objective] has no key "kind". Valid keys: times, normalization, decoding_share.',
    ),
    (
        "[objective]\n",
        "[objective]\nloss = 'elbo'\n",
        "In a recipe with fields, this key belongs to the tables [fields.NAME].",
    ),
]


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    REPLACED,
    ids=[wrong.strip().rpartition("\n")[2] for _, wrong, _ in REPLACED],
)
def test_message_about_wrong_key_of_a_field_names_file_and_line(write, right, wrong, expected):
    text = FIELDS_RECIPE.replace(right, wrong)
    assert text != FIELDS_RECIPE
    written = message(write(text))
    assert expected in written
    file, line = written.partition(": ")[0].split(":")
    assert file == "mine.toml"
    last_line_of_the_change = line_of(text, wrong) + wrong.strip().count("\n")
    header = line_of(text, "[train]")
    assert int(line) == (header if "batch must" in written else last_line_of_the_change)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["fields.latent.head=tied"],
            '--set fields.latent.head=tied: [fields.latent.head]: the head "tied" (from toy_pkg, '
            'toy-dist 1.0) is for tokens, but the process "normal" of this field is for vectors. '
            "Available: vector.",
        ),
        (
            ["fields.text.sampler=heun"],
            'is for vectors, but the process "toy" of this field is for tokens. '
            "Available: ancestral.",
        ),
        (["fields.latent.loss=clip"], "Available: elbo."),
        (
            ["fields.image.normalizer=pca"],
            "--set fields.image.normalizer=pca: [fields.image] normalizer is only for a field of "
            'vectors, but the process "toy" of this field is for tokens. Remove normalizer',
        ),
        (
            ["fields.latent.tokenizer=plain"],
            "[fields.latent] tokenizer is only for a field of text",
        ),
        (["fields.latent.length=3"], "[fields.latent] length is only for a field of texts"),
        (
            ["fields.latent.vocabulary={kind = 'clusters', sizes = [3]}"],
            "[fields.latent] vocabulary is only for a field of tokens",
        ),
    ],
)
def test_component_for_other_states_than_those_of_the_process_is_refused(write, settings, expected):
    assert expected in message(write(FIELDS_RECIPE), tuple(settings))


def test_defaults_of_a_field_follow_the_states_of_its_process(write):
    recipe = read_recipe(write(FIELDS_RECIPE), ["fields.image.process=normal"])
    image = recipe.fields["image"]
    assert (image.head.component.name, image.sampler.component.name) == ("vector", "ddim")
    assert image.normalizer.component.name == "standard"


def test_keys_of_a_default_of_vectors_are_kept_if_its_kind_is_given_later(write):
    text = FIELDS_RECIPE.replace('process = "normal"\n', 'process = "normal"\nhead.scale = 2.0\n')
    for settings in ([], ["fields.latent.head=vector"]):
        assert read_recipe(write(text), settings).fields["latent"].head.config.scale == 2.0


def test_field_without_process_message_names_the_line_of_the_field(write):
    text = FIELDS_RECIPE.replace('[fields.image]\nprocess = "toy"\n', "[fields.image]\n")
    assert message(write(text)) == (
        "mine.toml:5: [fields.image.process] needs a kind, the name of the process in quotes. "
        "Available: choosy, halving, normal, toy."
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("fields = 3", "fields must be a table that contains a table [fields.NAME]"),
        ("fields = []", "fields must be a table that contains a table [fields.NAME]"),
        ("fields = {}", "[fields] has no field. Write a table [fields.NAME] for each field"),
    ],
)
def test_fields_key_without_tables_is_refused_with_its_line(write, fields, expected):
    text = f'name = "x"\nplugins = ["toy"]\n{fields}\ndata = "plain"\n'
    written = message(write(text))
    assert written.startswith("mine.toml:3: ")
    assert expected in written


def test_missing_table_message_lists_the_tables_of_a_fields_recipe(write):
    text = message(write('name = "x"\n[fields.text]\nprocess = "toy"\n'))
    assert text == (
        "mine.toml: there is no [data] table. A recipe with fields needs the tables data, fields, "
        'denoiser, train, or extends = "<recipe>" to inherit them from another recipe.'
    )


def test_encode_without_encoder_is_refused(write):
    text = FIELDS_RECIPE.replace('[encoder]\nkind = "plain"\n', "")
    assert message(write(text)).endswith(
        '[fields.latent] encode = "text" needs an encoder. Add a table [encoder].'
    )


def test_fields_whose_weights_are_all_zero_are_refused(write):
    settings = tuple(f"fields.{name}.weight=0" for name in ("image", "text", "latent"))
    text = message(write(FIELDS_RECIPE), settings)
    assert text.startswith("--set fields.image.weight=0: the weights of all fields are 0")


def test_setting_of_a_field_on_a_text_recipe_points_to_the_tables_of_text(write):
    text = message(write(), ("fields.text.process=toy",))
    assert text.startswith(
        'mine.toml:9: a recipe with fields has no key or table "tokenizer". '
        'Did you mean "fields.NAME.tokenizer"? '
        "The recipe has fields because of --set fields.text.process=toy."
    )


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("[field.text]\nlength = 3", 'no key or table "field". Did you mean "fields"?'),
        (
            '[sample]\ntargets = ["joint"]',
            "Only a recipe with tables [fields.NAME] has this key.",
        ),
    ],
)
def test_text_recipe_with_a_table_or_key_of_fields_is_explained(write, extra, expected):
    assert expected in message(write(f"{RECIPE}\n{extra}\n"))


def test_message_about_inherited_field_names_both_recipe_files(write):
    write(FIELDS_RECIPE.replace("gamma = 2", "gama = 2"), "base.toml")
    text = message(write('extends = "base.toml"\n[fields.text]\nweight = 1.0', "child.toml"))
    assert re.match(r"base.toml:\d+ \(extended by child.toml\): \[fields.text.process\]", text)


def test_field_sampler_has_the_settings_of_the_recipe_unless_changed(recipe):
    assert configure_field_sampler(recipe, "text") == recipe.fields["text"].sampler
    assert configure_field_sampler(recipe, "text", "ancestral").component.name == "ancestral"
    with pytest.raises(ArgumentError, match=r"image, text, latent; got 'txt'. Did you mean"):
        configure_field_sampler(recipe, "txt")


def test_command_for_text_recipes_refuses_a_fields_recipe(write, recipe):
    text = read_recipe(write())
    assert require_text_recipe(text, "ddiff edit") is text
    with pytest.raises(
        RecipeError, match=r"ddiff edit needs a recipe of one text.*the fields image, text, latent"
    ):
        require_text_recipe(recipe, "ddiff edit")


def test_listing_of_core_has_the_keys_of_fields_recipes(toy, monkeypatch):
    monkeypatch.setattr("ddiff.recipe.listing.CORE", "toy")
    titles = [paragraph.splitlines()[0] for paragraph in list_plugin("toy").paragraphs]
    for title in (
        "[fields.NAME], keys of the engine:",
        "[evaluate] of a recipe with fields, keys of the engine:",
        '[judge] kind = "plain": ',
        '[objective] times, [evaluate] path and [sample] path kind = "shared": ',
    ):
        assert title in titles
    assert titles.count("[backend], keys of the engine:") == 1


def test_misspelt_field_gets_a_suggestion(write):
    with pytest.raises(RecipeError, match=r'\[fields\.imag\] has no process.*mean "image"'):
        read_recipe(write(FIELDS_RECIPE), ["fields.imag.weight=2"])
