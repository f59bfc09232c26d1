"""ddiff: discrete diffusion, one process object from which bound, loss, sampler and evaluation follow.

Importing it costs nothing: a public name is fetched from its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "ddiff.clustering.cooccurrence": ("cooccurrence_embeddings",),
    "ddiff.clustering.files": (
        "model_embeddings",
        "read_clusters",
        "read_embeddings",
    ),
    "ddiff.clustering.kmeans": ("nested_kmeans",),
    "ddiff.evaluation.comparison": ("compare",),
    "ddiff.plugin.config": (
        "ComponentConfig",
        "NonNegativeFloat",
        "NonNegativeInt",
        "PositiveFloat",
        "PositiveInt",
        "Probability",
        "Seed",
        "Share",
    ),
    "ddiff.data.condition_forms": ("Label", "Vector"),
    "ddiff.core.clock": (
        "CdfClock",
        "LevelClock",
        "LogTimeClock",
    ),
    "ddiff.core.dense": ("DenseProcess",),
    "ddiff.core.elbo": (
        "Ask",
        "Likelihood",
        "NelboTerms",
        "ask_law",
        "ask_table",
        "nelbo",
    ),
    "ddiff.core.interpolating": (
        "ComponentProcess",
        "InterpolatingProcess",
        "MixtureProcess",
        "mask_law",
        "word_law",
    ),
    "ddiff.core.kernel": (
        "AbsorbingKernel",
        "DenseKernel",
        "InterpolatingKernel",
        "Kernel",
        "ScaledKernel",
        "SumKernel",
        "uniform_kernel",
    ),
    "ddiff.core.information": ("InformationTime", "OwnTime", "TimeChange"),
    "ddiff.core.prediction": (
        "Answer",
        "CleanLaw",
        "DenseLaw",
        "Score",
        "SubtreeLaw",
        "drop_own_evidence",
    ),
    "ddiff.core.rng": ("Noise",),
    "ddiff.core.numerics": ("interior",),
    "ddiff.core.oracle": ("propagate",),
    "ddiff.core.process": (
        "ForwardProcess",
        "Informed",
        "Prior",
        "Visit",
    ),
    "ddiff.core.schedule": (
        "CosineSchedule",
        "GeometricSchedule",
        "LinearSchedule",
        "PowerSchedule",
        "Schedule",
    ),
    "ddiff.core.times": (
        "FlatTimes",
        "Noisy",
        "TimeRule",
        "Times",
        "WindowTimes",
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
    "ddiff.data.batch": ("Batch",),
    "ddiff.data.cache": ("Cache",),
    "ddiff.data.corpus": ("Corpus", "ShardedCorpus", "SourceCorpus", "StreamedCorpus"),
    "ddiff.data.documents": (
        "Documents",
        "bundled_novels",
        "from_texts",
        "symbol_rows",
        "text_files",
        "text_fingerprint",
    ),
    "ddiff.data.jsonl": ("json_lines",),
    "ddiff.data.markov": ("MarkovSource",),
    "ddiff.data.paths": ("find_parts",),
    "ddiff.data.pretrained": ("load_pretrained",),
    "ddiff.data.packing": ("Rows", "rows_fingerprint", "token_stream"),
    "ddiff.data.sources": ("TextSource", "file_texts", "hub_texts"),
    "ddiff.data.tokenizer": (
        "AlphabetTokenizer",
        "BytePairTokenizer",
        "PretrainedTokenizer",
        "Tokenizer",
        "load_tokenizer",
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
    "ddiff.nn.attention": ("Seen", "Sight", "attend"),
    "ddiff.nn.denoiser": (
        "Backbone",
        "Context",
        "Denoiser",
        "Reading",
        "asking",
    ),
    "ddiff.nn.embedding": ("StateEmbedding",),
    "ddiff.nn.heads": (
        "Head",
        "TokenHead",
        "TreeHead",
    ),
    "ddiff.plugin.loader": ("hookimpl",),
    "ddiff.recipe.model": ("Recipe", "read_recipe"),
    "ddiff.plugin.registry": ("Registry",),
    "ddiff.runs": (
        "Run",
        "load",
        "run",
    ),
    "ddiff.sampling.adaptive_correction": ("CorrectingSampler",),
    "ddiff.sampling.analytic": ("AnalyticSampler", "reverse_probs"),
    "ddiff.sampling.ancestral": ("AncestralSampler",),
    "ddiff.sampling.hyperschedule": ("AlongSampler",),
    "ddiff.sampling.blockwise": ("BlockwiseSampler",),
    "ddiff.sampling.predictor_corrector": ("CorrectedSampler", "Corrector", "ForwardBackward"),
    "ddiff.sampling.first_hitting": ("FirstHittingSampler",),
    "ddiff.sampling.grid": ("Grid", "LoopGrid"),
    "ddiff.sampling.loop": (
        "Canvas",
        "Sampler",
        "Samples",
        "generate",
        "step_rows",
    ),
    "ddiff.sampling.one_level": ("OneLevelSampler",),
    "ddiff.sampling.psi": (
        "Cap",
        "Confidence",
        "Loop",
        "PsiSampler",
        "Rescale",
    ),
    "ddiff.sampling.self_correction": ("SelfCorrectingSampler",),
    "ddiff.sampling.shaping": (
        "MinP",
        "ShapedLaw",
        "ShapedSampler",
        "Temperature",
        "TopK",
        "TopP",
        "guided",
        "shaped",
        "steered",
    ),
    "ddiff.sampling.grid_sampler": ("SteppedSampler",),
    "ddiff.sampling.tau_leaping": ("TauLeapingSampler",),
    "ddiff.sampling.trapezoidal": ("TrapezoidalSampler",),
    "ddiff.sampling.unmasking": ("EntropyBoundSampler", "UnmaskingSampler"),
    "ddiff.distributed.single": ("SingleBackend",),
    "ddiff.distributed.data_parallel": ("DistributedBackend", "ShardedBackend"),
    "ddiff.training.objective": (
        "ClippedLoss",
        "DiffusionObjective",
        "ElboLoss",
        "TrainingLoss",
        "context_of",
        "device_of",
        "sent",
        "withheld",
    ),
    "ddiff.training.optimizers": (
        "JointOptimizer",
        "adamw",
        "muon",
    ),
    "ddiff.training.protocols": (
        "Backend",
        "LossTerms",
        "Objective",
        "Optimizer",
        "Tracker",
    ),
    "ddiff.training.tracker": ("NoTracker",),
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
    from ddiff.clustering.cooccurrence import cooccurrence_embeddings as cooccurrence_embeddings
    from ddiff.clustering.files import model_embeddings as model_embeddings
    from ddiff.clustering.files import read_clusters as read_clusters
    from ddiff.clustering.files import read_embeddings as read_embeddings
    from ddiff.clustering.kmeans import nested_kmeans as nested_kmeans
    from ddiff.evaluation.comparison import compare as compare
    from ddiff.plugin.config import ComponentConfig as ComponentConfig
    from ddiff.plugin.config import NonNegativeFloat as NonNegativeFloat
    from ddiff.plugin.config import NonNegativeInt as NonNegativeInt
    from ddiff.plugin.config import PositiveFloat as PositiveFloat
    from ddiff.plugin.config import PositiveInt as PositiveInt
    from ddiff.plugin.config import Probability as Probability
    from ddiff.plugin.config import Seed as Seed
    from ddiff.plugin.config import Share as Share
    from ddiff.data.condition_forms import Label as Label
    from ddiff.data.condition_forms import Vector as Vector
    from ddiff.core.clock import CdfClock as CdfClock
    from ddiff.core.clock import LevelClock as LevelClock
    from ddiff.core.clock import LogTimeClock as LogTimeClock
    from ddiff.core.dense import DenseProcess as DenseProcess
    from ddiff.core.elbo import Ask as Ask
    from ddiff.core.elbo import Likelihood as Likelihood
    from ddiff.core.elbo import NelboTerms as NelboTerms
    from ddiff.core.elbo import ask_law as ask_law
    from ddiff.core.elbo import ask_table as ask_table
    from ddiff.core.elbo import nelbo as nelbo
    from ddiff.core.information import InformationTime as InformationTime
    from ddiff.core.information import OwnTime as OwnTime
    from ddiff.core.information import TimeChange as TimeChange
    from ddiff.core.interpolating import ComponentProcess as ComponentProcess
    from ddiff.core.interpolating import InterpolatingProcess as InterpolatingProcess
    from ddiff.core.interpolating import MixtureProcess as MixtureProcess
    from ddiff.core.interpolating import mask_law as mask_law
    from ddiff.core.interpolating import word_law as word_law
    from ddiff.core.kernel import AbsorbingKernel as AbsorbingKernel
    from ddiff.core.kernel import DenseKernel as DenseKernel
    from ddiff.core.kernel import InterpolatingKernel as InterpolatingKernel
    from ddiff.core.kernel import Kernel as Kernel
    from ddiff.core.kernel import ScaledKernel as ScaledKernel
    from ddiff.core.kernel import SumKernel as SumKernel
    from ddiff.core.kernel import uniform_kernel as uniform_kernel
    from ddiff.core.prediction import Answer as Answer
    from ddiff.core.prediction import CleanLaw as CleanLaw
    from ddiff.core.prediction import DenseLaw as DenseLaw
    from ddiff.core.prediction import Score as Score
    from ddiff.core.prediction import SubtreeLaw as SubtreeLaw
    from ddiff.core.prediction import drop_own_evidence as drop_own_evidence
    from ddiff.core.rng import Noise as Noise
    from ddiff.core.numerics import interior as interior
    from ddiff.core.oracle import propagate as propagate
    from ddiff.core.process import ForwardProcess as ForwardProcess
    from ddiff.core.process import Informed as Informed
    from ddiff.core.process import Prior as Prior
    from ddiff.core.process import Visit as Visit
    from ddiff.core.schedule import CosineSchedule as CosineSchedule
    from ddiff.core.schedule import GeometricSchedule as GeometricSchedule
    from ddiff.core.schedule import LinearSchedule as LinearSchedule
    from ddiff.core.schedule import PowerSchedule as PowerSchedule
    from ddiff.core.schedule import Schedule as Schedule
    from ddiff.core.times import FlatTimes as FlatTimes
    from ddiff.core.times import Noisy as Noisy
    from ddiff.core.times import TimeRule as TimeRule
    from ddiff.core.times import Times as Times
    from ddiff.core.times import WindowTimes as WindowTimes
    from ddiff.core.tree import StochasticParents as StochasticParents
    from ddiff.core.tree import TreeKernel as TreeKernel
    from ddiff.core.tree import TreeProcess as TreeProcess
    from ddiff.core.vocabulary import FlatVocabulary as FlatVocabulary
    from ddiff.core.vocabulary import HierarchicalVocabulary as HierarchicalVocabulary
    from ddiff.core.vocabulary import Vocabulary as Vocabulary
    from ddiff.data.batch import Batch as Batch
    from ddiff.data.cache import Cache as Cache
    from ddiff.data.corpus import Corpus as Corpus
    from ddiff.data.corpus import ShardedCorpus as ShardedCorpus
    from ddiff.data.corpus import SourceCorpus as SourceCorpus
    from ddiff.data.corpus import StreamedCorpus as StreamedCorpus
    from ddiff.data.documents import Documents as Documents
    from ddiff.data.documents import bundled_novels as bundled_novels
    from ddiff.data.documents import from_texts as from_texts
    from ddiff.data.documents import symbol_rows as symbol_rows
    from ddiff.data.documents import text_files as text_files
    from ddiff.data.documents import text_fingerprint as text_fingerprint
    from ddiff.data.jsonl import json_lines as json_lines
    from ddiff.data.markov import MarkovSource as MarkovSource
    from ddiff.data.paths import find_parts as find_parts
    from ddiff.data.pretrained import load_pretrained as load_pretrained
    from ddiff.data.packing import Rows as Rows
    from ddiff.data.packing import rows_fingerprint as rows_fingerprint
    from ddiff.data.packing import token_stream as token_stream
    from ddiff.data.sources import TextSource as TextSource
    from ddiff.data.sources import file_texts as file_texts
    from ddiff.data.sources import hub_texts as hub_texts
    from ddiff.data.tokenizer import AlphabetTokenizer as AlphabetTokenizer
    from ddiff.data.tokenizer import BytePairTokenizer as BytePairTokenizer
    from ddiff.data.tokenizer import PretrainedTokenizer as PretrainedTokenizer
    from ddiff.data.tokenizer import Tokenizer as Tokenizer
    from ddiff.data.tokenizer import load_tokenizer as load_tokenizer
    from ddiff.errors import ArgumentError as ArgumentError
    from ddiff.errors import CheckpointError as CheckpointError
    from ddiff.errors import DataError as DataError
    from ddiff.errors import DdiffError as DdiffError
    from ddiff.errors import NonFiniteError as NonFiniteError
    from ddiff.errors import PluginError as PluginError
    from ddiff.errors import RecipeError as RecipeError
    from ddiff.nn.attention import Seen as Seen
    from ddiff.nn.attention import Sight as Sight
    from ddiff.nn.attention import attend as attend
    from ddiff.nn.denoiser import Backbone as Backbone
    from ddiff.nn.denoiser import Context as Context
    from ddiff.nn.denoiser import Denoiser as Denoiser
    from ddiff.nn.denoiser import Reading as Reading
    from ddiff.nn.denoiser import asking as asking
    from ddiff.nn.embedding import StateEmbedding as StateEmbedding
    from ddiff.nn.heads import Head as Head
    from ddiff.nn.heads import TokenHead as TokenHead
    from ddiff.nn.heads import TreeHead as TreeHead
    from ddiff.plugin.loader import hookimpl as hookimpl
    from ddiff.recipe.model import Recipe as Recipe
    from ddiff.recipe.model import read_recipe as read_recipe
    from ddiff.plugin.registry import Registry as Registry
    from ddiff.runs import Run as Run
    from ddiff.runs import load as load
    from ddiff.runs import run as run
    from ddiff.sampling.adaptive_correction import CorrectingSampler as CorrectingSampler
    from ddiff.sampling.hyperschedule import AlongSampler as AlongSampler
    from ddiff.sampling.analytic import AnalyticSampler as AnalyticSampler
    from ddiff.sampling.analytic import reverse_probs as reverse_probs
    from ddiff.sampling.ancestral import AncestralSampler as AncestralSampler
    from ddiff.sampling.blockwise import BlockwiseSampler as BlockwiseSampler
    from ddiff.sampling.predictor_corrector import CorrectedSampler as CorrectedSampler
    from ddiff.sampling.predictor_corrector import Corrector as Corrector
    from ddiff.sampling.predictor_corrector import ForwardBackward as ForwardBackward
    from ddiff.sampling.first_hitting import FirstHittingSampler as FirstHittingSampler
    from ddiff.sampling.grid import Grid as Grid
    from ddiff.sampling.grid import LoopGrid as LoopGrid
    from ddiff.sampling.loop import Canvas as Canvas
    from ddiff.sampling.loop import Sampler as Sampler
    from ddiff.sampling.loop import Samples as Samples
    from ddiff.sampling.loop import generate as generate
    from ddiff.sampling.loop import step_rows as step_rows
    from ddiff.sampling.one_level import OneLevelSampler as OneLevelSampler
    from ddiff.sampling.psi import Cap as Cap
    from ddiff.sampling.psi import Confidence as Confidence
    from ddiff.sampling.psi import Loop as Loop
    from ddiff.sampling.psi import PsiSampler as PsiSampler
    from ddiff.sampling.psi import Rescale as Rescale
    from ddiff.sampling.self_correction import SelfCorrectingSampler as SelfCorrectingSampler
    from ddiff.sampling.shaping import MinP as MinP
    from ddiff.sampling.shaping import ShapedLaw as ShapedLaw
    from ddiff.sampling.shaping import ShapedSampler as ShapedSampler
    from ddiff.sampling.shaping import Temperature as Temperature
    from ddiff.sampling.shaping import TopK as TopK
    from ddiff.sampling.shaping import TopP as TopP
    from ddiff.sampling.shaping import guided as guided
    from ddiff.sampling.shaping import shaped as shaped
    from ddiff.sampling.shaping import steered as steered
    from ddiff.sampling.grid_sampler import SteppedSampler as SteppedSampler
    from ddiff.sampling.tau_leaping import TauLeapingSampler as TauLeapingSampler
    from ddiff.sampling.trapezoidal import TrapezoidalSampler as TrapezoidalSampler
    from ddiff.sampling.unmasking import EntropyBoundSampler as EntropyBoundSampler
    from ddiff.sampling.unmasking import UnmaskingSampler as UnmaskingSampler
    from ddiff.distributed.single import SingleBackend as SingleBackend
    from ddiff.distributed.data_parallel import DistributedBackend as DistributedBackend
    from ddiff.distributed.data_parallel import ShardedBackend as ShardedBackend
    from ddiff.training.objective import ClippedLoss as ClippedLoss
    from ddiff.training.objective import DiffusionObjective as DiffusionObjective
    from ddiff.training.objective import ElboLoss as ElboLoss
    from ddiff.training.objective import TrainingLoss as TrainingLoss
    from ddiff.training.objective import context_of as context_of
    from ddiff.training.objective import device_of as device_of
    from ddiff.training.objective import sent as sent
    from ddiff.training.objective import withheld as withheld
    from ddiff.training.optimizers import JointOptimizer as JointOptimizer
    from ddiff.training.optimizers import adamw as adamw
    from ddiff.training.optimizers import muon as muon
    from ddiff.training.protocols import Backend as Backend
    from ddiff.training.protocols import LossTerms as LossTerms
    from ddiff.training.protocols import Objective as Objective
    from ddiff.training.protocols import Optimizer as Optimizer
    from ddiff.training.protocols import Tracker as Tracker
    from ddiff.training.tracker import NoTracker as NoTracker
