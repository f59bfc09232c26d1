"""Messages about samplers name only samplers for the process of the run."""

import pytest

from ddiff.plugin.loader import load_plugins
from ddiff.plugin.sampler_lookup import find_sampler

PLUGIN = """
from ddiff import hookimpl

@hookimpl
def ddiff_register(registry):
    registry.add("sampler", "swap", "toy_parts:Swap")
    registry.add("sampler", "swap_vectors", "toy_parts:Vectors")
    registry.add("sampler", "swap_next", "toy_parts:Next")
    registry.add("sampler", "swap_broken", "toy_parts:Missing")
"""

PARTS = """
class Swap:
    def build(config): pass

class Vectors(Swap):
    states = "vectors"

class Next(Swap):
    states = frozenset()
"""


@pytest.fixture
def toy(distribution):
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": PLUGIN, "toy_parts": PARTS})


@pytest.mark.usefixtures("toy")
def test_undeclared_sampler_is_found_for_tokens_and_without_a_process():
    registry = load_plugins(["toy"])
    for states in ({"tokens"}, {"tokens", "vectors"}, set()):
        assert find_sampler(registry, "swap", states).name == "swap"
    assert find_sampler(registry, "swap_vectors", {"tokens", "vectors"}).name == "swap_vectors"


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("name", "states", "needed", "had"),
    [
        ("swap_vectors", {"tokens"}, "needs a process of vectors", "has a process of tokens"),
        ("swap_next", {"tokens"}, "needs a model without a process", "has a process of tokens"),
        ("swap_vectors", set(), "needs a process of vectors", "has no process"),
    ],
)
@pytest.mark.parametrize("plugins", [["toy"], []])
def test_sampler_for_other_runs_is_refused(name, states, needed, had, plugins, message):
    text = message(find_sampler, load_plugins(plugins), name, states)
    assert needed in text
    assert had in text
    assert "Add" not in text  # adding the plugin would not help


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("states", "present", "absent"),
    [
        ({"tokens"}, "swap", "ddim"),
        ({"tokens"}, "swap_broken", "swap_next"),
        ({"vectors"}, "ddim", "ancestral"),
        (set(), "swap_next", "ancestral"),
    ],
)
@pytest.mark.parametrize("plugins", [["toy"], []])
def test_unknown_sampler_message_names_suitable_ones(states, present, absent, plugins, message):
    text = message(find_sampler, load_plugins(plugins), "unknown", states)
    assert present in text
    assert absent not in text


@pytest.mark.usefixtures("toy")
def test_suitable_sampler_of_an_unlisted_plugin_names_the_plugin(message):
    assert 'Add "toy" to plugins' in message(find_sampler, load_plugins([]), "swap", {"tokens"})
    text = message(find_sampler, load_plugins([]), "swp", {"tokens"})
    assert 'Did you mean "swap"?' in text
    assert '"swap" with plugin "toy"' in text
