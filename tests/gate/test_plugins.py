"""The gate loads what is asked for, and explains everything else."""

from __future__ import annotations

import sys

import pytest

from ddiff.errors import PluginError
from ddiff.plugin import loader as plugin
from ddiff.plugin.loader import installed_plugins, load_plugins, survey_plugins

HOOK = """
from ddiff import hookimpl

@hookimpl
def ddiff_register(registry):
    registry.add({kind!r}, {name!r}, {target!r})
"""


def hook(kind: str = "process", name: str = "toy", target: str = "toy_parts:Toy") -> str:
    return HOOK.format(kind=kind, name=name, target=target)


def message(call, *arguments) -> str:
    with pytest.raises(PluginError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text, "an error is one paragraph"
    return text


def test_a_strangers_plugin_comes_through_the_same_table_as_the_first_party_ones(distribution):
    distribution("toy-dist", "1.5", {"toy": "toy_pkg"}, {"toy_pkg": hook()})
    component = load_plugins(["toy"]).component("process", "toy")
    assert (component.plugin, component.distribution, component.version) == (
        "toy",
        "toy-dist",
        "1.5",
    )
    own = load_plugins([]).component("sampler", "ancestral")
    assert (own.plugin, own.distribution) == ("core", "discrete-diffusion")


def test_only_the_plugins_that_are_asked_for_are_imported_and_their_components_not_at_all(
    distribution,
):
    modules = {
        "toy_pkg": hook(),
        "toy_parts": "raise RuntimeError('imported too early')",
        "other_pkg": hook(name="other"),
    }
    distribution("toy-dist", "1.0", {"toy": "toy_pkg", "other": "other_pkg"}, modules)
    assert {"toy", "other"} <= set(installed_plugins())
    load_plugins(["toy"])
    assert "toy_pkg" in sys.modules
    assert not {"other_pkg", "toy_parts"} & set(sys.modules)


def test_an_unknown_plugin_names_the_nearest_and_what_is_installed(distribution):
    distribution("toy-dist", "1.0", {"kimura": "toy_pkg"}, {"toy_pkg": hook()})
    text = message(load_plugins, ["kimra"])
    assert 'no plugin "kimra"' in text
    assert 'Did you mean "kimura"?' in text
    assert "core, " in text


def test_two_distributions_that_claim_one_plugin_name_are_both_named(distribution):
    distribution("first-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": hook()})
    distribution("second-dist", "2.0", {"toy": "toy_two"}, {"toy_two": hook()})
    text = message(load_plugins, ["toy"])
    assert 'claim the plugin name "toy"' in text
    assert "first-dist 1.0" in text
    assert "second-dist 2.0" in text


def test_nobody_can_take_the_place_of_the_engines_own_components(distribution):
    distribution("thief", "1.0", {plugin.CORE: "thief_pkg"}, {"thief_pkg": hook()})
    text = message(load_plugins, [])
    assert "thief 1.0" in text
    assert "discrete-diffusion" in text


def test_two_plugins_that_claim_one_component_are_both_named_and_neither_is_half_registered(
    distribution,
):
    distribution("first-dist", "1.0", {"one": "toy_one"}, {"toy_one": hook(name="same")})
    both = hook(name="alone") + "    registry.add('process', 'same', 'toy_parts:Toy')\n"
    distribution("second-dist", "2.0", {"two": "toy_two"}, {"toy_two": both})
    text = message(load_plugins, ["one", "two"])
    assert 'process "same"' in text
    assert "first-dist 1.0" in text
    assert "second-dist 2.0" in text
    registry, reports = survey_plugins()
    errors = {report.plugin.name: report.error for report in reports}
    assert errors["one"] is None
    assert "first-dist 1.0" in str(errors["two"])
    assert "alone" not in registry.names("process")


@pytest.mark.parametrize(
    "source", ["import does_not_exist", "this is no Python", "raise ValueError('sulking')"]
)
def test_a_plugin_that_does_not_import_names_its_distribution_and_reason_and_the_others_still_load(
    distribution, source
):
    distribution("broken-dist", "0.3", {"broken": "broken_pkg"}, {"broken_pkg": source})
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": hook()})
    assert load_plugins(["toy"]).component("process", "toy")
    text = message(load_plugins, ["broken"])
    assert "broken-dist 0.3" in text
    assert any(
        reason in text
        for reason in ("No module named 'does_not_exist'", "SyntaxError", "ValueError: sulking")
    )
    registry, reports = survey_plugins()
    assert registry.component("process", "toy")
    assert [report.plugin.name for report in reports if "broken-dist" in str(report.error)] == [
        "broken"
    ]


def test_a_hook_that_does_not_exist_is_named_with_the_nearest(distribution):
    source = hook().replace("ddiff_register", "ddiff_registr")
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": source})
    text = message(load_plugins, ["toy"])
    assert 'a hook "ddiff_registr", which does not exist' in text
    assert 'Did you mean "ddiff_register"?' in text


def test_a_second_misspelt_hook_does_not_hide_behind_a_good_one(distribution):
    source = hook() + "\n@hookimpl\ndef ddiff_unregister(registry): pass\n"
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": source})
    assert '"ddiff_unregister", which does not exist' in message(load_plugins, ["toy"])


def test_a_plugin_without_a_marked_hook_is_told_about_the_mark(distribution):
    source = "def ddiff_register(registry): registry.add('process', 'toy', 'toy_parts:Toy')"
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": source})
    assert "@ddiff.hookimpl" in message(load_plugins, ["toy"])


@pytest.mark.parametrize("arguments", ["registry, more", "registrar", ""])
def test_a_hook_with_wrong_arguments_is_shown_the_right_ones(distribution, arguments):
    source = f"from ddiff import hookimpl\n@hookimpl\ndef ddiff_register({arguments}): pass\n"
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": source})
    text = message(load_plugins, ["toy"])
    assert "wrong arguments" in text
    assert "def ddiff_register(registry)" in text


def test_a_hook_that_raises_names_the_plugin_and_the_line(distribution):
    source = "from ddiff import hookimpl\n@hookimpl\ndef ddiff_register(registry):\n    1 / 0\n"
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": source})
    text = message(load_plugins, ["toy"])
    assert "ZeroDivisionError" in text
    assert "toy_pkg.py, line 4" in text


def test_the_first_party_plugins_all_register():
    broken = [report.error for report in survey_plugins().reports if report.error]
    assert not broken
