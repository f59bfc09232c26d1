"""Conformance checks of the formulas that `ForwardProcess` derives from its transitions.

The formulas are the reverse posterior, the integrand of the bound (`density`), its decoding term
(`decode_nll` at the first noise time) and its prior term (`closing_kl` at the last noise time).

A process may override a derived formula for speed or accuracy. The laws named "override = derived"
compare the result of the override with that of the method of `ForwardProcess`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.oracle import propagate
from ddiff.core.prediction import DenseDistribution, Score
from ddiff.core.process import ForwardProcess, TrainedPart
from ddiff.testing.probes import (
    ENDS,
    INNER,
    STEPS,
    ReachableRows,
    certain_log_probs,
    evaluate_below,
    likelihoods,
    product,
    random_log_probs,
    times,
    token_likelihoods,
)
from ddiff.testing.report import Gap, compare, law

NEAR_ENDS = (1e-3, 1.0 - 1e-3)


def is_overridden(process: ForwardProcess, method: str) -> bool:
    """Return True if the class of a process overrides the named method of `ForwardProcess`."""
    for cls in type(process).__mro__:
        if method in vars(cls):
            return cls is not ForwardProcess
    return False


def score_from_distribution(
    process: ForwardProcess,
    log_p: Tensor,
    zt: Tensor,
    t: Tensor,
) -> Score:
    """Convert log_p [r,V], log-distributions of the clean token, into scores at the states zt [r].

    The scores [r,S] contain ln( q(y) / q(zt) ) for each of the S states y, where q is the marginal
    at time t of a token with the distribution exp(log_p).
    """
    log_marginal = process.log_marginal(log_p, t)
    return Score(log_marginal - log_marginal.gather(-1, zt.unsqueeze(-1)))


def make_certain(process: ForwardProcess, x0: Tensor) -> DenseDistribution:
    """Return predictions that give the tokens x0 [r] probability 1."""
    vocabulary = process.vocabulary
    return DenseDistribution(certain_log_probs(vocabulary.num_tokens)[x0], vocabulary)


@law("posterior = Bayes' rule", tolerance=1e-6)
def posterior_is_bayes(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `reverse_log_probs` is Bayes' rule with transitions integrated from the rates.

    Let z be the state at time t, y the state at time s <= t, p the predicted distribution of the
    token x, and P(z|y) the integrated transition. As a formula: P(y|z) = sum_x p(x) q_s(y|x) P(z|y)
    / sum_x p(x) q_t(z|x). The pairs (s, t) include s = t. Tolerance 1e-6: the integration has an
    error of 1e-9, and it is divided by the probability of z, which is at least 1e-3.
    """

    def generator(time: Tensor) -> Tensor:
        return process.rates(time).dense()

    vocabulary = process.vocabulary
    pairs = times(*STEPS, (0.5, 0.5)).reshape(-1, 2)
    # integrate P(z|y) from the rates, without `process.transition`
    moves = propagate(
        generator,
        pairs[:, 0],
        pairs[:, 1],
        vocabulary.num_states,
        300,
    )
    before = likelihoods(process, pairs[:, 0])
    for log_p in random_log_probs(vocabulary.num_tokens):
        joint = (log_p.exp() @ before).unsqueeze(-1) * moves  # [pairs, y, z]
        pair, zt = product(
            torch.arange(len(pairs)),
            torch.arange(vocabulary.num_states),
        )
        # dividing by a small probability would multiply the error of the integration
        likely = joint.sum(1)[pair, zt] > 1e-3
        pair = pair[likely]
        zt = zt[likely]
        expected = joint[pair, :, zt]
        expected = expected / expected.sum(-1, keepdim=True)
        s, t = pairs[pair].T
        got = process.reverse_log_probs(log_p.expand(len(zt), -1), zt, t, s).exp()
        yield compare(
            got,
            expected,
            {"zt": zt, "s": s, "t": t},
        )


