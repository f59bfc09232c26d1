"""`ddiff check NAME` on components of plugins: reports and exit codes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ddiff.errors import ArgumentError, PluginError, RecipeError
from ddiff.testing.check_command import check_component

PLUGIN = """
from ddiff import hookimpl

@hookimpl
def ddiff_register(registry):
    registry.add("process", "swap", "swapping.process:Swap")
    registry.add("process", "swap_broken", "swapping.process:Broken")
    registry.add("process", "swap_picky", "swapping.process:Picky")
    registry.add("process", "fog", "swapping.process:Fog")
    registry.add("process", "swap_named", "swapping.process:Named")
    registry.add("process", "swap_uneven", "swapping.process:Uneven")
"""

PROCESS = """
import torch
from ddiff import ArgumentError, ComponentConfig, DenseProcess, FlatVocabulary, PositiveFloat
from ddiff import Flow, GaussianProcess

class Swap(DenseProcess):
    class Config(ComponentConfig):
        rate: PositiveFloat = 1.0

    @classmethod
    def build(cls, config, *, vocabulary):
        if vocabulary.num_states > 2:
            raise ArgumentError(f"swap needs two states; got {vocabulary}.")
        rate = config.rate
        return cls(vocabulary, torch.tensor([[-rate, rate], [2 * rate, -2 * rate]]))

    @classmethod
    def examples(cls):
        return [cls.build(cls.Config(), vocabulary=FlatVocabulary(2, mask=False))]

class Broken(Swap):
    def decode_nll(self, prediction, x0, zt, t):
        return -prediction.log_prob(x0)

class Picky(DenseProcess):
    @classmethod
    def build(cls, config, *, vocabulary):
        raise ArgumentError("nothing is good enough.")

class Named(Swap):
    example_settings = ({"rate": 2.0}, {"rate": 0.5})

    @classmethod
    def examples(cls):
        vocabulary = FlatVocabulary(2, mask=False)
        return [cls.build(cls.Config(**one), vocabulary=vocabulary) for one in cls.example_settings]

class Uneven(Swap):
    example_settings = ({}, {})

class Fog:
    states = frozenset({"vectors"})

    class Config(ComponentConfig):
        largest: PositiveFloat = 9.0

    @classmethod
    def build(cls, config, *, width):
        return GaussianProcess(Flow(), width, config.largest)
"""


@pytest.fixture
def swap_plugin(distribution: Callable[..., Path]) -> None:
    modules = {"swapping_plugin": PLUGIN, "swapping.__init__": "", "swapping.process": PROCESS}
    distribution("swapping", "1.0", {"swapping": "swapping_plugin"}, modules)


@pytest.mark.usefixtures("swap_plugin")
def test_check_command_uses_examples_of_plugin_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_component("swap", []) == 0
    out = capsys.readouterr().out
    assert "bound: -ln p(x) for a constant denoiser" in out
    assert "swap 1 on 2" in out
    assert "on 1 instance(s), 0 broken" in out


@pytest.mark.usefixtures("swap_plugin")
def test_check_command_builds_components_with_the_given_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check_component("swap", ["rate=3.0"]) == 0
    assert "swap 1 on 2" in capsys.readouterr().out


@pytest.mark.usefixtures("swap_plugin")
def test_check_command_prints_the_settings_of_each_instance(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check_component("swap_named", []) == 0
    out = capsys.readouterr().out
    assert "swap_named 1 on 2  rate=2.0\nswap_named 2 on 2  rate=0.5\n" in out
    assert check_component("swap_named", ["rate=3.0"]) == 0
    assert "swap_named 1 on 2  rate=3.0\n" in capsys.readouterr().out


@pytest.mark.usefixtures("swap_plugin")
def test_check_command_refuses_settings_without_an_example() -> None:
    with pytest.raises(PluginError, match="2 example_settings and 1 examples"):
        check_component("swap_uneven", [])


@pytest.mark.usefixtures("swap_plugin")
def test_check_command_reports_a_failed_check_and_returns_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check_component("swap_broken", []) == 1
    out = capsys.readouterr().out
    assert '"override = derived: decode_nll" is broken: error' in out
    assert "largest at x0 = " in out


MIXED = """
from ddiff import hookimpl

@hookimpl
def ddiff_register(registry):
    registry.add("process", "swap", "swapping.process:Swap")
    registry.add("process", "swap_picky", "swapping.process:Picky")
    registry.add("time_rule", "flat_again", "ddiff_core.objectives:Flat")
    registry.add("backbone", "reader", "mixed_backbone:Reader")
"""

BACKBONE = """
from ddiff_dit.dit import DiT

class Reader(DiT):
    @classmethod
    def build(cls, config, *, vocabulary, length, process):
        assert process.vocabulary is vocabulary
        return super().build(config, vocabulary=vocabulary, length=length)
