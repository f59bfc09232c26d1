"""Laws of the forward chain: generator, transitions, marginals and ends, all against brute force."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.kernel import Kernel
from ddiff.core.oracle import propagate
from ddiff.core.process import ForwardProcess
from ddiff.testing.probes import (
    ENDS,
    INNER,
    NEAR_ENDS,
    certain_log_probs,
    likelihoods,
    product,
    random_log_probs,
    times,
)
from ddiff.testing.report import Gap, compare, law

PAIRS = ((0.31, 0.77), (0.02, 0.97), (0.5, 0.5), (1e-3, 0.5), (0.5, 1.0 - 1e-3))
TRIPLES = (
    (0.0, 0.31, 0.77),
    (1e-6, 0.02, 0.5),
    (0.31, 0.5, 1.0),
    (0.5, 0.97, 1.0 - 1e-6),
    (0.0, 0.5, 1.0),
)


@law("rates: rows sum to zero", tolerance=1e-9)
def rates_rows_sum_to_zero(process: ForwardProcess) -> Iterator[Gap]:
    """Each row of Q_t sums to 0, since a state only moves. Relative to the largest rate: rounding of S sums."""
    t = times(INNER, NEAR_ENDS, ENDS)
    rates = process.rates(t).dense()
    yield compare(
        rates.sum(-1), 0.0, {"t": t}, rates.abs().amax((1, 2)).clamp(min=1.0).unsqueeze(-1)
    )


@law("rates: off the diagonal never negative", tolerance=1e-9)
def rates_are_not_negative(process: ForwardProcess) -> Iterator[Gap]:
    """Q_t[y,z] >= 0 for y != z. Relative to the largest rate: a difference of two terms may round below 0."""
    t = times(INNER, NEAR_ENDS, ENDS)
    rates = process.rates(t).dense()
    off_diagonal = rates - torch.diag_embed(rates.diagonal(dim1=-2, dim2=-1))
    scale = rates.abs().amax((1, 2), keepdim=True).clamp(min=1.0)
    yield compare((-off_diagonal).clamp(min=0.0), 0.0, {"t": t}, scale)


@law("kernels: row, column and apply agree", tolerance=1e-12)
def kernels_agree(process: ForwardProcess) -> Iterator[Gap]:
    """`row`, `column` and `apply` are one matrix, for rates and transitions. Only the order of sums differs (relative)."""
    t, ids = product(times(INNER, NEAR_ENDS, ENDS), torch.arange(process.vocabulary.num_states))
    for kernel in (process.rates(t), process.transition(t * 0.3, t)):
        yield from kernel_gaps(kernel, ids, {"t": t})


def kernel_gaps(kernel: Kernel, ids: Tensor, labels: dict[str, Tensor]) -> Iterator[Gap]:
    """The gaps between a kernel's structured answers about states ids [r] and its dense form."""
    states = torch.arange(kernel.num_states)
    # rows one at a time are the definition: `dense` may be overridden too
    dense = torch.stack([kernel.row(torch.full_like(ids, int(y))) for y in states], 1)
    pick, here = torch.arange(len(ids)), {**labels, "state": ids}
    scale = dense.abs().amax((1, 2)).clamp(min=1.0).unsqueeze(-1)
    yield compare(kernel.dense(), dense, labels, scale.unsqueeze(-1))
    yield compare(kernel.column(ids), dense[pick, :, ids], here, scale)
    yield compare(kernel.row(ids), dense[pick, ids], here, scale)
    vector = random_log_probs(kernel.num_states, 1).exp().expand(len(ids), -1)
    yield compare(kernel.apply(vector), (vector.unsqueeze(1) @ dense).squeeze(1), labels, scale)


@law("transition: rows are laws", tolerance=1e-9)
def transition_rows_are_laws(process: ForwardProcess) -> Iterator[Gap]:
    """P(z_t | z_s) >= 0 with sum 1, the whole interval and s = t included. Rounding of time-ordered products: 1e-9."""
    ends = ((0.0, 1.0), (0.0, 0.0), (1.0, 1.0), (0.0, 0.5), (0.5, 1.0))
    s, t = times(*PAIRS, *ends).reshape(-1, 2).T
    kernel = process.transition(s, t).dense()
    yield compare(kernel.sum(-1), 1.0, {"s": s, "t": t})
    yield compare(kernel.clamp(max=0.0), 0.0, {"s": s, "t": t})


@law("transition = time-ordered integral of the rates", tolerance=1e-7)
def transition_is_oracle(process: ForwardProcess) -> Iterator[Gap]:
    """P solves dP/dt = P Q_t with P(s,s) = 1: equal to the Magnus oracle, whose 300 steps leave 1e-8 at most."""
    s, t = times(*PAIRS).reshape(-1, 2).T
    generator = lambda time: process.rates(time).dense()  # noqa: E731
    oracle = propagate(generator, s, t, process.vocabulary.num_states, steps=300)
    yield compare(process.transition(s, t).dense(), oracle, {"s": s, "t": t})


