"""Messages about errors in a recipe: file, line, key, expected value and given value."""

from __future__ import annotations

import pytest

from ddiff.errors import ArgumentError, RecipeError
from ddiff.plugin.loader import load_plugins
from ddiff.recipe.files import find_shipped_recipes
from ddiff.recipe.resolve import configure_component, read_recipe
from ddiff.recipe.schema import TEXT

from .conftest import RECIPE


def message(name: str, settings: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(name, settings)
    assert "\n" not in str(caught.value), "an error message must be one paragraph"
    return str(caught.value)


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


def test_unknown_key_message_names_line_component_and_valid_keys(write):
    path = write(RECIPE.replace("gamma = 2", "gama = 2"), "recipes/mine.toml")
    assert message(path) == (
        'recipes/mine.toml:21: [process] has no key "gama" for kind "toy" (from toy_pkg, '
        "toy-dist 1.0). "
        'Did you mean "gamma"? Valid keys: gamma, xi, clock, note.'
    )


REPLACED = [
    ("gamma = 2", 'gamma = "2"', '[process] gamma must be a number; got "2" (a string).'),
    ("gamma = 2", "gamma = true", "[process] gamma must be a number; got true."),
    ("gamma = 2", "gamma = -1.0", "[process] gamma must be greater than 0; got -1.0."),
    ("gamma = 2", "gamma = nan", "[process] gamma must be a finite number; got NaN."),
    ("gamma = 2", "gamma = 13", "[process] gamma: thirteen brings bad luck."),
    ("gamma = 2", "xi = 0", "[process] xi must be greater than 0; got 0"),
    ("gamma = 2", "xi = 1.5", "[process] xi must be less than or equal to 1; got 1.5"),
    (
        "gamma = 2",
        "clock.rates = [1.0, 0.0]",
        "[process] clock.rates[1] must be greater than 0; got 0.0.",
    ),
    ("gamma = 2", "clock.rats = [1.0]", '[process.clock] has no key "rats"'),
    ("gamma = 2", "xi = [1.0, 2]", "[process] xi[1] must be less than or equal to 1; got 2"),
    ("gamma = 2", 'xi = "one"', '[process] xi must be a number or a list; got "one" (a string).'),
    ("gamma = 2", "xi = 1.0\nnote = 3", "[process] note must be a string in quotes; got 3."),
    ("gamma = 2", "clock = 3", "[process] clock must be a table; got 3."),
    (
        "    8,\n",
        '    "eight",\n',
        '[vocabulary] sizes[1] must be an integer; got "eight" (a string).',
    ),
    ("length = 16", "length = 0", "[data] length must be greater than 0; got 0."),
    ("length = 16", "length = 16.5", "[data] length must be an integer; got 16.5."),
    (
        "length = 16",
        "lenght = 16",
        '[data] has no key "lenght" for kind "plain" (from toy_pkg, toy-dist 1.0). '
        'Did you mean "length"?',
    ),
    ("length = 16", "", '[data] needs the key "length"'),
    (
        "steps = 10",
        "stepps = 10",
        '[train] has no key "stepps". Did you mean "steps"? Valid keys: optimizer, steps, batch,',
    ),
    (
        "steps = 10",
        'steps = 10\nschedule = "cosin"',
        'must be "cosine" or "constant"; got "cosin" (a string). Did you mean "cosine"?',
    ),
    (
        "steps = 10",
        "steps = 10\naccumulate = 3",
        "batch must be a multiple of accumulate; got batch = 4, accumulate = 3.",
    ),
    (
        'name = "mine"',
        'name = "mine"\nevaluate.weights = "ema"',
        '[evaluate] weights = "ema" needs a moving average of the weights, but [train] ema is 0. '
        "Set [train] ema",
    ),
    (
        "steps = 10",
        'steps = 10\noptimizer = {kind = "muon", lrr = 1.0}',
        '[train.optimizer] has no key "lrr" for kind "muon"',
    ),
    (
        "steps = 10",
        "steps = 10\noptimizer = 3",
        "train.optimizer must be a table, or the name of the optimizer in quotes; got 3.",
    ),
    ('name = "mine"', "name = 7", "the recipe name must be a string in quotes; got 7."),
    *(
        (
            'name = "mine"',
            f"name = '{path}'",
            "the recipe name: a name must not be a path or contain a slash",
        )
        for path in ("../mine", "a/b", "..", "a\\b")
    ),
    (
        'name = "mine"',
        'name = "mine"\nseed = -1',
        "the recipe seed must be greater than or equal to 0; got -1.",
    ),
    (
        'name = "mine"',
        'name = "mine"\nsede = 1',
        'a recipe has no key or table "sede". Did you mean "seed"?',
    ),
    (
        'name = "mine"',
        'name = "mine"\nprocesss = 1',
        'a recipe has no key or table "processs". Did you mean "process"?',
    ),
    ('name = "mine"', 'name = "mine"\nsample = 1', "sample must be a table; got 1."),
    (
        'name = "mine"',
        'name = "mine"\nextends = ["a", "b"]',
        "extends must be the path or name of one recipe",
    ),
    ('plugins = ["toy"]', 'plugins = ["tyo"]', 'There is no plugin "tyo". Did you mean "toy"?'),
    ('plugins = ["toy"]', 'plugins = "toy"', "the recipe plugins must be a list"),
    (
        'kind = "toy"',
        'kind = "tyo"',
        '[process] kind = "tyo": There is no process "tyo". Did you mean "toy"? '
        "Available: choosy, halving, normal, toy",
    ),
    (
        'kind = "toy"',
        "kind = 3",
        "[process] needs a kind, the name of the process in quotes; got 3. "
        "Available: choosy, halving, normal, toy.",
    ),
    (
        'kind = "toy"',
        "xi = 1.0",
        "[process] needs a kind, the name of the process in quotes. "
        "Available: choosy, halving, normal, toy.",
    ),
    (
        'head = "tied"',
        'head = "tide"',
        '[denoiser.head] kind = "tide": There is no head "tide". Did you mean "tied"?',
    ),
]


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    REPLACED,
    ids=[wrong.strip().rpartition("\n")[2] or "nothing" for _, wrong, _ in REPLACED],
)
def test_message_about_wrong_key_or_value_names_file_and_line(write, right, wrong, expected):
    text = RECIPE.replace(right, wrong)
    assert text != RECIPE
    written = message(write(text))
    assert expected in written
    place, _, _ = written.partition(": ")
    file, _, line = place.partition(":")
    assert file == "mine.toml"
    last_line_of_the_change = line_of(text, wrong or "[data]") + wrong.strip().count("\n")
    header = {"batch must": "[train]", "needs the key": "[data]", "quotes. Available": "[process]"}
    around = [line_of(text, table) for sign, table in header.items() if sign in written]
    assert int(line) in (around or [last_line_of_the_change])


