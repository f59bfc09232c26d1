"""Laws of a denoiser as the engine asks it: what a row is told depends on nothing that it should not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ddiff.core.prediction import CleanDistribution, drop_own_evidence
from ddiff.core.process import ForwardProcess
from ddiff.core.times import Noisy
from ddiff.nn.denoiser import PARAMETERIZATIONS, Context, Denoiser, as_network
from ddiff.testing.head import in_float64
from ddiff.testing.probes import grid_of_uniforms
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law

BATCH, LENGTH = 3, 6


def _prepared(denoiser: Denoiser, process: ForwardProcess) -> tuple[Denoiser, Noisy]:
    """A float64 copy with random parameters, in evaluation mode, and noisy sequences."""
    twin = in_float64(denoiser, scale=0.5)
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randint(process.vocabulary.num_tokens, (BATCH * LENGTH,), generator=generator)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64).repeat_interleave(LENGTH)
    u = grid_of_uniforms(BATCH * LENGTH + 1, process.uniforms_per_sample)[1:]
    zt, shape = process.sample(x0, t, u), (BATCH, LENGTH)
    return twin, Noisy(zt.reshape(shape), t.reshape(shape), torch.zeros(shape, dtype=torch.bool))


def _log_p(denoiser: Denoiser, process: ForwardProcess, noisy: Noisy, context: Context) -> Tensor:
    """[B,L,V] what every row is told at the root, in float64."""
    rows = torch.arange(noisy.zt.numel())
    query = as_network(denoiser, process, context)(noisy)
    root = torch.full_like(rows, process.vocabulary.root)
    log_p = query(rows, root, lambda prediction: prediction.log_mass(0).double())
    return log_p.reshape(*noisy.zt.shape, -1)


def _some(noisy: Noisy, *index: slice) -> Noisy:
    parts: list[Any] = [part if part is None else part[index] for part in noisy]
    return Noisy(*parts)


@law("denoiser: a law for every row", tolerance=1e-9)
def rows_have_laws(denoiser: Denoiser, process: ForwardProcess) -> Iterator[Gap]:
    """Every row is told a law over the words: finite or impossible, with sum 1. Rounding of float64 softmaxes."""
    twin, noisy = _prepared(denoiser, process)
    yield compare(_log_p(twin, process, noisy, Context()).exp().sum(-1), 1.0, {"zt": noisy.zt})


@law("denoiser: a sample does not depend on its batch", tolerance=1e-9)
def batches_agree(denoiser: Denoiser, process: ForwardProcess) -> Iterator[Gap]:
    """Asked alone, a sequence is told what it is told in company. Float64 products of other shapes: 1e-9."""
    twin, noisy = _prepared(denoiser, process)
    together = _log_p(twin, process, noisy, Context()).exp()
    for i in range(BATCH):
        alone = _log_p(twin, process, _some(noisy, slice(i, i + 1)), Context()).exp()
        yield compare(alone, together[i : i + 1], {"sequence": i})


@law("denoiser: padding does not matter", tolerance=1e-9)
def padding_is_invisible(denoiser: Denoiser, process: ForwardProcess) -> Iterator[Gap]:
    """What stands in padding, and that it is there, changes nothing for valid rows. Products of other shapes: 1e-9."""
    twin, noisy = _prepared(denoiser, process)
    kept = LENGTH - 2
    valid = (torch.arange(LENGTH) < kept).expand(BATCH, -1)
    bare = _log_p(twin, process, _some(noisy, slice(None), slice(kept)), Context()).exp()
    for filling in (noisy.zt, torch.where(valid, noisy.zt, process.vocabulary.num_states - 1)):
        padded = _log_p(twin, process, noisy._replace(zt=filling), Context(valid=valid)).exp()
        yield compare(padded[:, :kept], bare, {"valid": valid[:, :kept].long()})


@law("denoiser: documents in one row do not see each other", tolerance=1e-12)
def documents_are_apart(denoiser: Denoiser, process: ForwardProcess) -> Iterator[Gap]:
    """Changing one packed document changes nothing that the other is told. Masked attention adds exact zeros."""
    twin, noisy = _prepared(denoiser, process)
    document = (torch.arange(LENGTH) >= LENGTH // 2).long().expand(BATCH, -1)
    before = _log_p(twin, process, noisy, Context(document=document)).exp()
    changed = torch.where(document == 1, (noisy.zt + 1) % process.vocabulary.num_states, noisy.zt)
    after = _log_p(twin, process, noisy._replace(zt=changed), Context(document=document)).exp()
    yield compare(after[document == 0], before[document == 0], {"a row of": "the first document"})


@law("denoiser: what it says excludes the row's own evidence", tolerance=1e-9)
def evidence_is_dropped(denoiser: Denoiser, process: ForwardProcess) -> Iterator[Gap]:
    """given="all": the engine reads p(x) / q_t(z|x), normalised; given="rest": what the network says. Rounding."""
    twin, noisy = _prepared(denoiser, process)
    rows = torch.arange(noisy.zt.numel())
    root = torch.full_like(rows, process.vocabulary.root)
    said: list[Tensor] = []

    def keep(prediction: CleanDistribution, idx: Tensor) -> Tensor:
        said.append(prediction.log_mass(0).double())
        return idx

    twin.query(noisy, Context(), rows, root, keep)
    expected = torch.cat(said)
    if isinstance(
        twin.reading, type(PARAMETERIZATIONS["all"])
    ):  # a copy of the denoiser holds a copy of its reading
        expected = drop_own_evidence(
            expected, process.log_likelihood(noisy.zt.reshape(-1), noisy.t.reshape(-1))
        )
    got = _log_p(twin, process, noisy, Context()).reshape(len(rows), -1)
    yield compare(got.exp(), expected.exp(), {"zt": noisy.zt.reshape(-1)})


DENOISER_LAWS: tuple[Law, ...] = (
    rows_have_laws,
    batches_agree,
    padding_is_invisible,
    documents_are_apart,
    evidence_is_dropped,
)


def check_denoiser(denoiser: Denoiser, process: ForwardProcess) -> list[LawReport]:
    """Every law of a denoiser (backbone + head) beside a small process on the same vocabulary."""
    return evaluate_laws(denoiser, DENOISER_LAWS, process=process)