@law("Chapman-Kolmogorov", tolerance=1e-6)
def chapman_kolmogorov(process: ForwardProcess) -> Iterator[Gap]:
    """P(s,u) P(u,t) = P(s,t), from clean to prior as well. A numerical product over all of [0,1] leaves 1e-7."""
    s, u, t = times(*TRIPLES).reshape(-1, 3).T
    whole = process.transition(s, t).dense()
    yield compare(
        process.transition(s, u).dense() @ process.transition(u, t).dense(),
        whole,
        {"s": s, "u": u, "t": t},
    )


@law("marginal follows the transitions", tolerance=1e-6)
def marginal_follows_transitions(process: ForwardProcess) -> Iterator[Gap]:
    """q_t(.|x) = q_s(.|x) P(s,t), also from s = 0. A numerical product over all of [0,1] leaves 1e-7."""
    s, t = (
        times((0.0, 0.31), (0.0, 0.97), (0.0, 1.0), (1e-6, 0.5), (0.31, 0.77), (0.5, 1.0))
        .reshape(-1, 2)
        .T
    )
    moved = likelihoods(process, s) @ process.transition(s, t).dense()
    yield compare(moved, likelihoods(process, t), {"s": s, "t": t})


@law("marginal: total probability", tolerance=1e-10)
def total_probability(process: ForwardProcess) -> Iterator[Gap]:
    """log_marginal(p, t) is the mixture of q_t(.|x) over p and sums to 1, at both ends too. Rounding of V terms."""
    t = times(INNER, NEAR_ENDS, ENDS)
    for log_p in (
        *random_log_probs(process.vocabulary.num_tokens),
        *certain_log_probs(process.vocabulary.num_tokens),
    ):
        marginal = process.log_marginal(log_p.expand(len(t), -1), t).exp()
        yield compare(marginal.sum(-1), 1.0, {"t": t})
        yield compare(
            marginal, (log_p.exp().unsqueeze(0) @ likelihoods(process, t)).squeeze(1), {"t": t}
        )


@law("ends as declared", tolerance=1e-9)
def ends_as_declared(process: ForwardProcess) -> Iterator[Gap]:
    """closes_at_clean: q_0(.|x) = delta_x; closes_at_prior: q_1(.|x) = prior, a law. 1e-9 is what dense chains leave."""
    clean, prior = likelihoods(process, times(ENDS))
    yield compare(process.prior.log_prob.exp().sum(), 1.0, {"the prior's": "sum"})
    if process.closes_at_clean:
        yield compare(
            clean,
            torch.eye(process.vocabulary.num_tokens, process.vocabulary.num_states).double(),
            {"t": "0"},
        )
    if process.closes_at_prior:
        yield compare(prior, process.prior.log_prob.exp(), {"t": "1"})


@law("ends are approached", tolerance=0.8)
def ends_are_approached(process: ForwardProcess) -> Iterator[Gap]:
    """A thousand times nearer to an end, the marginal is nearer to its value there; a jump would be missed by the bound.

    The error is the ratio of the two distances: 10^(-3a) for a chain that closes as (1-t)^a, so 0.8 admits a >= 0.04 and
    refuses a jump (1). Distances below 1e-7 count as arrived: rounding of an oracle.
    """
    for end, far, near in ((0.0, 1e-9, 1e-12), (1.0, 1.0 - 1e-9, 1.0 - 1e-12)):
        at_end, at_far, at_near = likelihoods(process, times((end, far, near)))
        distance = (at_near - at_end).abs()
        yield compare(
            torch.where(distance > 1e-7, distance / (at_far - at_end).abs(), 0.0),
            0.0,
            {"t towards": end},
        )


@law("safe at both ends", tolerance=0.0)
def safe_at_ends(process: ForwardProcess) -> Iterator[Gap]:
    """At t = 0 and t = 1 no marginal, likelihood, rate or transition is NaN, and rates are finite: nothing is allowed."""
    vocabulary = process.vocabulary
    t, zt = product(times(ENDS), torch.arange(vocabulary.num_states))
    log_p = random_log_probs(vocabulary.num_tokens, 1).expand(len(t), -1)
    yield compare(process.rates(t).dense().isfinite().double(), 1.0, {"finite rates at t": t})
    for name, values in (
        ("log_marginal", process.log_marginal(log_p, t)),
        ("log_likelihood", process.log_likelihood(zt, t)),
        ("transition", process.transition(torch.zeros_like(t), t).dense()),
    ):
        yield compare(values.isnan().double(), 0.0, {f"NaN in {name} at t": t})
