"""ddiff: discrete diffusion, one process object from which bound, loss, sampler and evaluation follow.

Importing it costs nothing: a public name is fetched from its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "ddiff.component": (
        "ComponentConfig",
        "NonNegativeFloat",
        "NonNegativeInt",
        "PositiveFloat",
        "PositiveInt",
        "Probability",
        "Share",
    ),
    "ddiff.core.clock": (
        "CdfClock",
        "LevelClock",
        "LogTimeClock",
    ),
    "ddiff.core.dense": ("DenseProcess",),
    "ddiff.core.elbo": (
        "NelboTerms",
        "ask_table",
        "nelbo",
    ),
    "ddiff.core.interpolating": (
        "InterpolatingProcess",
        "MixtureProcess",
    ),
    "ddiff.core.kernel": (
        "AbsorbingKernel",
        "DenseKernel",
        "InterpolatingKernel",
        "Kernel",
    ),
    "ddiff.core.law": (
        "CleanLaw",
        "DenseLaw",
        "Score",
        "SubtreeLaw",
    ),
    "ddiff.core.noise": ("Noise",),
    "ddiff.core.process": (
        "ForwardProcess",
        "Informed",
        "Prior",
    ),
    "ddiff.core.schedule": (
        "CosineSchedule",
        "LinearSchedule",
        "PowerSchedule",
        "Schedule",
    ),
    "ddiff.core.times": (
        "FlatTimes",
        "TimeRule",
        "Times",
    ),
    "ddiff.core.tree": (
        "StochasticParents",
        "TreeKernel",
        "TreeProcess",
    ),
    "ddiff.core.vocabulary": (
        "FlatVocabulary",
        "HierarchicalVocabulary",
        "Vocabulary",
    ),
    "ddiff.errors": (
        "ArgumentError",
        "CheckpointError",
        "DataError",
        "DdiffError",
        "NonFiniteError",
        "PluginError",
        "RecipeError",
    ),
    "ddiff.nn.denoiser": (
        "Backbone",
        "Context",
        "Denoiser",
        "asking",
    ),
    "ddiff.nn.heads": (
        "Head",
        "TokenHead",
        "TreeHead",
    ),
    "ddiff.plugin": ("hookimpl",),
    "ddiff.recipe": (
        "Recipe",
        "read_recipe",
    ),
    "ddiff.registry": ("Registry",),
    "ddiff.sampling.ancestral": ("AncestralSampler",),
    "ddiff.sampling.loop": ("generate",),
    "ddiff.runs": (
        "Run",
        "load",
        "run",
    ),
}
"""The public names by the module that holds them."""

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f'module "ddiff" has no attribute "{name}"')
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])


if TYPE_CHECKING:
    from ddiff.component import ComponentConfig as ComponentConfig
    from ddiff.component import NonNegativeFloat as NonNegativeFloat
    from ddiff.component import NonNegativeInt as NonNegativeInt
    from ddiff.component import PositiveFloat as PositiveFloat
    from ddiff.component import PositiveInt as PositiveInt
    from ddiff.component import Probability as Probability
    from ddiff.component import Share as Share
    from ddiff.core.clock import CdfClock as CdfClock
    from ddiff.core.clock import LevelClock as LevelClock
    from ddiff.core.clock import LogTimeClock as LogTimeClock
    from ddiff.core.dense import DenseProcess as DenseProcess
    from ddiff.core.elbo import NelboTerms as NelboTerms
    from ddiff.core.elbo import ask_table as ask_table
    from ddiff.core.elbo import nelbo as nelbo
    from ddiff.core.interpolating import InterpolatingProcess as InterpolatingProcess
    from ddiff.core.interpolating import MixtureProcess as MixtureProcess
    from ddiff.core.kernel import AbsorbingKernel as AbsorbingKernel
    from ddiff.core.kernel import DenseKernel as DenseKernel
    from ddiff.core.kernel import InterpolatingKernel as InterpolatingKernel
    from ddiff.core.kernel import Kernel as Kernel
    from ddiff.core.law import CleanLaw as CleanLaw
    from ddiff.core.law import DenseLaw as DenseLaw
    from ddiff.core.law import Score as Score
    from ddiff.core.law import SubtreeLaw as SubtreeLaw
    from ddiff.core.noise import Noise as Noise
    from ddiff.core.process import ForwardProcess as ForwardProcess
    from ddiff.core.process import Informed as Informed
    from ddiff.core.process import Prior as Prior
    from ddiff.core.schedule import CosineSchedule as CosineSchedule
    from ddiff.core.schedule import LinearSchedule as LinearSchedule
    from ddiff.core.schedule import PowerSchedule as PowerSchedule
    from ddiff.core.schedule import Schedule as Schedule
    from ddiff.core.times import FlatTimes as FlatTimes
    from ddiff.core.times import TimeRule as TimeRule
    from ddiff.core.times import Times as Times
    from ddiff.core.tree import StochasticParents as StochasticParents
    from ddiff.core.tree import TreeKernel as TreeKernel
    from ddiff.core.tree import TreeProcess as TreeProcess
    from ddiff.core.vocabulary import FlatVocabulary as FlatVocabulary
    from ddiff.core.vocabulary import HierarchicalVocabulary as HierarchicalVocabulary
    from ddiff.core.vocabulary import Vocabulary as Vocabulary
    from ddiff.errors import ArgumentError as ArgumentError
    from ddiff.errors import CheckpointError as CheckpointError
    from ddiff.errors import DataError as DataError
    from ddiff.errors import DdiffError as DdiffError
    from ddiff.errors import NonFiniteError as NonFiniteError
    from ddiff.errors import PluginError as PluginError
    from ddiff.errors import RecipeError as RecipeError
    from ddiff.nn.denoiser import Backbone as Backbone
    from ddiff.nn.denoiser import Context as Context
    from ddiff.nn.denoiser import Denoiser as Denoiser
    from ddiff.nn.denoiser import asking as asking
    from ddiff.nn.heads import Head as Head
    from ddiff.nn.heads import TokenHead as TokenHead
    from ddiff.nn.heads import TreeHead as TreeHead
    from ddiff.plugin import hookimpl as hookimpl
    from ddiff.recipe import Recipe as Recipe
    from ddiff.recipe import read_recipe as read_recipe
    from ddiff.registry import Registry as Registry
    from ddiff.runs import Run as Run
    from ddiff.runs import load as load
    from ddiff.runs import run as run
    from ddiff.sampling.ancestral import AncestralSampler as AncestralSampler
    from ddiff.sampling.loop import generate as generate
