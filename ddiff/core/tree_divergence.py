"""Divergences of the tree family, between the true and the predicted state one level below.

Notation as in `ddiff.core.tree`: let anc(x) be the ancestor of token x at level l. A position at
token x that moves to level l gets to node z of this level with probability A 1[anc(x) = z] + r(z).
A and r, which are A_0l and r_0l of `StochasticParents`, do not depend on x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddiff.core.numerics import may_be_true, where_or_zero
from ddiff.core.prediction import CleanDistribution
from ddiff.core.tree_parents import StochasticParents, level_ids


def kl_below(
    parents: StochasticParents,
    dist: CleanDistribution,
    x0: Tensor,
    zt: Tensor,
) -> Tensor:
    """Return KL( P(y | z,x) || P(y | z) ) per row [r]; 0 at tokens.

    y is the state one level below z = z_t. P(y | z,x) is the distribution of y given the token x =
    x0. P(y | z) is the distribution of y if the token has the predicted distribution `dist`.
    """
    level = parents.vocabulary.level_of(zt)
    # For xi = 1, x determines y, and the divergence is -ln P(y | z).
    if parents.is_deterministic:
        child = parents.vocabulary.ancestor(x0, (level - 1).clamp(min=0))
        return -dist.log_step(zt, child)
    value: Tensor | None = None
    for l in range(1, parents.vocabulary.num_levels + 1):
        here = level == l
        if not may_be_true(here):
            continue
        # Rows of other levels get an ancestor of x0 as z, so that every value is finite. Their
        # results are not used.
        z = torch.where(here, zt, parents.vocabulary.ancestor(x0, l))
        if l == 1:
            kl = token_nll(parents, dist, x0, z)
        else:
            kl = _kl_at_level(parents, dist, x0, z, l)
        others = torch.zeros_like(kl) if value is None else value
        value = torch.where(here, kl, others)
    if value is None:
        return torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
    return value


def token_nll(
    parents: StochasticParents,
    dist: CleanDistribution,
    x0: Tensor,
    zt: Tensor,
) -> Tensor:
    """Return -ln P(x0 | z_t) per row [r], for stochastic parents; 0 at tokens.

    The value is ln( A P(z) + r(z) ) - ln( (A 1[anc(x0) = z] + r(z)) p(x0) ), where z = z_t, p is
    the predicted distribution of the token, and P(z) its probability of the tokens below z. The
    docstring of the module defines A, r and anc.
    """
    level = parents.vocabulary.level_of(zt)
    is_token = level == 0
    sure, stray = parents.from_tokens(zt)
    is_ancestor = parents.vocabulary.ancestor(x0, level) == zt
    log_evidence = (sure * is_ancestor + stray).log()
    # If r(z) is 0, the mass of a node may underflow, and ln 0 would make the bound -inf.
    log_mass = dist.log_prob(zt)
    has_strays = stray > 0
    spread = torch.where(has_strays, sure * log_mass.exp() + stray, 1.0)
    log_expected = torch.where(has_strays, spread.log(), sure.log() + log_mass)
    log_p = dist.log_prob(x0)
    # If the prediction gives the token probability 0, the value is +inf, even if its node has
    # probability 0 too.
    possible = log_p.isfinite()
    is_finite = ~is_token & possible
    nll = where_or_zero(is_finite, log_expected)
    nll = nll - where_or_zero(is_finite, log_evidence + log_p)
    return torch.where(is_token, 0.0, torch.where(possible, nll, torch.inf))


def _kl_at_level(
    parents: StochasticParents,
    dist: CleanDistribution,
    x0: Tensor,
    zt: Tensor,
    level: int,
) -> Tensor:
    """Return KL( P(y | z,x) || P(y | z) ) [r] for rows whose states z are at the same level >= 2.

    y is the state one level below z (see the module's docstring). At level 1, y is the token, and
    `kl_below` uses `token_nll`.
    """
    below = level - 1
    log_mass = dist.log_mass(below)
    nodes = level_ids(parents.vocabulary, below, zt.device)
    kappa = parents.entry(below, level, nodes, zt.unsqueeze(-1))
    onward = kappa.to(log_mass.dtype).log()
    is_ancestor = parents.vocabulary.ancestor(x0, below).unsqueeze(-1) == nodes
    truth = is_ancestor.double() * parents.sure[0][below]
    truth = truth + parents.stray_at(0, below, nodes)
    log_truth = truth.to(log_mass.dtype).log() + onward
    log_truth = log_truth.log_softmax(-1)
    log_model = parents.log_spread(0, below, log_mass) + onward
    # If the prediction gives z_t probability 0, the divergence is infinite.
    possible = (log_model > -torch.inf).any(-1, keepdim=True)
    log_model = where_or_zero(possible, log_model).log_softmax(-1)
    has_mass = log_truth.isfinite()
    terms = log_truth.exp() * (log_truth - where_or_zero(has_mass, log_model))
    divergence = torch.where(has_mass, terms, 0.0).sum(-1)
    return torch.where(possible.squeeze(-1), divergence, torch.inf)