def test_missing_table_message_lists_all_required_tables(write):
    text = message(write(RECIPE.replace('[tokenizer]\nkind = "plain"\n', "")))
    assert text.startswith(
        "mine.toml: there is no [tokenizer] table. "
        "A recipe needs the tables data, tokenizer, vocabulary, denoiser, train, or extends"
    )


def test_missing_key_message_names_key_and_type(write):
    text = message(write(RECIPE.replace("sizes = [\n    64,\n    8,\n]\n", "")))
    assert text.startswith(
        'mine.toml:12: [vocabulary] needs the key "sizes" for kind "clusters" '
        "(from toy_pkg, toy-dist 1.0)"
    )
    assert "tuple[int, ...]" in text
    assert 'the recipe needs the key "name"' in message(write(RECIPE.replace('name = "mine"', "")))


@pytest.mark.parametrize(
    "broken", ["gamma = ", "gamma = [1", "gamma 2", 'gamma = "2', "gamma = 2\ngamma = 3", "[data]"]
)
def test_invalid_toml_message_names_the_line(write, broken):
    text = message(write(RECIPE.replace("gamma = 2", broken)))
    assert "the text is not valid TOML: " in text
    line = text.partition(": ")[0].removeprefix("mine.toml:")
    assert line == "mine.toml" or int(line) >= 21


