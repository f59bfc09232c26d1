"""Conformance checks of the forward chain by enumeration: generator, transitions, marginals.

Notation: Q_t[y,z] is the rate from state y to state z, P(s,t) the matrix of transition
probabilities from time s to time t, and q_t(z|x) the marginal of the state z at time t for the
clean token x.
"""

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

# (s, t) of transitions within [0, 1]
PAIRS = ((0.31, 0.77), (0.02, 0.97), (0.5, 0.5), (1e-3, 0.5), (0.5, 1.0 - 1e-3))
PAIRS_TO_ENDS = ((0.0, 1.0), (0.0, 0.0), (1.0, 1.0), (0.0, 0.5), (0.5, 1.0))
PAIRS_FROM_CLEAN = ((0.0, 0.31), (0.0, 0.97), (0.0, 1.0), (1e-6, 0.5), (0.31, 0.77), (0.5, 1.0))
# (s, u, t) with u between s and t
TRIPLES = (
    (0.0, 0.31, 0.77),
    (1e-6, 0.02, 0.5),
    (0.31, 0.5, 1.0),
    (0.5, 0.97, 1.0 - 1e-6),
    (0.0, 0.5, 1.0),
)


@law("rates: rows sum to zero", tolerance=1e-9)
def rates_rows_sum_to_zero(process: ForwardProcess) -> Iterator[Gap]:
    """Check that each row of the generator Q_t sums to 0, because probability is conserved.

    The error is relative to the largest rate. Tolerance 1e-9: float64 rounding of sums over the
    states.
    """
    t = times(INNER, NEAR_ENDS, ENDS)
    rates = process.rates(t).dense()
    scale = rates.abs().amax((1, 2)).clamp(min=1.0).unsqueeze(-1)
    yield compare(rates.sum(-1), 0.0, {"t": t}, relative_to=scale)


