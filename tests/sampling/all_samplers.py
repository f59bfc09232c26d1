"""Small instances of every sampler of ddiff, and the processes that each sampler refuses."""

from __future__ import annotations

from collections.abc import Callable

from ddiff.sampling.adaptive_correction import AdaptiveCorrectionSampler
from ddiff.sampling.analytic import AnalyticSampler
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.blockwise import BlockwiseSampler
from ddiff.sampling.first_hitting import FirstHittingSampler
from ddiff.sampling.grid import Grid, LoopGrid
from ddiff.sampling.loop import Sampler
from ddiff.sampling.one_level import OneLevelSampler
from ddiff.sampling.predictor_corrector import ForwardBackward, PredictorCorrectorSampler
from ddiff.sampling.psi import (
    CapRemasking,
    ConfidenceRemasking,
    LoopRemasking,
    PsiSampler,
    RescaleRemasking,
)
from ddiff.sampling.self_correction import SelfCorrectingSampler
from ddiff.sampling.shaping import ShapedSampler, Temperature, TopP
from ddiff.sampling.tau_leaping import TauLeapingSampler
from ddiff.sampling.trapezoidal import TrapezoidalSampler
from ddiff.sampling.unmasking import EntropyBoundSampler, UnmaskingSampler

NOT_MONOTONE = ("uncertain tree", "uniform", "dense")
SILENT_WORDS = ("masked", "tree", "uncertain tree")

SAMPLERS: dict[str, tuple[Callable[[int], Sampler], set[str]]] = {
    "ancestral": (AncestralSampler, set()),
    "ancestral, cosine": (lambda n: AncestralSampler(Grid("cosine", n)), set()),
    "ancestral, log, argmax": (lambda n: AncestralSampler(Grid("log", n), "argmax"), set()),
    "ancestral, shaped": (
        lambda n: ShapedSampler(AncestralSampler(n), [Temperature(0.8), TopP(0.9)]),
        set(),
    ),
    "tau_leaping": (TauLeapingSampler, set()),
    "analytic": (AnalyticSampler, set()),
    "trapezoidal": (TrapezoidalSampler, set()),
    "first_hitting": (lambda n: FirstHittingSampler(), {"dense"}),
    "one_level": (OneLevelSampler, NOT_MONOTONE),
    "confidence": (lambda n: UnmaskingSampler(n, noise=0.5), NOT_MONOTONE),
    "top": (lambda n: UnmaskingSampler(n, "top"), NOT_MONOTONE),
    "margin": (lambda n: UnmaskingSampler(n, "margin"), NOT_MONOTONE),
    "entropy": (lambda n: EntropyBoundSampler(0.5), NOT_MONOTONE),
    "psi": (lambda n: PsiSampler(n, 0.5), set()),
    "cap": (lambda n: PsiSampler(n, CapRemasking(0.3)), set()),
    "rescale": (lambda n: PsiSampler(n, RescaleRemasking(0.3)), set()),
    "remdm confidence": (lambda n: PsiSampler(n, ConfidenceRemasking()), set()),
    "loop": (lambda n: PsiSampler(LoopGrid(2 * n), LoopRemasking(0.1)), set()),
    "acs": (AdaptiveCorrectionSampler, SILENT_WORDS),
    "self_correction": (
        lambda n: SelfCorrectingSampler(AncestralSampler(n), rounds=4),
        SILENT_WORDS,
    ),
    "dfm": (
        lambda n: PredictorCorrectorSampler(AncestralSampler(n), ForwardBackward(), rounds=2),
        set(),
    ),
    "blockwise": (lambda n: BlockwiseSampler(AncestralSampler(n), 1), set()),
    "blockwise events": (lambda n: BlockwiseSampler(FirstHittingSampler(), 2, "all"), {"dense"}),
}
