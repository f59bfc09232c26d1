"""Decoding rules of the tree family: draws of the state at a lower level, given z_t.

    bayes      draws from the exact posterior
    within     draws only nodes below z_t
    between    draws a node below z_t with probability xi, and another node with probability 1 - xi
    free       draws from the predicted distribution and ignores z_t

xi is the probability that a position moved to the parent of its node, and not to another node of
the parent's level. For a draw across several levels, the probability kappa that z_t is the ancestor
of the lower node replaces xi. In both cases of `between`, the node is drawn in proportion to the
predicted distribution. If xi is 1 at all levels, every rule is replaced by `within`, which is then
the exact posterior.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddiff.core.numerics import draw_index, find_rows
from ddiff.core.prediction import CleanDistribution
from ddiff.core.tree_parents import StochasticParents, level_ids

DECODING = ("bayes", "within", "between", "free")


def draw_below(
    parents: StochasticParents,
    rule: str,
    dist: CleanDistribution,
    zt: Tensor,
    target: Tensor,
    u: Tensor,
) -> Tensor:
    """Draw for each row a state at level `target` [r] by a decoding rule, given z_t.

    Args:
        parents: probabilities of the moves from a node to the nodes of higher levels.
        rule: one of DECODING (see the module).
        dist: predicted distribution.
        zt: [r] current states.
        target: [r] levels of the result.
        u: [r] uniforms.
    """
    if parents.is_deterministic or rule == "within":
        return dist.draw(zt, target, u)
    if rule == "free":
        return dist.draw(torch.full_like(zt, parents.vocabulary.root), target, u)
    drawn = zt.clone()
    level = parents.vocabulary.level_of(zt)
    for i in range(parents.vocabulary.num_levels):
        for j in range(i + 1, parents.vocabulary.num_levels + 1):
            rows = find_rows((target == i) & (level == j))
            if len(rows):
                log_mass = dist.log_mass(i)[rows]
                weights = _weights_below(parents, rule, log_mass, zt[rows], i, j)
                index = draw_index(weights, u[rows])
                drawn[rows] = parents.vocabulary.offsets[i] + index
    return drawn


def _weights_below(
    parents: StochasticParents,
    rule: str,
    log_mass: Tensor,
    zt: Tensor,
    i: int,
    j: int,
) -> Tensor:
    """Return unnormalized probabilities [r,n] of the n nodes at level i, given z_t at level j > i.

    `log_mass` [r,n] holds the predicted log-probabilities of these nodes. `rule` is one of
    DECODING, and `parents` gives the probabilities of moves to higher levels.
    """
    nodes = level_ids(parents.vocabulary, i, zt.device)
    if rule == "bayes":
        kappa = parents.entry(i, j, nodes, zt.unsqueeze(-1))
        log_spread = parents.log_spread(0, i, log_mass)
        return (log_spread + kappa.log()).softmax(-1)
    is_inside = parents.vocabulary.ancestor(nodes, j) == zt.unsqueeze(-1)
    own = log_mass.masked_fill(~is_inside, -torch.inf).softmax(-1)
    if bool(is_inside.all()):
        return own
    # The softmax is NaN in rows in which all nodes are below z_t; the weights of others are then 0.
    others = log_mass.masked_fill(is_inside, -torch.inf).softmax(-1)
    others = others.nan_to_num(0.0)
    stray = parents.stray_at(i, j, zt).unsqueeze(-1)
    right = parents.sure[i][j] + stray
    return right * own + (1.0 - right) * others
