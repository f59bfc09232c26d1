"""Example instances of every process class of ddiff and of its plugins."""

from __future__ import annotations

import pytest
from ddiff_gidd.process import GeneralizedInterpolation
from ddiff_hdlm.process import HierarchicalDiffusion
from ddiff_hybrid.epsilon import EpsilonHybrid
from ddiff_hybrid.gamma import GammaHybrid
from ddiff_mdlm.process import MaskedDiffusion
from ddiff_sedd.process import ScoreEntropyDiffusion

from ddiff import DenseProcess, ForwardProcess, MixtureProcess, TreeProcess

FAMILIES = (
    TreeProcess,
    MixtureProcess,
    DenseProcess,
    MaskedDiffusion,
    HierarchicalDiffusion,
    GeneralizedInterpolation,
    ScoreEntropyDiffusion,
    EpsilonHybrid,
    GammaHybrid,
)


def every_example() -> list[object]:
    """Return a pytest parameter for each example instance of each process class."""
    parameters = []
    for family in FAMILIES:
        for number, process in enumerate(family.examples()):
            assert isinstance(process, ForwardProcess)
            parameters.append(pytest.param(process, id=f"{family.__name__}-{number}"))
    return parameters
