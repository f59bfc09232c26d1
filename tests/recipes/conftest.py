"""Toy plugin with a component of every kind, which imports no torch, and a recipe for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddiff.plugin import loader as plugin
from ddiff.plugin.registry import KINDS

PARTS = """
from typing import Literal
from pydantic import field_validator, model_validator
from ddiff.plugin.config import ComponentConfig, PositiveFloat, Share
from ddiff.errors import ArgumentError

class Plain:
    @classmethod
    def build(cls, config, **inputs):
        return inputs

class Clock(ComponentConfig):
    rates: tuple[PositiveFloat, ...] = (1.0,)
    kind: Literal["even", "uneven"] = "even"

class Toy(Plain):
    class Config(ComponentConfig):
        gamma: PositiveFloat = 1.0
        xi: Share | tuple[Share, ...] = 1.0
        clock: Clock = Clock()
        note: str | None = None

        @field_validator("gamma")
        @classmethod
        def _not_thirteen(cls, gamma):
            if gamma == 13.0:
                raise ValueError("thirteen brings bad luck")
            return gamma

    @classmethod
    def build(cls, config, *, vocabulary):
        return config.gamma, vocabulary

class Clusters(Plain):
    class Config(ComponentConfig):
        sizes: tuple[int, ...]

class Net(Plain):
    class Config(ComponentConfig):
        width: int = 8

class Muon(Plain):
    class Config(ComponentConfig):
        lr: PositiveFloat = 0.02

class Autoregression(Plain):
    slots = ()

class Backend(Plain):
    class Config(ComponentConfig):
        device: str = "abacus"

class Choosy(Plain):
    class Config(ComponentConfig):
        rate: float = 1.0
        rates: tuple[float, ...] | None = None

        @model_validator(mode="after")
        def _one(self):
            if {"rate", "rates"} <= self.model_fields_set:
                raise ValueError("only one of rate and rates may be given")
            return self

class Halving(Plain):
    class Config(ComponentConfig):
        rate: float = 1.0

        @field_validator("rate")
        @classmethod
        def _half(cls, rate):
            return rate / 2

class ChoosyHead(Plain):
    @classmethod
    def build(cls, config, *, width):
        if width != 3:
            raise ArgumentError(f"width must be 3; got {width}.")

class Part(ComponentConfig):
    path: str
    weight: PositiveFloat = 1.0
    clean: str | None = None

class Mixture(Plain):
    class Config(ComponentConfig):
        parts: tuple[Part, ...]

class Pca(Plain):
    class Config(ComponentConfig):
        width: int = 4

class Both(Plain):
    states = frozenset({"tokens", "vectors"})

class OfVectors(Plain):
    states = frozenset({"vectors"})

class Scaled(OfVectors):
    class Config(ComponentConfig):
        scale: PositiveFloat = 1.0

class Greedy(Plain):
    class Config(ComponentConfig):
        head: str = "mine"
"""
NAMES = {
    "process": {"toy": "Toy", "choosy": "Choosy", "halving": "Halving", "normal": "Scaled"},
    "vocabulary": {"clusters": "Clusters", "flat": "Plain"},
    "backbone": {"net": "Net", "greedy": "Greedy"},
    "optimizer": {"muon": "Muon", "adamw": "Plain"},
    "objective": {"nelbo": "Plain", "next": "Autoregression"},
    "training_loss": {"elbo": "Both", "clip": "Plain"},
    "time_rule": {"flat": "Plain"},
    "head": {
        "tokens": "Plain",
        "tied": "Plain",
        "choosy_head": "ChoosyHead",
        "vector": "Scaled",
    },
    "backend": {"single": "Backend"},
    "sampler": {"ancestral": "Plain", "ddim": "OfVectors", "heun": "OfVectors"},
    "tracker": {"none": "Plain"},
    "joint_backbone": {"streams": "Net"},
    "path_rule": {"shared": "Plain", "mixture": "Mixture"},
    "normalizer": {"none": "Plain", "standard": "Plain", "pca": "Pca"},
}
TARGETS = [
    (kind, name, f"toy_parts:{NAMES.get(kind, {}).get(name, 'Plain')}")
    for kind in KINDS
    for name in NAMES.get(kind, ["plain"])
]
REGISTER = f"""
from ddiff import hookimpl

@hookimpl
def ddiff_register(registry):
    for kind, name, target in {TARGETS!r}:
        registry.add(kind, name, target)
"""

RECIPE = """\
# A recipe.
name = "mine"
plugins = ["toy"]

[data]
kind = "plain"
length = 16

[tokenizer]
kind = "plain"

[vocabulary]
kind = "clusters"
sizes = [
    64,
    8,
]

[process]
kind = "toy"
gamma = 2

[denoiser]
kind = "net"
head = "tied"

[train]
steps = 10
batch = 4
"""

FIELDS_RECIPE = """\
name = "pair"
plugins = ["toy"]
data = "plain"

[fields.image]
process = "toy"
weight = 2

[fields.text]
tokenizer = "plain"
length = 5
head = "tied"

[fields.text.process]
kind = "toy"
gamma = 2

[fields.latent]
process = "normal"
encode = "text"
normalizer = {kind = "pca", width = 2}

[encoder]
kind = "plain"

[denoiser]
kind = "streams"
width = 16

[objective]
times = {kind = "mixture", parts = [{path = "shared"}, {path = "first", clean = "text"}]}

[train]
steps = 10
batch = 4

[evaluate]
targets = ["joint", "image | text"]

[sample]
path = "shared"

[sample.guidance.image]
weight = 1.5
without = {text = "absent"}
"""


@pytest.fixture
def toy(distribution, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the toy plugin in place of the plugin `core`, so that tests do not import torch."""
    distribution("toy-dist", "1.0", {"toy": "toy_pkg"}, {"toy_pkg": REGISTER, "toy_parts": PARTS})
    monkeypatch.setattr(plugin, "CORE", "toy")


@pytest.fixture
def write(toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function that writes a recipe into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write_recipe(text: str = RECIPE, name: str = "mine.toml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write_recipe
