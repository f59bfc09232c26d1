"""Conformance checks for predictions that give a token probability 0 or 1e-400.

For such predictions, a term of the bound may be infinite but must not be NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddiff.core.prediction import DenseDistribution, Prediction, Score
from ddiff.core.process import ForwardProcess
from ddiff.testing.probes import (
    ReachableRows,
    certain_log_probs,
    likelihoods_by_row,
    random_log_probs,
    times,
)
from ddiff.testing.report import Gap, compare, law

TINY = -921.0  # ln 1e-400, below the smallest positive float64
TIMES = (0.02, 0.5, 0.97)
TERMS = ("divergence", "density", "decode_nll", "closing_kl")


def extreme_distributions(num_tokens: int) -> Tensor:
    """Return log-distributions [3V,V] in which one token has probability 0, 1e-400 or 1.

    Each of the V tokens occurs once with each of the three probabilities.
    """
    middle = random_log_probs(num_tokens, 1)[0]
    token = torch.arange(num_tokens)
    impossible = middle.repeat(num_tokens, 1)
    impossible[token, token] = -torch.inf
    tiny = middle.repeat(num_tokens, 1)
    tiny[token, token] = TINY
    certain = certain_log_probs(num_tokens)
    return torch.cat([impossible.log_softmax(-1), tiny.log_softmax(-1), certain])


def _extreme_rows(process: ForwardProcess) -> ReachableRows:
    log_probs = extreme_distributions(process.vocabulary.num_tokens)
    return ReachableRows(process, times(TIMES), log_probs)


def _evaluate(
    process: ForwardProcess, term: str, prediction: Prediction, rows: ReachableRows
) -> Tensor:
    """Return one term of the bound at each of r rows, a tensor [r] in nats.

    `term` is the name of the process method that computes the term, one of TERMS.
    """
    if term == "divergence":
        return process.divergence(prediction, *rows.args)
    if term == "density":
        return process.density(prediction, *rows.args)
    if term == "decode_nll":
        return process.decode_nll(prediction, *rows.args)
    return process.closing_kl(prediction, rows.x0, rows.t)


# ------------------------------------------------------------------ gradients


@law("edges: gradients are finite where values are", tolerance=0.0)
def gradients_are_finite(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the gradient of every term of the bound is finite wherever the term is finite.

    Gradients are taken with respect to two kinds of predictions. The first is a distribution in
    which one token has probability 0, 1e-400 (stored as a logarithm) or 1. The second is the score
    of such a distribution, that is, log-ratios of state probabilities to the probability of z_t. If
    z_t has probability 0, all these log-ratios are set to 0. Tolerance 0: the condition is exact.
    """
    rows = _extreme_rows(process)
    log_marginal = process.log_marginal(rows.log_p, rows.t)
    own = log_marginal.gather(-1, rows.zt.unsqueeze(-1))
    ratio = torch.where(
        own.isfinite(),
        log_marginal - own,
        0.0,
    )

    def distribution(leaf: Tensor) -> Prediction:
        return DenseDistribution(leaf, process.vocabulary)

    for term in TERMS:
        yield from _gradient_gaps(
            process,
            term,
            distribution,
            rows.log_p,
            rows,
            term,
        )
        yield from _gradient_gaps(
            process,
            term,
            Score,
            ratio,
            rows,
            f"{term} of a score",
        )


def _gradient_gaps(
    process: ForwardProcess,
    term: str,
    make_prediction: Callable[[Tensor], Prediction],
    values: Tensor,
    rows: ReachableRows,
    name: str,
) -> Iterator[Gap]:
    leaf = values.clone().requires_grad_()
    value = _evaluate(process, term, make_prediction(leaf), rows)
    if not value.requires_grad:
        return
    finite = value.isfinite()
    # mask infinite values, as a loss would do
    torch.where(finite, value, 0.0).sum().backward()
    assert leaf.grad is not None
    # check the entries of all tokens, because 0 * inf may occur in any of them
    has_gradient = leaf.grad.isfinite().all(-1)[finite]
    labels = {"finite gradient of": name, **rows.select(finite).labels}
    yield compare(has_gradient.double(), 1.0, labels)


# ------------------------------------------------------------------ values


@law(
    "edges: terms equal their definitions if tokens have probability 0",
    tolerance=1e-9,
)
def impossible_truth_is_bayes(process: ForwardProcess) -> Iterator[Gap]:
    """Check the terms of the bound for predictions that give tokens probability 0.

    Every term must equal its definition, computed by enumeration, and may be +inf but not NaN. A
    term must be infinite if the prediction gives the state z_t probability 0, with two exceptions.
    First, every term is 0 if the clean token x0 is the only token that can have become z_t. Second,
    `density`, the integrand of the bound, is 0 if no state moves to z_t. Errors are relative.
    Tolerance 1e-9: float64 rounding.
    """
    rows = _extreme_rows(process)
    for term in TERMS:
        is_nan = _evaluate(process, term, rows.dist, rows).isnan()
        yield compare(
            is_nan.double(),
            0.0,
            {"NaN in": term, **rows.labels},
        )
    # float64 cannot represent 1e-400, which the definitions below need
    tiny = (rows.log_p < TINY / 2) & ~rows.log_p.isneginf()
    rows = rows.select(~tiny.any(-1))
    expected = {
        "closing_kl": _expected_closing(process, rows),
        "decode_nll": _expected_decoding(process, rows),
        "density": _expected_density(process, rows),
    }
    for term, due in expected.items():
        got = _evaluate(process, term, rows.dist, rows)
        settled = ~due.isnan()
        yield from _value_gaps(
            term,
            got[settled],
            due[settled],
            rows.select(settled),
        )


