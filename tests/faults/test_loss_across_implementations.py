"""Classes that implement the same Markov chain have the same loss.

The integrand of the bound is weight x divergence; the clipped loss limits the weight.
"""

from __future__ import annotations

import pytest
import torch
from all_examples import every_example
from ddiff_gidd.process import GeneralizedInterpolation
from ddiff_hybrid.epsilon import EpsilonHybrid
from ddiff_hybrid.gamma import GammaHybrid
from ddiff_mdlm.process import MaskedDiffusion
from ddiff_sedd.process import ScoreEntropyDiffusion
from torch import Tensor

from ddiff import (
    ClippedLoss,
    DenseDistribution,
    DenseProcess,
    FlatVocabulary,
    ForwardProcess,
    LinearSchedule,
    MixtureProcess,
    mask_distribution,
    token_distribution,
)
from ddiff.core.prediction import Prediction
from ddiff.testing.derived_formulas import score_from_distribution, weight_is_derived
from ddiff.testing.probes import ReachableRows, times
from ddiff.testing.process import PROCESS_LAWS
from ddiff.testing.report import evaluate_laws

TIMES = (1e-3, 0.02, 0.31, 0.5, 0.77, 0.99)


def masks() -> dict[str, ForwardProcess]:
    """Return all classes that implement the masked process with alpha = 1 - t, by name."""
    vocabulary = FlatVocabulary(4)
    rates = -torch.eye(5, dtype=torch.float64)
    rates[:, -1] = 1.0
    rates[-1] = 0.0
    sedd = ScoreEntropyDiffusion.Config(graph="absorb", floor=0.0)
    return {
        "mdlm": MaskedDiffusion.build(MaskedDiffusion.Config(), vocabulary=vocabulary),
        "sedd": ScoreEntropyDiffusion.build(sedd, vocabulary=vocabulary),
        "gidd": GeneralizedInterpolation.build(
            GeneralizedInterpolation.Config(p_uniform=0.0), vocabulary=vocabulary
        ),
        "mixture": MixtureProcess(vocabulary, LinearSchedule(), mask_distribution(vocabulary)),
        "hybrid_epsilon": EpsilonHybrid(vocabulary, LinearSchedule(), 0.0),
        "hybrid_gamma": GammaHybrid(vocabulary, 0.0),
        "dense": DenseProcess(vocabulary, rates),
    }


def uniform() -> dict[str, ForwardProcess]:
    """Return all classes that implement uniform noise with alpha = 1 - t, by name."""
    vocabulary = FlatVocabulary(4, mask=False)
    rates = torch.full((4, 4), 0.25, dtype=torch.float64) - torch.eye(4, dtype=torch.float64)
    sedd = ScoreEntropyDiffusion.Config(graph="uniform", floor=0.0)
    return {
        "sedd": ScoreEntropyDiffusion.build(sedd, vocabulary=vocabulary),
        "mixture": MixtureProcess(vocabulary, LinearSchedule(), token_distribution(vocabulary)),
        "dense": DenseProcess(vocabulary, rates),
    }


def evaluate_loss(
    process: ForwardProcess, rows: ReachableRows, predicts: str, largest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weight, divergence, clipped loss) of every row.

    predicts: "distribution" or "score". largest: limit of the weight in the clipped loss.
    """
    prediction: Prediction = DenseDistribution(rows.log_p, process.vocabulary)
    if predicts == "score":
        prediction = score_from_distribution(process, rows.log_p, rows.zt, rows.t)
    weight = process.weight(*rows.args)
    divergence = process.divergence(prediction, *rows.args)
    clipped = ClippedLoss(largest=largest).weight(process, *rows.args) * divergence
    return weight, divergence, clipped


@pytest.mark.parametrize("predicts", ["distribution", "score"])
@pytest.mark.parametrize("chain", [masks, uniform])
def test_implementations_of_one_markov_chain_have_equal_losses(
    chain: object, predicts: str
) -> None:
    """Losses agree up to the error of the matrix exponential of the dense process."""
    processes = chain()  # type: ignore[operator]
    rows = ReachableRows(processes["mixture"], times(TIMES))
    expected = evaluate_loss(processes["mixture"], rows, predicts, 10.0)
    for name, process in processes.items():
        for part, due in zip(evaluate_loss(process, rows, predicts, 10.0), expected):
            torch.testing.assert_close(part, due, rtol=1e-8, atol=1e-9, msg=f"{name}, {predicts}")


def test_clipped_loss_equals_the_unclipped_loss_if_weights_are_small() -> None:
    """At t = 0.99 the weight of -ln p(x) is 1/t in both processes, less than its limit 10."""
    rows = ReachableRows(masks()["mdlm"], times((0.99,)))
    mask = rows.select(rows.zt == 4)
    surprise = -mask.log_p.gather(-1, mask.x0.unsqueeze(-1)).squeeze(-1)
    for name in ("mdlm", "sedd"):
        _, _, clipped = evaluate_loss(masks()[name], mask, "distribution", 10.0)
        torch.testing.assert_close(clipped, surprise / 0.99, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", every_example())
def test_loss_weight_of_every_process_is_the_exact_reverse_rate(process: ForwardProcess) -> None:
    (report,) = evaluate_laws(process, (weight_is_derived,))
    assert report.passed, str(report)
    assert weight_is_derived in PROCESS_LAWS


@pytest.mark.parametrize("process", every_example())
def test_clipped_loss_is_at_most_the_integrand_of_the_bound(process: ForwardProcess) -> None:
    """Near t = 0 the weight of a clean token is proportional to t, and its divergence to 1/t.

    Their product is finite. With a lower limit `smallest` > 0 of the weight, the clipped loss would
    diverge.
    """
    rows = ReachableRows(process, times((1e-9, 1e-6, 1e-3, 0.5, 1.0 - 1e-6)))
    density = process.density(rows.dist, *rows.args)
    _, _, clipped = evaluate_loss(process, rows, "distribution", 10.0)
    assert bool(clipped.isfinite().all())
    assert bool((clipped <= density * (1.0 + 1e-6) + 1e-6).all())
