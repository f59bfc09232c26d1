"""Small fields, random generators and networks with which laws of paths are tested."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.field import Field, Fields
from ddiff.core.fields import JointNetwork, JointNoisy, joint_network_from_functions
from ddiff.core.gaussian import GaussianProcess, PredictedMean
from ddiff.core.gaussian_schedule import CosineVP, LinearBetaVP
from ddiff.core.paths import Leg, Path
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import Query
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, Noisy
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary

SEED = 11
PANELS = 200  # of eight quadrature nodes in every part
PARTS = 6  # of a quadrature over a uniform: paths divide it into 1, 2 or 3 shares
TOKENS = 3
POSITIONS = 2


# ------------------------------------------------------------------ fields and generators


def small_fields(path: Path, has_tokens: bool = True) -> Fields:
    """Return a field for every name of the path: tokens first, then vectors.

    Without `has_tokens` all fields have vectors.
    """
    fields: dict[str, Field] = {}
    for number, name in enumerate(path.legs):
        if number == 0 and has_tokens:
            tokens = TreeProcess(FlatVocabulary(TOKENS), LogTimeClock((1.0,)))
            fields[name] = Field(tokens, FlatTimes(tokens=POSITIONS), POSITIONS)
        else:
            schedule = CosineVP() if number % 2 else LinearBetaVP()
            process = GaussianProcess(schedule, 1 + number % 2)
            fields[name] = Field(process, FlatTimes(), 1)
    return fields


class NodeRng(CounterRng):
    """Random generator whose uniforms for times are given nodes [B]; all others are 1/2."""

    def __init__(self, nodes: Tensor, length: int = 1) -> None:
        super().__init__(SEED, 0, torch.arange(len(nodes)), length)
        self.nodes = nodes

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        shape = [len(self.index), self.length]
        if count > 1:
            shape.append(count)
        if channel == "time":
            return self.nodes.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        return torch.full(shape, 0.5, dtype=torch.float64)

    def uniform_per_group(self, channel: str) -> Tensor:
        return torch.full((len(self.index),), 0.5, dtype=torch.float64)

    def derive(self, purpose: str, length: int) -> NodeRng:
        return NodeRng(self.nodes, length)


def time_nodes() -> tuple[Tensor, Tensor]:
    """Return nodes in [0,1] and weights of a quadrature over the uniform of a draw of times."""
    return _dense_nodes([part / PARTS for part in range(PARTS + 1)])


def path_nodes(path: Path) -> tuple[Tensor, Tensor]:
    """Return nodes of tau in [0,1] and weights of a quadrature between all starts and stops."""
    return _dense_nodes(
        sorted({end for leg in moving_legs(path).values() for end in leg} | {0.0, 1.0})
    )


def _dense_nodes(points: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of a quadrature over the intervals between points.

    Nodes are dense at both ends of every interval, where speeds may be infinite.
    """
    x, w = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(8))
    left = torch.arange(PANELS, dtype=torch.float64).unsqueeze(-1)
    v = ((left + (x + 1.0) / 2.0) / PANELS).reshape(-1)
    v_weight = (w / 2.0 / PANELS).repeat(PANELS)
    place = v**2 * (3.0 - 2.0 * v)
    slope = 6.0 * v * (1.0 - v) * v_weight
    nodes, weight = [], []
    for start, stop in itertools.pairwise(points):
        nodes.append(start + (stop - start) * place)
        weight.append((stop - start) * slope)
    return torch.cat(nodes), torch.cat(weight)


def moving_legs(path: Path) -> dict[str, Leg]:
    """Return the legs of the fields that move."""
    return {name: leg for name, leg in path.legs.items() if isinstance(leg, Leg)}


# ------------------------------------------------------------------ samples and networks


def clean_samples(fields: Fields, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return clean samples of all fields, and marks of all positions as scored."""
    x0 = {}
    scored = {}
    for name, field in fields.items():
        if isinstance(field.process, GaussianProcess):
            size = count * field.positions * field.process.width
            numbers = torch.linspace(-1.5, 1.2, size, dtype=torch.float64)
            x0[name] = numbers.reshape(count, field.positions, field.process.width)
        else:
            x0[name] = torch.arange(count * field.positions).reshape(count, -1) % TOKENS
        scored[name] = torch.ones(count, field.positions, dtype=torch.bool)
    return x0, scored


def constant_network(fields: Fields) -> JointNetwork:
    """Return the joint network with the prediction 0.3 for numbers, and equal probabilities."""
    vocabulary = FlatVocabulary(TOKENS)

    def predict_vectors(width: int) -> Any:
        def predict(rows: Tensor) -> PredictedMean:
            return PredictedMean(torch.full((len(rows), width), 0.3, dtype=torch.float64))

        return lambda state: predict

    def predict_tokens(state: JointNoisy) -> Any:
        def predict(rows: Tensor) -> DenseDistribution:
            even = torch.zeros(len(rows), TOKENS, dtype=torch.float64)
            return DenseDistribution(even.log_softmax(-1), vocabulary)

        return predict

    functions = {}
    for name, field in fields.items():
        if isinstance(field.process, GaussianProcess):
            functions[name] = predict_vectors(field.process.width)
        else:
            functions[name] = predict_tokens
    return joint_network_from_functions(functions)


def constant_vector(noisy: Noisy) -> Query:
    """Prepare the prediction 0.3 of every number of a field of vectors."""

    def query(rows: Tensor, node: Tensor, fn: Any, *per_row: Tensor) -> Any:
        mean = torch.full_like(noisy.zt.flatten(0, 1)[rows], 0.3)
        return fn(PredictedMean(mean), *per_row)

    return query


class RecordingNetwork:
    """Joint network that keeps the states of all its evaluations in `states`."""

    def __init__(self, network: JointNetwork) -> None:
        self.network = network
        self.states: list[JointNoisy] = []

    def __call__(self, state: JointNoisy) -> Mapping[str, Query]:
        self.states.append(state)
        return self.network(state)
