"""Laws of the formulas derived from the chain: posterior, bound density, end terms.

A process may override a derived formula for speed or accuracy; "override = derived" laws compare
the override with `ForwardProcess`.
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
    """True if a subclass replaces this method of `ForwardProcess`."""
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
    """Score of the states [r,S] that a distribution log_p [r,V] of the clean token implies."""
    log_marginal = process.log_marginal(log_p, t)
    return Score(log_marginal - log_marginal.gather(-1, zt.unsqueeze(-1)))


def make_certain(process: ForwardProcess, x0: Tensor) -> DenseDistribution:
    """Predictions that put all their mass on the tokens x0 [r]."""
    vocabulary = process.vocabulary
    return DenseDistribution(certain_log_probs(vocabulary.num_tokens)[x0], vocabulary)


@law("posterior = Bayes' rule", tolerance=1e-6)
def posterior_is_bayes(process: ForwardProcess) -> Iterator[Gap]:
    """reverse_log_probs = sum_x p(x) q_s(y|x) P(z|y) / sum_x p(x) q_t(z|x), with P integrated from
    the rates; s = t is included.

    Tolerance: the integration has an error of 1e-9, which is divided by the probability of z, here
    at least 1e-3.
    """

    def generator(time: Tensor) -> Tensor:
        return process.rates(time).dense()

    vocabulary = process.vocabulary
    pairs = times(*STEPS, (0.5, 0.5)).reshape(-1, 2)
    # P(z|y), independent of the process's own transition
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
    """The process's density is the score entropy of its own rates and marginals. Tolerance:
    relative, since the derived formula subtracts."""
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
    """A score has the density of the distribution that it is computed from.

    The score holds the ratios of the marginals under the distribution. Tolerance: relative
    rounding.
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
    """The weight is the total true reverse rate, sum_y Q[y,z] q_t(y|x)/q_t(z|x), and 0 if nothing
    arrives in z.

    A loss that clips weights is then the same function for every implementation of one chain.
    Tolerance: relative rounding.
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
    """The two factors of the diffusion term multiply to the density, and neither is negative.
    Tolerance: relative rounding."""
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
    """The density is finite and >= 0, and 0 for a prediction certain of the clean token.

    Tolerance: relative to the weight of the row, since at 1e-6 from an end a weight of 1e6
    multiplies the rounding of a divergence of 0.
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


# ------------------------------------------------------------------ posterior and end terms


@law("override = derived: log_likelihood", tolerance=1e-10)
def likelihood_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """log_likelihood(z, t) lists log q_t(z|x) over the tokens x, as given by the marginal.
    Tolerance: rounding of probabilities."""
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
    """The posterior is Bayes' rule applied to the process's own marginal and transition.

    Tried also from t = 1 to s = 0. Tolerance: rounding.
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
    """decode_nll includes the row's own evidence; it is not -ln p(x).

    It is -ln of p(x) q_t(z|x), normalized over x. Tolerance: relative rounding.
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
    """closing_kl is KL( q_t(.|x) || marginal under the prediction ) over all states.

    It is 0 at t = 1 if the process closes at the prior. Tolerance: rounding.
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
        # a prediction of its own, so that nothing that the first call computed is used again
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


# ------------------------------------------------------------------ what the formulas read


@law("active: the density is zero in other states", tolerance=1e-12)
def active_covers_density(process: ForwardProcess) -> Iterator[Gap]:
    """The density is 0 in states that `active` excludes, since the bound skips them. Tolerance:
    relative rounding of the derived formula."""
    rows = ReachableRows(process, times(INNER))
    inactive = ~process.active(rows.zt)
    density = process.density(rows.dist, *rows.args)
    yield compare(
        density[inactive],
        0.0,
        rows.select(inactive).labels,
    )


@law("scope: formulas need nothing above the scope node", tolerance=1e-9)
def scope_suffices(process: ForwardProcess) -> Iterator[Gap]:
    """A prediction restricted to what lies below scope(z) gives the same divergence and the same
    decoding term; every scope is an inner node. Tolerance: rounding of normalizers."""
    rows = ReachableRows(process, times(INNER))
    scope = process.scope(rows.zt)
    is_node = scope >= process.vocabulary.num_tokens
    yield compare(
        is_node.double(),
        1.0,
        {"more than one token in the scope of zt": rows.zt},
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


@law("trained_part: the density ignores the rest", tolerance=1e-9)
def trained_part_suffices(process: ForwardProcess) -> Iterator[Gap]:
    """The density is equal for two predictions that differ only outside of what
    `trained_part` names in a state. Tolerance: rounding."""
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
    # another seed than the predictions have
    tilt = random_log_probs(log_p.shape[-1], 1, seed=5)
    return (0.5 * log_p + tilt).log_softmax(-1)


def _change_outside(
    process: ForwardProcess,
    log_p: Tensor,
    zt: Tensor,
) -> Tensor:
    """Keep the conditional distribution below z_t; change the mass of z_t and everything else."""
    vocabulary = process.vocabulary
    tokens = torch.arange(vocabulary.num_tokens).unsqueeze(0)
    ancestor = vocabulary.ancestor(
        tokens,
        vocabulary.level_of(zt).unsqueeze(-1),
    )
    below = ancestor == zt.unsqueeze(-1)
    # a constant below the node keeps the conditional distribution there
    return torch.where(below, log_p + 0.7, _change_everywhere(log_p)).log_softmax(-1)
