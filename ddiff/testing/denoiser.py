"""Conformance checks of a denoiser: predictions must depend only on permitted inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ddiff.core.prediction import CleanDistribution, drop_own_evidence
from ddiff.core.process import ForwardProcess
from ddiff.core.times import Noisy
from ddiff.nn.denoiser import Context, Denoiser
from ddiff.nn.network import as_network
from ddiff.nn.parameterization import PARAMETERIZATIONS
from ddiff.testing.head import randomize_in_float64
from ddiff.testing.probes import grid_of_uniforms
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law

BATCH = 3
LENGTH = 6


def _prepare(
    denoiser: Denoiser,
    process: ForwardProcess,
) -> tuple[Denoiser, Noisy]:
    """Copy the denoiser to float64 with random parameters, and draw noisy sequences of the process.

    Returns:
        - the copy of the denoiser,
        - the noisy sequences.
    """
    twin = randomize_in_float64(denoiser, scale=0.5)
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randint(
        process.vocabulary.num_tokens,
        (BATCH * LENGTH,),
        generator=generator,
    )
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64).repeat_interleave(LENGTH)
    # the first Sobol point is 0, an unlikely corner of the cube
    u = grid_of_uniforms(BATCH * LENGTH + 1, process.uniforms_per_sample)[1:]
    zt = process.sample(x0, t, u)
    shape = (BATCH, LENGTH)
    clean = torch.zeros(shape, dtype=torch.bool)
    return twin, Noisy(zt.reshape(shape), t.reshape(shape), clean)


def _log_p(
    denoiser: Denoiser,
    process: ForwardProcess,
    noisy: Noisy,
    context: Context,
) -> Tensor:
    """Predict the log-distribution of the clean token at every position: [B,L,V] float64.

    `context` contains the padding mask and the document numbers.
    """

    def log_mass(prediction: CleanDistribution) -> Tensor:
        return prediction.log_mass(0).double()

    rows = torch.arange(noisy.zt.numel())
    root = torch.full_like(rows, process.vocabulary.root)
    query = as_network(denoiser, process, context)(noisy)
    return query(rows, root, log_mass).reshape(*noisy.zt.shape, -1)


def _slice(noisy: Noisy, *index: slice) -> Noisy:
    parts: list[Any] = []
    for part in noisy:
        parts.append(None if part is None else part[index])
    return Noisy(*parts)


@law("denoiser: predictions sum to 1", tolerance=1e-9)
def rows_have_distributions(
    denoiser: Denoiser,
    process: ForwardProcess,
) -> Iterator[Gap]:
    """Check that the predicted probabilities of the tokens sum to 1 at every position.

    Tolerance 1e-9: float64 rounding of float64 softmaxes.
    """
    twin, noisy = _prepare(denoiser, process)
    p = _log_p(twin, process, noisy, Context()).exp()
    yield compare(p.sum(-1), 1.0, {"zt": noisy.zt})


@law("denoiser: a sample does not depend on its batch", tolerance=1e-9)
def batches_agree(
    denoiser: Denoiser,
    process: ForwardProcess,
) -> Iterator[Gap]:
    """Check that a sequence has the same predictions in a batch of one as in a batch of three.

    Probabilities are compared. Tolerance 1e-9: float64 matrix products of different shapes round
    differently.
    """
    twin, noisy = _prepare(denoiser, process)
    in_batch = _log_p(twin, process, noisy, Context()).exp()
    for i in range(BATCH):
        one = slice(i, i + 1)
        single = _log_p(twin, process, _slice(noisy, one), Context()).exp()
        yield compare(single, in_batch[one], {"sequence": i})


@law("denoiser: padding does not matter", tolerance=1e-9)
def padding_is_invisible(
    denoiser: Denoiser,
    process: ForwardProcess,
) -> Iterator[Gap]:
    """Check that padding changes no prediction at a valid position.

    Predictions for padded sequences are compared with those for the same sequences without padding,
    for two different contents of the padding. Tolerance 1e-9: float64 matrix products of different
    shapes round differently.
    """
    twin, noisy = _prepare(denoiser, process)
    length = LENGTH - 2
    # padding is at the end, as in batches of training
    valid = (torch.arange(LENGTH) < length).expand(BATCH, -1)
    unpadded = _slice(noisy, slice(None), slice(length))
    expected = _log_p(twin, process, unpadded, Context()).exp()
    filled = torch.where(
        valid,
        noisy.zt,
        process.vocabulary.num_states - 1,
    )
    for zt in (noisy.zt, filled):
        padded = _log_p(twin, process, noisy._replace(zt=zt), Context(valid=valid)).exp()
        yield compare(
            padded[:, :length],
            expected,
            {"valid": valid[:, :length].long()},
        )


@law("denoiser: documents in one sequence do not attend to each other", tolerance=1e-12)
def documents_are_separate(
    denoiser: Denoiser,
    process: ForwardProcess,
) -> Iterator[Gap]:
    """Check that documents that are packed into one sequence do not attend to each other.

    All states of the second document are changed. The predictions in the first document must be the
    same as before. Tolerance 1e-12: masked attention adds exact zeros.
    """
    twin, noisy = _prepare(denoiser, process)
    second = torch.arange(LENGTH) >= LENGTH // 2
    # each half of a sequence is one document
    context = Context(document=second.long().expand(BATCH, -1))
    before = _log_p(twin, process, noisy, context).exp()
    other = (noisy.zt + 1) % process.vocabulary.num_states
    changed = noisy._replace(zt=torch.where(second, other, noisy.zt))
    after = _log_p(twin, process, changed, context).exp()
    labels = {"position in": "the first document"}
    yield compare(
        after[:, ~second].flatten(0, 1),
        before[:, ~second].flatten(0, 1),
        labels,
    )


@law("denoiser: predictions exclude the position's own state", tolerance=1e-9)
def evidence_is_dropped(
    denoiser: Denoiser,
    process: ForwardProcess,
) -> Iterator[Gap]:
    """Check that the prediction used in the bound excludes the position's own state z_t.

    Let p(x) be the output of the head for token x. A denoiser with parameterization "rest" predicts
    from the states of the other positions, and the bound must use p(x). A denoiser with
    parameterization "all" also predicts from z_t, and the bound must use p(x) / q_t(z_t|x),
    normalized over the tokens x. Tolerance 1e-9: float64 rounding.
    """
    twin, noisy = _prepare(denoiser, process)
    rows = torch.arange(noisy.zt.numel())
    root = torch.full_like(rows, process.vocabulary.root)
    outputs: list[Tensor] = []

    def keep(prediction: CleanDistribution, idx: Tensor) -> Tensor:
        outputs.append(prediction.log_mass(0).double())
        return idx

    twin.query(noisy, Context(), rows, root, keep)
    expected = torch.cat(outputs)
    # types are compared, since the copied denoiser has a copy of the parameterization
    if isinstance(twin.parameterization, type(PARAMETERIZATIONS["all"])):
        evidence = process.log_likelihood(noisy.zt.reshape(-1), noisy.t.reshape(-1))
        expected = drop_own_evidence(expected, evidence)
    got = _log_p(twin, process, noisy, Context()).reshape(len(rows), -1)
    yield compare(
        got.exp(),
        expected.exp(),
        {"zt": noisy.zt.reshape(-1)},
    )


DENOISER_LAWS: tuple[Law, ...] = (
    rows_have_distributions,
    batches_agree,
    padding_is_invisible,
    documents_are_separate,
    evidence_is_dropped,
)


def check_denoiser(
    denoiser: Denoiser,
    process: ForwardProcess,
) -> list[LawReport]:
    """Apply every conformance check of denoisers to a denoiser (a backbone with a head).

    `process` is a small process on the vocabulary of the denoiser.
    """
    return evaluate_laws(denoiser, DENOISER_LAWS, process=process)
