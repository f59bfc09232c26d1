"""Registry of components: registration, import on first use, and error messages."""

from __future__ import annotations

import pytest

from ddiff.plugin.loader import load_plugins
from ddiff.plugin.registry import KINDS, Members, NoKeys, Origin, Registry

HERE = Origin("toy", "toy_pkg", "toy-dist", "1.0")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("proces", "toy", "a:b"), 'Did you mean "process"?'),
        (("process", "two words", "a:b"), "must consist of letters"),
        (("process", "", "a:b"), "must consist of letters"),
        (("process", "toy", "toy_parts.Toy"), '"module:object"'),
        (("process", "toy", int), '"module:object"'),
    ],
)
def test_message_about_invalid_registration_names_the_python_package(arguments, expected, message):
    text = message(Registry(HERE).add, *arguments)
    assert expected in text
    assert "toy-dist 1.0" in text


def test_registry_refuses_a_name_registered_twice(message):
    registry = Registry(HERE)
    registry.add("process", "toy", "a:b")
    registry.add("sampler", "toy", "a:c")  # components of different kinds may have the same name
    assert 'registers the process "toy" twice' in message(registry.add, "process", "toy", "a:d")


def test_every_component_kind_documents_arguments_and_result_of_build():
    assert all("build(config" in line and "->" in line for line in KINDS.values())


def test_unknown_component_message_lists_and_suggests_names(distribution, message):
    modules = {"toy_pkg": register("kimura", "jukes")}
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, modules)
    text = message(load_plugins(["toy"]).component, "process", "kimra")
    assert 'no process "kimra"' in text
    assert 'Did you mean "kimura"?' in text
    assert "jukes, kimura" in text


def test_message_about_component_of_unlisted_plugin_names_the_plugin(distribution, message):
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": register("kimura")})
    text = message(load_plugins([]).component, "process", "kimura")
    assert "toy-dist 1.0" in text
    assert 'Add "toy" to plugins' in text


def test_unknown_component_message_suggests_component_of_unlisted_plugin(distribution, message):
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": register("kimura")})
    text = message(load_plugins([]).component, "process", "kimra")
    assert 'Did you mean "kimura"?' in text
    assert '"kimura" with plugin "toy"' in text


@pytest.mark.parametrize(
    ("target", "source", "expected"),
    [
        ("toy_missing:Toy", "", "No module named 'toy_missing'"),
        ("toy_parts:Tow", "class Toy: pass", "has no attribute 'Tow'"),
        ("toy_parts:Toy", "import not_there", "toy_parts.py, line 1"),
        ("toy_parts:Toy", "class Toy: pass", "has no build"),
        (
            "toy_parts:Toy",
            "class Toy:\n    class Config: pass\n    def build(): pass",
            "ddiff.ComponentConfig",
        ),
    ],
)
def test_message_about_failed_component_import_names_the_package(
    distribution, target, source, expected, message
):
    modules = {"toy_pkg": register("toy", target=target), "toy_parts": source}
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, modules)
    text = message(load_plugins(["toy"]).component("process", "toy").load)
    assert expected in text
    assert "toy-dist 1.0" in text


def test_component_with_only_a_build_method_gets_default_members():
    class Plain:
        @staticmethod
        def build(config):
            return None

    members = Members.collect(Plain)
    assert members.build is Plain.build
    assert (members.Config, members.slots, members.writes) == (NoKeys, None, ())
    assert not members.is_distributed
    assert members.reads(NoKeys()) == ()
    assert members.preview(NoKeys()) is None


def test_component_registered_by_import_path_may_be_a_nested_class(distribution):
    source = "class Outer:\n    class Inner:\n        def build(config): pass"
    modules = {"toy_pkg": register("toy", target="toy_parts:Outer.Inner"), "toy_parts": source}
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, modules)
    assert load_plugins(["toy"]).component("process", "toy").load().__name__ == "Inner"


def register(*names: str, target: str = "toy_parts:Toy") -> str:
    lines = [f"    registry.add('process', {name!r}, {target!r})" for name in names]
    return "\n".join(
        ["from ddiff import hookimpl", "@hookimpl", "def ddiff_register(registry):", *lines]
    )
