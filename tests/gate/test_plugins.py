"""Plugin loader: loads the listed plugins, and reports plugins that cannot be loaded."""

from __future__ import annotations

import sys

import pytest

from ddiff.plugin import loader as plugin
from ddiff.plugin.loader import find_installed_plugins, load_plugins, survey_plugins

HOOK = """
from ddiff import hookimpl

@hookimpl
def ddiff_register(registry):
    registry.add({kind!r}, {name!r}, {target!r})
"""


def hook(kind: str = "process", name: str = "toy", target: str = "toy_parts:Toy") -> str:
    return HOOK.format(kind=kind, name=name, target=target)


def test_external_plugin_loads_like_a_first_party_plugin(distribution):
    distribution("toy-dist", "1.5", {"toy": "toy_pkg"}, {"toy_pkg": hook()})
    component = load_plugins(["toy"]).component("process", "toy")
    assert (component.plugin, component.distribution, component.version) == (
        "toy",
        "toy-dist",
        "1.5",
    )
    own = load_plugins([]).component("sampler", "ancestral")
    assert (own.plugin, own.distribution) == ("core", "discrete-diffusion")


def test_load_plugins_imports_only_listed_plugins_and_no_components(
    distribution,
):
    modules = {
        "toy_pkg": hook(),
        "toy_parts": "raise RuntimeError('imported too early')",
        "other_pkg": hook(name="other"),
    }
    distribution("toy-dist", "1.0", {"toy": "toy_pkg", "other": "other_pkg"}, modules)
    assert {"toy", "other"} <= set(find_installed_plugins())
    load_plugins(["toy"])
    assert "toy_pkg" in sys.modules
    assert not {"other_pkg", "toy_parts"} & set(sys.modules)


def test_unknown_plugin_message_suggests_and_lists_plugin_names(distribution, message):
    distribution("toy-dist", "1.0", {"kimura": "toy_pkg"}, {"toy_pkg": hook()})
    text = message(load_plugins, ["kimra"])
    assert 'no plugin "kimra"' in text
    assert 'Did you mean "kimura"?' in text
    assert "core, " in text


def test_duplicate_plugin_message_names_both_python_distributions(distribution, message):
    distribution("first-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": hook()})
    distribution("second-dist", "2.0", {"toy": "toy_two"}, {"toy_two": hook()})
    text = message(load_plugins, ["toy"])
    assert 'claim the plugin name "toy"' in text
    assert "first-dist 1.0" in text
    assert "second-dist 2.0" in text


def test_external_plugin_named_core_is_refused(distribution, message):
    distribution("thief", "1.0", {plugin.CORE: "thief_pkg"}, {"thief_pkg": hook()})
    text = message(load_plugins, [])
    assert "thief 1.0" in text
    assert "discrete-diffusion" in text


def test_conflicting_plugin_is_refused_and_registers_no_component(distribution, message):
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
def test_plugin_that_fails_to_import_is_reported_and_others_load(distribution, source, message):
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


def test_unknown_hook_message_suggests_the_correct_name(distribution, message):
    source = hook().replace("ddiff_register", "ddiff_registr")
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": source})
    text = message(load_plugins, ["toy"])
    assert 'a hook "ddiff_registr", which does not exist' in text
    assert 'Did you mean "ddiff_register"?' in text


def test_plugin_with_a_correct_and_an_unknown_hook_is_refused(distribution, message):
    source = hook() + "\n@hookimpl\ndef ddiff_unregister(registry): pass\n"
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": source})
    assert '"ddiff_unregister", which does not exist' in message(load_plugins, ["toy"])


def test_hook_without_hookimpl_decorator_is_refused(distribution, message):
    source = "def ddiff_register(registry): registry.add('process', 'toy', 'toy_parts:Toy')"
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": source})
    assert "@ddiff.hookimpl" in message(load_plugins, ["toy"])


@pytest.mark.parametrize("arguments", ["registry, more", "registrar", ""])
def test_message_about_wrong_hook_arguments_gives_the_signature(distribution, arguments, message):
    source = f"from ddiff import hookimpl\n@hookimpl\ndef ddiff_register({arguments}): pass\n"
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": source})
    text = message(load_plugins, ["toy"])
    assert "wrong arguments" in text
    assert "def ddiff_register(registry)" in text


def test_message_about_failing_hook_names_file_and_line(distribution, message):
    source = "from ddiff import hookimpl\n@hookimpl\ndef ddiff_register(registry):\n    1 / 0\n"
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": source})
    text = message(load_plugins, ["toy"])
    assert "ZeroDivisionError" in text
    assert "toy_pkg.py, line 4" in text


def test_all_first_party_plugins_load():
    broken = [report.error for report in survey_plugins().reports if report.error]
    assert not broken


# ---------------------------------------------------------------------- version of the interface


def declare(version: object) -> str:
    """Return the source of a plugin that declares a version of the plugin interface."""
    return f"DDIFF_API = {version!r}\n" + hook()


@pytest.mark.parametrize(
    "source", [hook(), declare(plugin.API_VERSION), declare(plugin.OLDEST_API)]
)
def test_plugin_of_a_supported_api_version_or_without_one_loads(distribution, source):
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": source})
    assert load_plugins(["toy"]).component("process", "toy")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (plugin.API_VERSION + 1, "upgrade ddiff, or install an older version of toy-dist."),
        (plugin.OLDEST_API - 1, "upgrade toy-dist, or install an older version of ddiff."),
    ],
)
def test_message_about_unsupported_api_version_says_what_to_upgrade(
    distribution, message, version, expected
):
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": declare(version)})
    text = message(load_plugins, ["toy"])
    assert f"was written for version {version} of the plugin interface" in text
    assert text.endswith(expected)
    assert text.count(". ") == 0  # one sentence


@pytest.mark.parametrize("version", ["1", 1.0, True])
def test_api_version_that_is_no_whole_number_is_refused(distribution, message, version):
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": declare(version)})
    assert "must be a whole number, the version of the plugin interface" in message(
        load_plugins, ["toy"]
    )


def test_too_new_plugin_is_reported_and_other_plugins_load(distribution):
    modules = {"new_pkg": declare(plugin.API_VERSION + 1), "toy_pkg": hook(name="old")}
    distribution("toy-dist", "1.0", {"new": "new_pkg", "toy": "toy_pkg"}, modules)
    registry, reports = survey_plugins()
    errors = {report.plugin.name: report.error for report in reports}
    assert "upgrade ddiff" in str(errors["new"])
    assert errors["toy"] is None
    assert "old" in registry.names("process")


def test_api_version_explains_an_import_that_this_ddiff_lacks(distribution, message):
    importing = "from ddiff import DoesNotExistYet\n"
    newer = f"DDIFF_API = {plugin.API_VERSION + 1}  # a comment\n{importing}{hook()}"
    modules = {"new_pkg": newer, "same_pkg": importing + declare(plugin.API_VERSION)}
    distribution("toy-dist", "1.0", {"new": "new_pkg", "same": "same_pkg"}, modules)
    assert "upgrade ddiff" in message(load_plugins, ["new"])
    assert "DoesNotExistYet" in message(load_plugins, ["same"])  # the version is right
