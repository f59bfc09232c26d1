"""Laws of what is derived from the chain: posterior, bound density, end terms, and what of the law they read."""

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
)
from ddiff.testing.report import Gap, compare, law


def overrides(process: ForwardProcess, method: str) -> bool:
    """Whether the family replaced a derived method."""
    return getattr(type(process), method) is not getattr(ForwardProcess, method)


@law("posterior = Bayes", tolerance=1e-6)
def posterior_is_bayes(process: ForwardProcess) -> Iterator[Gap]:
    """reverse_log_probs = sum_x p(x) q_s(y|x) P(z|y) / sum_x p(x) q_t(z|x), with P integrated from the rates.

    The oracle holds 1e-9; dividing by the probability of z, at least 1e-3 of a whole here, leaves 1e-6. s = t is included.
    """
    vocabulary = process.vocabulary
    pairs = times(*STEPS, (0.5, 0.5)).reshape(-1, 2)
    moves = propagate(
        lambda time: process.rates(time).dense(),
        pairs[:, 0],
        pairs[:, 1],
        vocabulary.num_states,
        300,
    )
    before = likelihoods(process, pairs[:, 0])
    for log_p in random_log_probs(vocabulary.num_tokens):
        joint = (log_p.exp() @ before).unsqueeze(-1) * moves  # [pairs, y, z]
        place, zt = product(torch.arange(len(pairs)), torch.arange(vocabulary.num_states))
        likely = joint.sum(1)[place, zt] > 1e-3
        place, zt = place[likely], zt[likely]
        expected = joint[place, :, zt] / joint[place, :, zt].sum(-1, keepdim=True)
        s, t = pairs[place].T
        got = process.reverse_log_probs(log_p.expand(len(zt), -1), zt, t, s).exp()
        yield compare(got, expected, {"zt": zt, "s": s, "t": t})


@law("override = derived: density", tolerance=1e-9)
def density_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """The family's density is the score entropy of its own rates and marginals. Relative: the derived one subtracts."""
    if overrides(process, "density"):
        rows = ReachableRows(process, times(INNER, (1e-3, 1.0 - 1e-3)))
        derived = ForwardProcess.density(process, rows.dist, rows.x0, rows.zt, rows.t)
        got = process.density(rows.dist, rows.x0, rows.zt, rows.t)
        yield compare(got, derived, rows.labels, 1.0 + derived.abs())


@law("a score = the law that it comes from", tolerance=1e-9)
def score_is_law(process: ForwardProcess) -> Iterator[Gap]:
    """Given the ratios of its marginal instead of the law, the density is the same number. Relative rounding."""
    rows = ReachableRows(process, times(INNER))
    log_marginal = process.log_marginal(rows.log_p, rows.t)
    score = Score(log_marginal - log_marginal.gather(-1, rows.zt.unsqueeze(-1)))
    expected = process.density(rows.dist, rows.x0, rows.zt, rows.t)
    yield compare(
        process.density(score, rows.x0, rows.zt, rows.t),
        expected,
        rows.labels,
        1.0 + expected.abs(),
    )


@law("override = derived: weight", tolerance=1e-9)
def weight_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """The weight is the total true reverse rate, sum_y Q[y,z] q_t(y|x)/q_t(z|x), in every family: a loss that holds weights
    in a range is then the same function for the same chain. 0 where nothing arrives. Relative rounding."""
    rows = ReachableRows(process, times(INNER, (1e-3, 1.0 - 1e-3)))
    expected = ForwardProcess.weight(process, rows.x0, rows.zt, rows.t)
    yield compare(process.weight(rows.x0, rows.zt, rows.t), expected, rows.labels, 1.0 + expected)


