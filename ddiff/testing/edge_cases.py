"""Laws at the edges of predictions: probabilities of 0 and 1e-400, where a term is infinite but never NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddiff.core.prediction import DenseDistribution, Prediction, Score
from ddiff.core.process import ForwardProcess
from ddiff.testing.probes import (
    ReachableRows,
    certain_log_probs,
    likelihoods,
    random_log_probs,
    times,
)
from ddiff.testing.report import Gap, compare, law

Term = Callable[[Prediction], Tensor]  # [r] nats of a prediction at rows that the term knows

TINY = -921.0  # ln 1e-400, below the smallest positive float64


def extreme_distributions(num_tokens: int) -> Tensor:
    """[3V, V] log-distributions with token k impossible, of probability 1e-400, and certain."""
    middle = random_log_probs(num_tokens, 1)[0]
    token = torch.arange(num_tokens)
    impossible = middle.repeat(num_tokens, 1)
    impossible[token, token] = -torch.inf
    tiny = middle.repeat(num_tokens, 1)
    tiny[token, token] = TINY
    return torch.cat(
        [impossible.log_softmax(-1), tiny.log_softmax(-1), certain_log_probs(num_tokens)]
    )


def _terms(process: ForwardProcess, rows: ReachableRows) -> dict[str, Term]:
    asked = (rows.x0, rows.zt, rows.t)
    return {
        "divergence": lambda prediction: process.divergence(prediction, *asked),
        "density": lambda prediction: process.density(prediction, *asked),
        "decode_nll": lambda prediction: process.decode_nll(prediction, *asked),
        "closing_kl": lambda prediction: process.closing_kl(prediction, rows.x0, rows.t),
    }


def _extreme_rows(process: ForwardProcess) -> ReachableRows:
    return ReachableRows(
        process, times((0.02, 0.5, 0.97)), extreme_distributions(process.vocabulary.num_tokens)
    )


@law("edges: gradients are finite where values are", tolerance=0.0)
def gradients_are_finite(process: ForwardProcess) -> Iterator[Gap]:
    """The gradient of every term by the prediction is finite wherever the term is, for distributions with probabilities of
    0, 1e-400 and 1, and for the scores of those that do not rule z_t out. Counts: exactly."""
    rows = _extreme_rows(process)
    log_marginal = process.log_marginal(rows.log_p, rows.t)
    own = log_marginal.gather(-1, rows.zt.unsqueeze(-1))
    for name, term in _terms(process, rows).items():
        yield from _gradient(
            lambda leaf: DenseDistribution(leaf, process.vocabulary), rows.log_p, term, name, rows
        )
        ratio = torch.where(own.isfinite(), log_marginal - own, 0.0)
        yield from _gradient(Score, ratio, term, f"{name} of a score", rows)


def _gradient(
    prediction: Callable[[Tensor], Prediction],
    values: Tensor,
    term: Term,
    name: str,
    rows: ReachableRows,
) -> Iterator[Gap]:
    leaf = values.clone().requires_grad_()
    value = term(prediction(leaf))
    finite = value.isfinite()
    if not value.requires_grad:
        return
    torch.where(finite, value, 0.0).sum().backward()
    assert leaf.grad is not None
    smooth = leaf.grad.isfinite().all(-1)[finite].double()
    labels = {key: label[finite] for key, label in rows.labels.items()}
    yield compare(smooth, 1.0, {"finite gradient of": name, **labels})


@law(
    "edges: a prediction that rules the truth out costs infinity, or what Bayes says",
    tolerance=1e-9,
)
def impossible_truth_is_bayes(process: ForwardProcess) -> Iterator[Gap]:
    """Every term has the value of its definition for predictions with probabilities of 0, +inf included, and is never NaN.

    Where the prediction rules z_t out: infinity, but 0 where z_t can only have been x0, and 0 for the density where nothing
    arrives in z_t. Relative rounding.
    """
    rows = _extreme_rows(process)
    for name, term in _terms(process, rows).items():
        yield compare(term(rows.dist).isnan().double(), 0.0, {"NaN in": name, **rows.labels})
    # of 1e-400 float64 knows the logarithm alone, and the definitions are written in probabilities
    tiny = (rows.log_p < TINY / 2) & ~rows.log_p.isneginf()
    rows = rows.take(~tiny.any(-1))
    expected = _expected(process, rows)
    for name, term in _terms(process, rows).items():
        got = term(rows.dist)
        if name not in expected:
            continue
        due = expected[name]
        settled = ~due.isnan()
        got, due = got[settled], due[settled]
        yield compare(
            got.isposinf().double(),
            due.isposinf().double(),
            {"infinite": name, **rows.take(settled).labels},
        )
        finite = due.isfinite() & got.isfinite()
        labels = {key: label[finite] for key, label in rows.take(settled).labels.items()}
        yield compare(got[finite], due[finite], {"term": name, **labels}, 1.0 + due[finite].abs())


def _expected(process: ForwardProcess, rows: ReachableRows) -> dict[str, Tensor]:
    """The definitions, summed over all states; NaN where the density has no value of its own.

    That is where the prediction rules z_t out although several tokens may be under it, and yet whatever they are the chain
    came from one state: then 0, which nearby predictions have, and infinity are both right.
    """
    distinct, place = rows.t.unique(return_inverse=True)
    forward = likelihoods(process, distinct)[place]  # [r,V,S]
    pick = rows.zt.unsqueeze(-1)
    row = torch.arange(len(rows.zt))
    truth = forward[row, rows.x0]
    log_model = process.log_marginal(rows.log_p, rows.t)
    log_truth = truth.log()
    closing = torch.where(truth > 0, truth * (log_truth - log_model), 0.0).sum(-1)

    evidence = forward[row, :, rows.zt]
    log_p = rows.log_p[row, rows.x0]
    log_joint = rows.log_p + evidence.log()
    decoding = log_joint.logsumexp(-1) - log_p - evidence[row, rows.x0].log()
    told = (evidence > 0).sum(-1) == 1
    decoding = torch.where(log_p.isfinite(), decoding, torch.inf)
    decoding = torch.where(told, 0.0, decoding)

    inward = process.rates(rows.t).column(rows.zt).scatter(-1, pick, 0.0)
    log_s = log_truth - log_truth.gather(-1, pick)
    own = log_model.gather(-1, pick)
    log_s_model = log_model - torch.where(own > -torch.inf, own, 0.0)
    s = log_s.exp()
    cross = torch.where(s > 0, s * (log_s - log_s_model), 0.0)
    density = torch.where(inward > 0, inward * (log_s_model.exp() - s + cross), 0.0).sum(-1)
    ruled_out = own.squeeze(-1).isneginf() & (inward > 0).any(-1)
    density = torch.where(told, 0.0, density)
    ruled_out = ruled_out & ~told
    ratio = torch.where(inward.unsqueeze(1) > 0, forward / evidence.unsqueeze(-1), 0.0)  # [r,V,S]
    under = (evidence > 0).unsqueeze(-1)
    most = torch.where(under, ratio, 0.0).amax(1)
    least = torch.where(under, ratio, torch.inf).amin(1)
    alike = torch.isclose(most, least).all(-1)
    density = torch.where(ruled_out & alike, torch.nan, density)
    ruled_out = ruled_out & ~alike
    return {
        "closing_kl": closing,
        "decode_nll": decoding,
        "density": torch.where(ruled_out, torch.inf, density),
    }