# ------------------------------------------------------------------ the diffusion term


@law("override = derived: density", tolerance=1e-9)
def density_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """Check that an overridden `density`, the integrand of the bound, equals the derived formula.

    The derived formula is the score entropy, computed from the rates and marginals of the process.
    The error is relative to 1 + density. Tolerance 1e-9: the score entropy subtracts large numbers.
    """
    if is_overridden(process, "density"):
        rows = ReachableRows(process, times(INNER, NEAR_ENDS))
        derived = ForwardProcess.density(process, rows.dist, *rows.args)
        got = process.density(rows.dist, *rows.args)
        yield compare(
            got,
            derived,
            rows.labels,
            relative_to=1.0 + derived.abs(),
        )


@law("density: equal for a score and its distribution", tolerance=1e-9)
def density_accepts_scores(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `density`, the integrand of the bound, is equal for a distribution and its score.

    The score consists of ratios of marginals under the predicted distribution. The error is
    relative to 1 + density. Tolerance 1e-9: float64 rounding.
    """
    rows = ReachableRows(process, times(INNER))
    score = score_from_distribution(process, rows.log_p, rows.zt, rows.t)
    expected = process.density(rows.dist, *rows.args)
    got = process.density(score, *rows.args)
    yield compare(
        got,
        expected,
        rows.labels,
        relative_to=1.0 + expected.abs(),
    )


@law("override = derived: weight", tolerance=1e-9)
def weight_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the weight of a state z in the bound is the total true reverse rate out of z.

    As a formula, the weight is the sum over states y != z of Q[y,z] q_t(y|x) / q_t(z|x), where x is
    the clean token and Q[y,z] the forward rate from y to z. The weight is 0 if no state moves to z.
    All implementations of a process then have the same weights, so a loss that clips weights is
    also the same. The error is relative. Tolerance 1e-9: float64 rounding.
    """
    rows = ReachableRows(process, times(INNER, NEAR_ENDS))
    expected = ForwardProcess.weight(process, *rows.args)
    yield compare(
        process.weight(*rows.args),
        expected,
        rows.labels,
        relative_to=1.0 + expected,
    )


@law("weight * divergence = density", tolerance=1e-9)
def weight_times_divergence_is_density(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `weight` times `divergence` is `density`, the integrand of the bound.

    Neither weight nor divergence may be negative. The error is relative to 1 + density. Tolerance
    1e-9: float64 rounding.
    """
    rows = ReachableRows(process, times(INNER))
    weight = process.weight(*rows.args)
    divergence = process.divergence(rows.dist, *rows.args)
    density = process.density(rows.dist, *rows.args)
    yield compare(
        weight * divergence,
        density,
        rows.labels,
        relative_to=1.0 + density.abs(),
    )
    # the densities may agree with two wrong signs
    yield compare(weight.clamp(max=0.0), 0.0, rows.labels)
    yield compare(divergence.clamp(max=0.0), 0.0, rows.labels)


@law("density: finite, not negative, zero for the true token", tolerance=1e-9)
def density_is_a_divergence(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `density`, the integrand of the bound, is finite and not negative.

    The density must be 0 if the true token is predicted with probability 1. The tested times
    include 1e-6 and 1 - 1e-6, where a weight of up to 1e6 multiplies the rounding error of the
    divergence. The error is therefore relative to 1 + weight. Tolerance 1e-9: float64 rounding.
    """
    rows = ReachableRows(
        process,
        times(INNER, (1e-6, 1.0 - 1e-6)),
    )
    density = process.density(rows.dist, *rows.args)
    scale = 1.0 + process.weight(*rows.args)
    yield compare(
        density.clamp(max=0.0),
        0.0,
        rows.labels,
        relative_to=scale,
    )
    yield compare(
        density.isfinite().double(),
        1.0,
        {"finite density at": "", **rows.labels},
    )
    certain = make_certain(process, rows.x0)
    yield compare(
        process.density(certain, *rows.args),
        0.0,
        rows.labels,
        relative_to=scale,
    )


# --------------------------------------------------- posterior, decoding term, prior term


@law("override = derived: log_likelihood", tolerance=1e-10)
def likelihood_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """Check that an overridden `log_likelihood(z, t)` returns log q_t(z|x) for every token x.

    The expected values are computed from `log_marginal`. Probabilities are compared, not their
    logarithms. Tolerance 1e-10: float64 rounding.
    """
    if is_overridden(process, "log_likelihood"):
        t, zt = product(
            times(INNER, ENDS),
            torch.arange(process.vocabulary.num_states),
        )
        derived = ForwardProcess.log_likelihood(process, zt, t).exp()
        yield compare(
            process.log_likelihood(zt, t).exp(),
            derived,
            {"zt": zt, "t": t},
        )


@law("override = derived: reverse_log_probs", tolerance=1e-9)
def posterior_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """Check an overridden `reverse_log_probs` against Bayes' rule with the process's transitions.

    The steps from t to s include one from t = 1 to s = 0. Tolerance 1e-9: float64 rounding.
    """
    if is_overridden(process, "reverse_log_probs"):
        for s, t in (*STEPS, (0.0, 1.0), (0.0, 0.5)):
            rows = ReachableRows(process, times((t,)))
            arguments = (rows.log_p, rows.zt, rows.t, torch.full_like(rows.t, s))
            derived = ForwardProcess.reverse_log_probs(process, *arguments).exp()
            got = process.reverse_log_probs(*arguments).exp()
            yield compare(got, derived, rows.labels)


@law("override = derived: decode_nll", tolerance=1e-9)
def decode_nll_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """Check that an overridden `decode_nll` is -ln P(x|z) for the posterior P of token x.

    Given a state z, P(x|z) is p(x) q_t(z|x), normalized over x, where p is the prediction. The
    factor q_t(z|x) must not be omitted. The error is relative. Tolerance 1e-9: float64 rounding.
    """
    if is_overridden(process, "decode_nll"):
        rows = ReachableRows(process, times(INNER, ENDS, (1e-6,)))
        evidence = token_likelihoods(process, rows.zt, rows.t).log()
        posterior = (rows.log_p + evidence).log_softmax(-1)
        expected = -posterior.gather(-1, rows.x0.unsqueeze(-1)).squeeze(-1)
        got = process.decode_nll(rows.dist, *rows.args)
        yield compare(
            got,
            expected,
            rows.labels,
            relative_to=1.0 + expected.abs(),
        )


@law("override = derived: closing_kl", tolerance=1e-9)
def closing_kl_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `closing_kl`, the prior term of the bound, is KL( q_t(.|x) || predicted q_t ).

    The predicted q_t is the marginal of the state at t if the token is drawn from the prediction.
    If the process has `closes_at_prior`, `closing_kl` must be 0 at t = 1. Tolerance 1e-9: float64
    rounding.
    """
    vocabulary = process.vocabulary
    log_probs = random_log_probs(vocabulary.num_tokens)
    tokens = torch.arange(vocabulary.num_tokens)
    index, x0, t = product(
        torch.arange(len(log_probs)),
        tokens,
        times(INNER, (1.0,)),
    )
    prediction = DenseDistribution(log_probs[index], vocabulary)
    got = process.closing_kl(prediction, x0, t)
    if is_overridden(process, "closing_kl"):
        # make a new prediction, so that results cached by the first call are not reused
        prediction = DenseDistribution(log_probs[index], vocabulary)
        expected = ForwardProcess.closing_kl(process, prediction, x0, t)
        yield compare(got, expected, {"x0": x0, "t": t})
    if process.closes_at_prior:
        at_prior = t == 1.0
        yield compare(
            got[at_prior],
            0.0,
            {"x0": x0[at_prior], "t": "1"},
        )


# ------------------------------------------------------------------ inputs of the formulas


@law("active: the density is 0 in inactive states", tolerance=1e-12)
def active_covers_density(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `density`, the integrand of the bound, is 0 in states that `active` excludes.

    Training and evaluation do not query the network in these states. Tolerance 1e-12: float64
    rounding of the derived formula.
    """
    rows = ReachableRows(process, times(INNER))
    inactive = ~process.active(rows.zt)
    density = process.density(rows.dist, *rows.args)
    yield compare(
        density[inactive],
        0.0,
        rows.select(inactive).labels,
    )


@law("scope: formulas use only tokens below the scope node", tolerance=1e-9)
def scope_suffices(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `divergence` and `decode_nll` use only the tokens below the node `scope(z)`.

    For a state z, the network is queried only below the node `scope(z)` of the vocabulary's tree. A
    prediction that is restricted to the tokens below this node must give the same values as the
    whole prediction. Every scope must be an inner node of the tree. The error is relative.
    Tolerance 1e-9: rounding of normalization.
    """
    rows = ReachableRows(process, times(INNER))
    scope = process.scope(rows.zt)
    is_node = scope >= process.vocabulary.num_tokens
    yield compare(
        is_node.double(),
        1.0,
        {"the scope is an inner node, zt": rows.zt},
    )
    # the divergence is only evaluated in active states
    everywhere = torch.ones_like(rows.zt, dtype=torch.bool)
    formulas = (
        (process.divergence, process.active(rows.zt)),
        (process.decode_nll, everywhere),
    )
    for formula, chosen in formulas:
        some = rows.select(chosen)
        vocabulary = process.vocabulary
        got = evaluate_below(
            formula,
            some.log_p,
            scope[chosen],
            vocabulary,
            *some.args,
        )
        expected = formula(some.dist, *some.args)
        yield compare(
            got,
            expected,
            some.labels,
            relative_to=1.0 + expected.abs(),
        )


@law("trained_part: the density depends on this part only", tolerance=1e-9)
def trained_part_suffices(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the integrand of the bound uses only probabilities that `trained_part` selects.

    For each state, `trained_part` selects no probability, the conditional distribution below the
    state, or all probabilities. The integrand, `density`, must be equal for two predictions that
    differ only in probabilities that are not selected. The error is relative. Tolerance 1e-9:
    float64 rounding.
    """
    rows = ReachableRows(process, times(INNER))
    trained = process.trained_part(rows.zt)
    expected = process.density(rows.dist, *rows.args)
    changes = {
        TrainedPart.NONE: _change_everywhere(rows.log_p),
        TrainedPart.BELOW_NODE: _change_outside(process, rows.log_p, rows.zt),
    }
    for code, log_p in changes.items():
        here = trained == code
        changed = DenseDistribution(log_p, process.vocabulary)
        got = process.density(changed, *rows.args)[here]
        due = expected[here]
        yield compare(
            got,
            due,
            rows.select(here).labels,
            relative_to=1.0 + due.abs(),
        )


def _change_everywhere(log_p: Tensor) -> Tensor:
    # the seed differs from that of the predictions
    tilt = random_log_probs(log_p.shape[-1], 1, seed=5)
    return (0.5 * log_p + tilt).log_softmax(-1)


def _change_outside(
    process: ForwardProcess,
    log_p: Tensor,
    zt: Tensor,
) -> Tensor:
    """Return other log-distributions, equal to `log_p` given that the token is below the state.

    Row i has the log-distribution log_p[i] and the state zt[i].
    """
    vocabulary = process.vocabulary
    tokens = torch.arange(vocabulary.num_tokens).unsqueeze(0)
    ancestor = vocabulary.ancestor(
        tokens,
        vocabulary.level_of(zt).unsqueeze(-1),
    )
    below = ancestor == zt.unsqueeze(-1)
    # a constant below the node keeps the conditional distribution there
    return torch.where(below, log_p + 0.7, _change_everywhere(log_p)).log_softmax(-1)