@law("weight * divergence = density", tolerance=1e-9)
def factors_multiply(process: ForwardProcess) -> Iterator[Gap]:
    """What the bound multiplies is the density, whatever the family's split; neither is negative. Relative rounding."""
    rows = ReachableRows(process, times(INNER))
    weight = process.weight(rows.x0, rows.zt, rows.t)
    divergence = process.divergence(rows.dist, rows.x0, rows.zt, rows.t)
    density = process.density(rows.dist, rows.x0, rows.zt, rows.t)
    yield compare(weight * divergence, density, rows.labels, 1.0 + density.abs())
    yield compare(weight, process.weight(rows.x0, rows.zt, rows.t), rows.labels, 1.0 + weight)
    yield compare(weight.clamp(max=0.0), 0.0, rows.labels)
    yield compare(divergence.clamp(max=0.0), 0.0, rows.labels)


@law("density: finite, not negative, zero for the truth", tolerance=1e-9)
def density_is_a_divergence(process: ForwardProcess) -> Iterator[Gap]:
    """Where z can occur the density is finite and >= 0, and a law that is sure of the clean token is charged nothing.

    Relative to the weight of the row: at 1e-6 from an end a weight of 1e6 multiplies the rounding of a divergence of 0.
    """
    rows = ReachableRows(process, times(INNER, (1e-6, 1.0 - 1e-6)))
    density = process.density(rows.dist, rows.x0, rows.zt, rows.t)
    scale = 1.0 + process.weight(rows.x0, rows.zt, rows.t)
    yield compare(density.clamp(max=0.0), 0.0, rows.labels, scale)
    yield compare(density.isfinite().double(), 1.0, {"finite density at": "", **rows.labels})
    sure = DenseDistribution(
        certain_log_probs(process.vocabulary.num_tokens)[rows.x0], process.vocabulary
    )
    yield compare(process.density(sure, rows.x0, rows.zt, rows.t), 0.0, rows.labels, scale)


@law("override = derived: log_likelihood", tolerance=1e-10)
def likelihood_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """log_likelihood(z, t) lists q_t(z|x) over x, as the marginal has them. Rounding of probabilities."""
    if overrides(process, "log_likelihood"):
        t, zt = product(times(INNER, ENDS), torch.arange(process.vocabulary.num_states))
        derived = ForwardProcess.log_likelihood(process, zt, t).exp()
        yield compare(process.log_likelihood(zt, t).exp(), derived, {"zt": zt, "t": t})


@law("override = derived: reverse_log_probs", tolerance=1e-9)
def posterior_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """The family's posterior is Bayes' rule on its own marginal and transition, from t = 1 to s = 0 too. Rounding."""
    if overrides(process, "reverse_log_probs"):
        for s, t in (*STEPS, (0.0, 1.0), (0.0, 0.5)):
            rows = ReachableRows(process, times((t,)))
            start = torch.full_like(rows.t, s)
            derived = ForwardProcess.reverse_log_probs(
                process, rows.log_p, rows.zt, rows.t, start
            ).exp()
            yield compare(
                process.reverse_log_probs(rows.log_p, rows.zt, rows.t, start).exp(),
                derived,
                rows.labels,
            )


@law("override = derived: decode_nll", tolerance=1e-9)
def decode_nll_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """-ln P(x|z) has the row's own evidence in it: -ln [ p(x) q_t(z|x) / q_t-bar(z) ], not -ln p(x). Relative rounding."""
    if overrides(process, "decode_nll"):
        rows = ReachableRows(process, times(INNER, ENDS, (1e-6,)))
        log_q = likelihood_rows(process, rows).log()
        expected = (
            -(rows.log_p + log_q).log_softmax(-1).gather(-1, rows.x0.unsqueeze(-1)).squeeze(-1)
        )
        got = process.decode_nll(rows.dist, rows.x0, rows.zt, rows.t)
        yield compare(got, expected, rows.labels, 1.0 + expected.abs())


@law("override = derived: closing_kl", tolerance=1e-9)
def closing_kl_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """KL( q_t(.|x) || marginal of the law ), over every state; 0 at t = 1 when the process closes. Rounding."""
    vocabulary = process.vocabulary
    laws = random_log_probs(vocabulary.num_tokens)
    index, x0, t = product(
        torch.arange(len(laws)), torch.arange(vocabulary.num_tokens), times(INNER, (1.0,))
    )
    got = process.closing_kl(DenseDistribution(laws[index], vocabulary), x0, t)
    if overrides(process, "closing_kl"):
        expected = ForwardProcess.closing_kl(
            process, DenseDistribution(laws[index], vocabulary), x0, t
        )
        yield compare(got, expected, {"x0": x0, "t": t})
    if process.closes_at_prior:
        yield compare(got[t == 1.0], 0.0, {"x0": x0[t == 1.0], "t": "1"})