def test_recipe_that_is_not_utf8_is_refused(write, tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in message("binary.toml")


def test_missing_file_message_suggests_a_shipped_recipe(write):
    nearest = sorted(find_shipped_recipes())[0]
    for wrong in (nearest[:-1], f"recipes/{nearest[:-1]}.toml", f"{nearest}.toml"):
        assert (
            f"{wrong}: there is no such file and no shipped recipe of that name. "
            f'Did you mean "{nearest}"?' in message(wrong)
        )
    assert "is a directory" in message(".")
    assert "cannot be read" in message("memory://nowhere.toml")


def test_message_about_missing_base_recipe_names_extending_file(write):
    text = message(write('name = "x"\nextends = "mone.toml"'))
    assert text.startswith("mine.toml:2: extends mone.toml: there is no such file")


def test_message_about_key_given_by_set_option_names_the_option(write):
    assert message(write(), ("process.gama=3",)).startswith(
        '--set process.gama=3: [process] has no key "gama"'
    )
    assert message(write(), ("vocabulary.sizes=[1, 2.5]",)).startswith(
        "--set vocabulary.sizes=[1, 2.5]: [vocabulary] sizes[1]"
    )
    assert message(write(), ("train.steps=none",)).startswith(
        "--set train.steps=none: [train] steps must be an integer"
    )
    assert message(write(), ("train.optimizer=mun",)).startswith(
        "--set train.optimizer=mun: [train.optimizer]"
    )


def test_message_about_inherited_key_names_both_recipe_files(write):
    write(RECIPE.replace("gamma = 2", "gama = 2"), "base.toml")
    text = message(write('extends = "base.toml"\n[process]\nxi = 1.0', "child.toml"))
    assert text.startswith('base.toml:21 (extended by child.toml): [process] has no key "gama"')


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("steps",), "expected key=value"),
        (("process.gamma=.5",), "a number needs digits on both sides of the point; got .5"),
        (("=3",), "expected key=value"),
        (("train..steps=3",), "Write a dotted key and a TOML value"),
        (("vocabulary.sizes=[1, 2",), "Write a dotted key and a TOML value"),
        (("process.note='half",), "Write a dotted key and a TOML value"),
        (("train=3", "train.steps=4"), "gives train a value that is not a table"),
        (("train.steps=3", "train=4"), "train must be a table; got 4"),
        (("extends=other",), "extends is only valid in a recipe file"),
    ],
)
def test_malformed_set_option_is_refused_with_a_reason(write, settings, expected):
    text = message(write(), settings)
    assert text.startswith("--set ")
    assert expected in text


def test_unknown_table_message_lists_all_top_level_names(write):
    text = message(write(RECIPE + "\n[zzz]\n"))
    assert text.startswith(f"mine.toml:{RECIPE.count(chr(10)) + 2}: ")
    assert text.endswith(f"Valid names: {', '.join(TEXT.top_level())}.")


@pytest.mark.parametrize("settings", ["train.steps=3", {"train.steps": 3}])
def test_read_recipe_refuses_settings_that_are_not_a_list(write, settings):
    with pytest.raises(ArgumentError, match="settings must be a list"):
        read_recipe(write(), settings)


def test_missing_plugin_message_contains_the_pip_command(write):
    assert "pip install -e" in message(write(RECIPE.replace('["toy"]', '["kimura"]')))


def test_error_while_building_a_component_begins_with_the_recipe_table(write):
    recipe = read_recipe(write(), ("denoiser.head=choosy_head",))
    with pytest.raises(ArgumentError, match=r"^\[denoiser.head\]: width must be 3; got 4\.$"):
        recipe.head.build(vocabulary=None, width=4)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "gama=2",
            'the process "toy" (from toy_pkg, toy-dist 1.0) has no key "gama". '
            'Did you mean "gamma"?',
        ),
        (
            "gamma=-1",
            'the process "toy" (from toy_pkg, toy-dist 1.0) gamma must be greater than 0; got -1.',
        ),
        ("process.gamma=2", "outside a recipe there are no tables"),
    ],
)
def test_message_about_settings_without_recipe_names_the_component(toy, setting, expected):
    with pytest.raises(RecipeError) as caught:
        configure_component(load_plugins(["toy"]).component("process", "toy"), [setting])
    assert expected in str(caught.value)
    assert "the recipe" not in str(caught.value)