def _value_gaps(
    term: str,
    got: Tensor,
    due: Tensor,
    rows: ReachableRows,
) -> Iterator[Gap]:
    infinite = got.isposinf().double()
    yield compare(
        infinite,
        due.isposinf().double(),
        {"infinite": term, **rows.labels},
    )
    finite = due.isfinite() & got.isfinite()
    labels = {"term": term, **rows.select(finite).labels}
    yield compare(
        got[finite],
        due[finite],
        labels,
        relative_to=1.0 + due[finite].abs(),
    )


def _true_marginal(process: ForwardProcess, rows: ReachableRows) -> Tensor:
    """Return the marginal q_t(.|x0) [r,S] of each row's clean token."""
    row = torch.arange(len(rows.zt))
    return likelihoods_by_row(process, rows.t)[row, rows.x0]


def _evidence(process: ForwardProcess, rows: ReachableRows) -> Tensor:
    """Return q_t(z_t|x) [r,V] of each row's state z_t for every token x."""
    row = torch.arange(len(rows.zt))
    return likelihoods_by_row(process, rows.t)[row, :, rows.zt]


def _has_one_origin(evidence: Tensor) -> Tensor:
    """Return a bool mask [r] of the rows whose z_t can have come from one token only.

    `evidence` [r,V] contains q_t(z_t|x) for every token x.
    """
    return (evidence > 0).sum(-1) == 1


def _expected_closing(process: ForwardProcess, rows: ReachableRows) -> Tensor:
    """Return KL( q_t(.|x0) || predicted q_t ) [r] by its definition.

    The predicted q_t is the marginal at t of a token that is drawn from the prediction.
    """
    truth = _true_marginal(process, rows)
    log_model = process.log_marginal(rows.log_p, rows.t)
    return torch.where(truth > 0, truth * (truth.log() - log_model), 0.0).sum(-1)


def _expected_decoding(process: ForwardProcess, rows: ReachableRows) -> Tensor:
    """Return -ln P(x0 | z_t) [r] by Bayes' rule."""
    row = torch.arange(len(rows.zt))
    evidence = _evidence(process, rows)
    log_p = rows.log_p[row, rows.x0]
    log_joint = rows.log_p + evidence.log()
    decoding = log_joint.logsumexp(-1) - log_p - evidence[row, rows.x0].log()
    decoding = torch.where(log_p.isfinite(), decoding, torch.inf)
    return torch.where(_has_one_origin(evidence), 0.0, decoding)


def _expected_density(process: ForwardProcess, rows: ReachableRows) -> Tensor:
    """Return the integrand of the bound [r], computed as the score entropy over all states.

    The value is NaN in rows that cannot be compared. These are the rows in which the prediction
    gives z_t probability 0, several tokens can have become z_t, and all of these tokens imply the
    same reverse rates. In such a row, both 0 (the value for nearby predictions) and infinity are
    correct.
    """
    own_state = rows.zt.unsqueeze(-1)
    # rates into z_t: Q[y,z_t] for y != z_t
    inward = process.rates(rows.t).column(rows.zt).scatter(-1, own_state, 0.0)
    log_truth = _true_marginal(process, rows).log()
    log_model = process.log_marginal(rows.log_p, rows.t)
    own = log_model.gather(-1, own_state)
    log_s = log_truth - log_truth.gather(-1, own_state)
    # -inf - (-inf) would be NaN; excluded states are handled below
    log_s_model = log_model - torch.where(own > -torch.inf, own, 0.0)
    s = log_s.exp()
    cross = torch.where(s > 0, s * (log_s - log_s_model), 0.0)
    density = torch.where(inward > 0, inward * (log_s_model.exp() - s + cross), 0.0).sum(-1)

    one_origin = _has_one_origin(_evidence(process, rows))
    density = torch.where(one_origin, 0.0, density)
    excluded = own.squeeze(-1).isneginf() & (inward > 0).any(-1) & ~one_origin
    alike = _has_equal_reverse_rates(process, rows, inward)
    density = torch.where(excluded & alike, torch.nan, density)
    return torch.where(excluded & ~alike, torch.inf, density)


def _has_equal_reverse_rates(
    process: ForwardProcess, rows: ReachableRows, inward: Tensor
) -> Tensor:
    """Return a bool mask [r] of the rows whose possible clean tokens imply equal reverse rates.

    The rates are equal if q_t(y|x) / q_t(z_t|x) is the same for every token x that can have become
    z_t, at all states y with a positive entry in `inward`. `inward` [r,S] contains the forward
    rates from each state into z_t.
    """
    forward = likelihoods_by_row(process, rows.t)  # [r,V,S]
    evidence = _evidence(process, rows).unsqueeze(-1)
    ratio = torch.where(
        inward.unsqueeze(1) > 0,
        forward / evidence,
        0.0,
    )
    possible = evidence > 0
    # compare the ratios of the tokens that can have become z_t
    most = torch.where(possible, ratio, 0.0).amax(1)
    least = torch.where(possible, ratio, torch.inf).amin(1)
    return torch.isclose(most, least).all(-1)