@law("active: nothing is charged elsewhere", tolerance=1e-12)
def active_covers_density(process: ForwardProcess) -> Iterator[Gap]:
    """The bound skips rows that are not active, so their density is 0. Relative rounding of the derived formula."""
    rows = ReachableRows(process, times(INNER))
    idle = ~process.active(rows.zt)
    density = process.density(rows.dist, rows.x0, rows.zt, rows.t)[idle]
    yield compare(density, 0.0, {name: label[idle] for name, label in rows.labels.items()})


@law("scope: nothing is read above it", tolerance=1e-9)
def scope_suffices(process: ForwardProcess) -> Iterator[Gap]:
    """A law that knows only what lies below scope(z) gives the same divergence where it is read, and the same decoding
    term; something is open below every scope. Rounding of normalisers."""
    rows = ReachableRows(process, times(INNER))
    scope, vocabulary = process.scope(rows.zt), process.vocabulary
    yield compare(
        (scope >= vocabulary.num_tokens).double(),
        1.0,
        {"more than a word in the scope of zt": rows.zt},
    )
    for formula, reads in (
        (process.divergence, process.active(rows.zt)),
        (process.decode_nll, torch.ones_like(rows.zt, dtype=torch.bool)),
    ):
        asked = [argument[reads] for argument in (rows.x0, rows.zt, rows.t)]
        got = evaluate_below(formula, rows.log_p[reads], scope[reads], vocabulary, *asked)
        expected = formula(DenseDistribution(rows.log_p[reads], vocabulary), *asked)
        labels = {name: label[reads] for name, label in rows.labels.items()}
        yield compare(got, expected, labels, 1.0 + expected.abs())


@law("informed: the rest of the law does not matter", tolerance=1e-9)
def informed_is_enough(process: ForwardProcess) -> Iterator[Gap]:
    """The density is the same under two laws that differ only in what `informed` says is not trained. Rounding."""
    rows = ReachableRows(process, times(INNER))
    informed = process.trained_part(rows.zt)
    expected = process.density(rows.dist, rows.x0, rows.zt, rows.t)
    for code, other in ((TrainedPart.NONE, _reshaped), (TrainedPart.BELOW_NODE, _reshaped_outside)):
        here = informed == code
        changed = DenseDistribution(other(process, rows.log_p, rows.zt), process.vocabulary)
        got = process.density(changed, rows.x0, rows.zt, rows.t)
        labels = {name: label[here] for name, label in rows.labels.items()}
        yield compare(got[here], expected[here], labels, 1.0 + expected[here].abs())


def _reshaped(process: ForwardProcess, log_p: Tensor, zt: Tensor) -> Tensor:
    tilt = random_log_probs(log_p.shape[-1], 1, seed=5)
    return (0.5 * log_p + tilt).log_softmax(-1)


def _reshaped_outside(process: ForwardProcess, log_p: Tensor, zt: Tensor) -> Tensor:
    """The same conditional law below z_t, another one elsewhere and another mass of z_t."""
    vocabulary = process.vocabulary
    words = torch.arange(vocabulary.num_tokens)
    below = vocabulary.ancestor(
        words.unsqueeze(0), vocabulary.level_of(zt).unsqueeze(-1)
    ) == zt.unsqueeze(-1)
    return torch.where(below, log_p + 0.7, _reshaped(process, log_p, zt)).log_softmax(-1)


def likelihood_rows(process: ForwardProcess, rows: ReachableRows) -> Tensor:
    """[r, V] q_t(z_t|x) over x for each row, read from the marginal."""
    distinct, place = rows.t.unique(return_inverse=True)
    return likelihoods(process, distinct)[place, :, rows.zt]