@law("rates: off-diagonal entries are not negative", tolerance=1e-9)
def rates_are_not_negative(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the rate Q_t[y,z] from a state y to another state z is not negative.

    The error is relative to the largest rate. Tolerance 1e-9: a rate that is computed as a
    difference may round below 0.
    """
    t = times(INNER, NEAR_ENDS, ENDS)
    rates = process.rates(t).dense()
    # the diagonal is negative by definition
    off_diagonal = rates - torch.diag_embed(rates.diagonal(dim1=-2, dim2=-1))
    scale = rates.abs().amax((1, 2), keepdim=True).clamp(min=1.0)
    yield compare(
        (-off_diagonal).clamp(min=0.0),
        0.0,
        {"t": t},
        relative_to=scale,
    )


@law("kernels: row, column and apply agree", tolerance=1e-12)
def kernels_agree(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the methods `row`, `column`, `apply` and `dense` of a kernel describe one matrix.

    A kernel is a matrix over the states. The check tests the kernels `rates(t)` and `transition(0.3
    t, t)`. The error is relative to the largest entry. Tolerance 1e-12: the methods sum in
    different orders.
    """
    t, ids = product(
        times(INNER, NEAR_ENDS, ENDS),
        torch.arange(process.vocabulary.num_states),
    )
    # transitions from 0.3 t include long and short steps
    for kernel in (process.rates(t), process.transition(t * 0.3, t)):
        yield from kernel_gaps(kernel, ids, {"t": t})


def kernel_gaps(
    kernel: Kernel,
    ids: Tensor,
    labels: dict[str, Tensor],
) -> Iterator[Gap]:
    """Compare the methods `dense`, `column`, `row` and `apply` of a kernel with one matrix.

    The matrix is built from the results of `row` for single states. `column` and `row` are compared
    at the states `ids` [r]. `labels` describe the place of a difference in the report.
    """
    states = torch.arange(kernel.num_states)
    # single rows are the definition, because a subclass may override `dense`
    dense = torch.stack(
        [kernel.row(torch.full_like(ids, int(y))) for y in states],
        1,
    )
    row = torch.arange(len(ids))
    at_state = {**labels, "state": ids}
    scale = dense.abs().amax((1, 2)).clamp(min=1.0).unsqueeze(-1)
    yield compare(
        kernel.dense(),
        dense,
        labels,
        relative_to=scale.unsqueeze(-1),
    )
    yield compare(
        kernel.column(ids),
        dense[row, :, ids],
        at_state,
        relative_to=scale,
    )
    yield compare(
        kernel.row(ids),
        dense[row, ids],
        at_state,
        relative_to=scale,
    )
    vector = random_log_probs(kernel.num_states, 1).exp().expand(len(ids), -1)
    expected = (vector.unsqueeze(1) @ dense).squeeze(1)
    yield compare(kernel.apply(vector), expected, labels, relative_to=scale)


@law("transition: rows are distributions", tolerance=1e-9)
def transition_rows_are_distributions(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the transition probabilities P(z_t | z_s) are >= 0 and sum to 1 over z_t.

    The pairs (s, t) include (0, 1) and pairs with s = t. Tolerance 1e-9: float64 rounding of
    products over many small time steps.
    """
    s, t = times(*PAIRS, *PAIRS_TO_ENDS).reshape(-1, 2).T
    kernel = process.transition(s, t).dense()
    yield compare(kernel.sum(-1), 1.0, {"s": s, "t": t})
    yield compare(
        kernel.clamp(max=0.0),
        0.0,
        {"s": s, "t": t},
    )


@law("transition = time-ordered integral of the rates", tolerance=1e-7)
def transition_is_oracle(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the matrix P(s,t) of `transition(s, t)` solves dP/dt = P Q_t.

    Q_t is the generator `rates(t)` of the same process, and P(s,s) is the identity. The transition
    is compared with the result of a Magnus integrator with 300 steps. Tolerance 1e-7: the
    integrator has an error of at most 1e-8.
    """

    def generator(time: Tensor) -> Tensor:
        return process.rates(time).dense()

    s, t = times(*PAIRS).reshape(-1, 2).T
    oracle = propagate(
        generator,
        s,
        t,
        process.vocabulary.num_states,
        steps=300,
    )
    yield compare(
        process.transition(s, t).dense(),
        oracle,
        {"s": s, "t": t},
    )


@law("Chapman-Kolmogorov", tolerance=1e-6)
def chapman_kolmogorov(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the transition matrix P of the states satisfies P(s,u) P(u,t) = P(s,t).

    The triples s < u < t include one with s = 0 and t = 1. Tolerance 1e-6: a transition that is
    computed numerically over all of [0,1] has an error of 1e-7.
    """
    s, u, t = times(*TRIPLES).reshape(-1, 3).T
    whole = process.transition(s, t).dense()
    composed = process.transition(s, u).dense() @ process.transition(u, t).dense()
    yield compare(
        composed,
        whole,
        {"s": s, "u": u, "t": t},
    )


@law("marginal follows the transitions", tolerance=1e-6)
def marginal_follows_transitions(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the marginal at t is the marginal at s times the transition from s to t.

    As a formula: q_t(.|x) = q_s(.|x) P(s,t) for every token x, where q are row vectors of marginal
    probabilities and P(s,t) is the transition matrix. The pairs (s, t) include s = 0. Tolerance
    1e-6: a transition that is computed numerically over all of [0,1] has an error of 1e-7.
    """
    s, t = times(*PAIRS_FROM_CLEAN).reshape(-1, 2).T
    # marginals are row vectors: q_t = q_s P
    moved = likelihoods(process, s) @ process.transition(s, t).dense()
    yield compare(
        moved,
        likelihoods(process, t),
        {"s": s, "t": t},
    )


@law("marginal: total probability", tolerance=1e-10)
def total_probability(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `log_marginal` under p is the log of the mixture sum_x p(x) q_t(.|x).

    Here p is a distribution of tokens x, and q_t(.|x) is the marginal for one token. The mixture
    must sum to 1. The times include t = 0 and t = 1. Tolerance 1e-10: float64 rounding of sums over
    the tokens.
    """
    t = times(INNER, NEAR_ENDS, ENDS)
    num_tokens = process.vocabulary.num_tokens
    for log_p in (*random_log_probs(num_tokens), *certain_log_probs(num_tokens)):
        marginal = process.log_marginal(log_p.expand(len(t), -1), t).exp()
        mixture = (log_p.exp().unsqueeze(0) @ likelihoods(process, t)).squeeze(1)
        yield compare(marginal.sum(-1), 1.0, {"t": t})
        yield compare(marginal, mixture, {"t": t})


@law("ends: marginals are as declared", tolerance=1e-9)
def ends_as_declared(process: ForwardProcess) -> Iterator[Gap]:
    """Check the marginals q_t(.|x) at t = 0 and t = 1 against the flags of the process.

    If `closes_at_clean` is set, q_0(.|x) must have probability 1 at the token x. If
    `closes_at_prior` is set, q_1(.|x) must be the prior for every x. The prior must sum to 1.
    Tolerance 1e-9: the error of processes that integrate dense rates.
    """
    vocabulary = process.vocabulary
    # each marginal has the shape [V,S]
    at_clean, at_prior = likelihoods(process, times(ENDS))
    prior = process.prior.log_prob.exp()
    yield compare(prior.sum(), 1.0, {"the prior's": "sum"})
    if process.closes_at_clean:
        certain = torch.eye(vocabulary.num_tokens, vocabulary.num_states).double()
        yield compare(at_clean, certain, {"t": "0"})
    if process.closes_at_prior:
        yield compare(at_prior, prior, {"t": "1"})


@law("ends: marginals are continuous", tolerance=0.8)
def ends_are_approached(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the marginals are continuous at t = 0 and t = 1.

    A jump at t = 0 or t = 1 would have a cost that the bound does not include. Let d(e) be the
    difference of the marginals at t = e and t = 0, or at t = 1 - e and t = 1. The error is d(1e-12)
    / d(1e-9). It is 0 if d(1e-12) is below 1e-7, the error of a numerical transition.

    Tolerance 0.8: for a jump, the ratio is 1. If the marginal approaches its value at t = 1 as
    (1-t)^a, the ratio is 10^(-3a), which is below 0.8 for a >= 0.04.
    """
    for end, far, near in ((0.0, 1e-9, 1e-12), (1.0, 1.0 - 1e-9, 1.0 - 1e-12)):
        at_end, at_far, at_near = likelihoods(process, times((end, far, near)))
        distance = (at_near - at_end).abs()
        ratio = distance / (at_far - at_end).abs()
        yield compare(
            torch.where(distance > 1e-7, ratio, 0.0),
            0.0,
            {"t towards": end},
        )


@law("ends: no NaN and finite rates", tolerance=0.0)
def safe_at_ends(process: ForwardProcess) -> Iterator[Gap]:
    """Check that no marginal, likelihood or transition is NaN at t = 0 or t = 1.

    The rates must be finite at both times. Tolerance 0: the conditions are exact.
    """
    vocabulary = process.vocabulary
    t, zt = product(
        times(ENDS),
        torch.arange(vocabulary.num_states),
    )
    # one prediction is enough: values at the ends do not depend on it
    log_p = random_log_probs(vocabulary.num_tokens, 1).expand(len(t), -1)
    finite = process.rates(t).dense().isfinite()
    yield compare(finite.double(), 1.0, {"finite rates at t": t})
    values = {
        "log_marginal": process.log_marginal(log_p, t),
        "log_likelihood": process.log_likelihood(zt, t),
        "transition": process.transition(torch.zeros_like(t), t).dense(),
    }
    for name, value in values.items():
        yield compare(
            value.isnan().double(),
            0.0,
            {f"NaN in {name} at t": t},
        )