"""


@pytest.mark.usefixtures("swap_plugin")
def test_check_command_checks_every_kind_of_a_plugin(
    distribution: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A component that rejects all small instances is listed, and the others are checked."""
    modules = {"mixed_plugin": MIXED, "mixed_backbone": BACKBONE}
    distribution("mixed", "1.0", {"mixed": "mixed_plugin"}, modules)
    assert check_component("mixed", []) == 0
    out = capsys.readouterr().out
    assert "times: within [0, 1], speeds not negative" in out
    assert "denoiser: padding does not matter" in out
    assert "kernel" in out
    assert "process swap_picky: ddiff check: the process" in out
    assert "nothing is good enough" in out
    assert "0 broken. 1 component(s) not checked." in out


@pytest.mark.usefixtures("swap_plugin")
def test_check_command_builds_processes_of_vectors_by_their_width(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check_component("fog", ["largest=7.0"]) == 0
    out = capsys.readouterr().out
    assert "posterior: eta = 0 with the true vector is exact in one step" in out
    assert "on 2 instance(s), 0 broken" in out


@pytest.mark.parametrize("name", ["levelwise", "flat"])
def test_check_command_accepts_heads_and_time_rules(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_component(name, []) == 0
    assert "0 broken" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dit", "ddit"])
def test_check_command_checks_backbone_as_denoiser(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_component(name, ["width=16", "layers=1", "heads=2"]) == 0
    assert "padding does not matter" in capsys.readouterr().out


def test_check_command_passes_mdlm_and_hdlm(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_component("mdlm", []) == 0
    assert check_component("hdlm", ["gamma=0.5", "xi=0.9"]) == 0
    assert capsys.readouterr().out.count("0 broken") == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hdml", 'Did you mean "hdlm"'),
        ("adamw", 'the optimizer "adamw" .* has no laws to check'),
    ],
)
def test_check_command_rejects_unknown_and_unsupported_names(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        check_component(name, [])


def test_check_command_rejects_unknown_setting() -> None:
    with pytest.raises(RecipeError, match="gama"):
        check_component("hdlm", ["gama=0.5"])


@pytest.mark.parametrize(
    ("name", "settings", "law"),
    [
        ("letters", [], "tokenizer: saving and loading preserve it"),
        ("clusters", ["sizes=[4]"], "vocabulary: ancestors follow parents"),
        ("markov", [], "dataset: two builds give the same data"),
        ("standard", [], "normalizer: loading restores the map"),
        ("shared", [], "path: draws are unbiased"),
        ("strings", [], "judge: judging twice gives the same findings"),
    ],
)
def test_check_command_checks_components_that_read_data(
    name: str, settings: list[str], law: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_component(name, settings) == 0
    out = capsys.readouterr().out
    assert law in out
    assert "0 broken" in out


def test_check_command_leaves_out_a_judge_of_the_data_set_with_its_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The data set "digits" is checked, and the judge "digits" needs that data."""
    assert check_component("digits", []) == 0
    assert "dataset: columns are as preview describes them" in capsys.readouterr().out


def test_check_command_refuses_an_encoder_that_needs_a_recipe() -> None:
    with pytest.raises(ArgumentError, match="needs the tokenizer of a recipe"):
        check_component("cooccurrence", [])


DATA = """
from ddiff import hookimpl

@hookimpl
def ddiff_register(registry):
    registry.add("dataset", "counted", "data_sets:Counted")
    registry.add("dataset", "moody", "data_sets:Moody")
    registry.add("fields_dataset", "fussy", "data_sets:Fussy")
    registry.add("normalizer", "sullen", "data_sets:Sullen")
"""
DATA_SETS = """
from ddiff import ArgumentError, Documents, documents_from_texts

class Counted:
    builds = 0

    @classmethod
    def build(cls, config, *, length):
        cls.builds += 1
        texts = documents_from_texts(["a text", "another text"])
        return Documents(texts, texts)

class Moody(Counted):
    builds = 0

    @classmethod
    def build(cls, config, *, length):
        if cls.builds == 1:
            raise ArgumentError("moody builds only once.")
        return super().build(config, length=length)

class Fussy:
    @staticmethod
    def build(config):
        raise ArgumentError("fussy needs a file.")

    @staticmethod
    def preview(config):
        return {}

class Sullen:
    @staticmethod
    def build(config, *, chunks):
        raise ArgumentError("sullen needs other vectors.")
"""


@pytest.fixture
def data_plugin(distribution: Callable[..., Path]) -> None:
    modules = {"data_plugin": DATA, "data_sets": DATA_SETS}
    distribution("data-sets", "1.0", {"data_sets_of_a_test": "data_plugin"}, modules)


@pytest.mark.usefixtures("data_plugin")
def test_check_command_builds_a_data_set_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_component("counted", []) == 0
    assert "dataset: two builds give the same data" in capsys.readouterr().out
    assert importlib.import_module("data_sets").Counted.builds == 2


@pytest.mark.usefixtures("data_plugin")
def test_check_command_lists_data_sets_and_normalizers_that_refuse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A data set that fails at its second build is broken, and the others are not checked."""
    assert check_component("data_sets_of_a_test", []) == 1
    out = capsys.readouterr().out
    assert "fields_dataset fussy: fussy needs a file." in out
    assert "normalizer sullen: sullen needs other vectors." in out
    assert 'moody: "the component accepts the inputs of the checks" is broken' in out
    assert "moody builds only once." in out
    assert "1 broken. 2 component(s) not checked." in out
