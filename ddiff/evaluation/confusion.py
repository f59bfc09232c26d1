"""Confusion counts of a network at noised positions: true and predicted nodes of the tree.

A position whose state z is at level k of the tree is predicted one level lower, at level
l = max(k - 1, 0): at a mask the network chooses a node of the highest level, at a node one of its
children, and at a wrong token another token. The choice is the most likely node given z,

    argmax over nodes n of level l of P(n | all states),

which is compared with the ancestor of the clean token at level l.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddiff.core.elbo import Network, is_active
from ddiff.core.prediction import Prediction, require_distribution
from ddiff.core.process import ForwardProcess
from ddiff.core.times import Noisy
from ddiff.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class Confusion:
    """Number of positions for each pair of true and predicted nodes of one level.

    `level` is the level of the nodes, 0 for tokens. `true`, `predicted` and `count` [k] have the
    ids of the k pairs that occur and their numbers, in the order of the ids.
    """

    level: int
    true: Tensor
    predicted: Tensor
    count: Tensor

    @classmethod
    def of(cls, level: int, true: Tensor, predicted: Tensor) -> Confusion:
        """Count the pairs of the true [n] and predicted [n] nodes of n positions."""
        pairs, count = torch.stack([true, predicted], -1).unique(dim=0, return_counts=True)
        return cls(level, pairs[:, 0], pairs[:, 1], count)


def count_confusions(
    process: ForwardProcess, batches: Iterable[tuple[Network, Tensor, Noisy]]
) -> list[Confusion]:
    """Count the confusions of a network in noised batches, one result for each level.

    Positions whose state is the clean token, and positions where the process predicts nothing, are
    not counted. Levels without positions are left out. The lowest level is the first.

    Args:
        process: process that noised the batches.
        batches: triples of a network that predicts distributions, clean tokens x0 [B,L] and their
            noised states.

    Raises ArgumentError for a network that predicts scores.
    """
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for network, x0, noisy in batches:
        query = network(noisy)
        counted = is_active(process, noisy.zt) & ~noisy.clean & (noisy.zt != x0)
        state_level = process.vocabulary.level_of(noisy.zt)
        for k in range(process.vocabulary.num_levels + 1):
            rows = (counted & (state_level == k)).reshape(-1).nonzero().squeeze(-1)
            if not len(rows):
                continue
            level = max(k - 1, 0)
            zt = noisy.zt.reshape(-1)[rows]
            t = noisy.t.reshape(-1)[rows]

            def choose(prediction: Prediction, zt: Tensor, t: Tensor, level: int = level) -> Tensor:
                return choose_node(process, prediction, zt, t, level)

            predicted = query(rows, process.scope(zt), choose, zt, t)
            true = process.vocabulary.ancestor(x0.reshape(-1)[rows], level)
            found.setdefault(level, []).append((true.cpu(), predicted.cpu()))
    results = []
    for level, parts in sorted(found.items()):
        true, predicted = (torch.cat(each) for each in zip(*parts))
        results.append(Confusion.of(level, true, predicted))
    return results


def choose_node(
    process: ForwardProcess, prediction: Prediction, zt: Tensor, t: Tensor, level: int
) -> Tensor:
    """Return the most likely node [r] of a level, given the states of all positions.

    `prediction` is conditioned on the other positions, and `zt` and `t` [r] are the states and
    times of the rows themselves.
    """
    dist = require_distribution(prediction, "count_confusions")
    vocabulary = process.vocabulary
    if dist.top != vocabulary.root:
        # every token below the query node has the same evidence, which is the node itself
        below = vocabulary.order(level, zt.device)[vocabulary.subtree(dist.top)[level]]
        return below[dist.log_below(level).argmax(-1)]
    if vocabulary.num_levels and bool((zt == vocabulary.root).all()):
        # every token has the same evidence at a mask
        return vocabulary.offsets[level] + dist.log_mass(level).argmax(-1)
    full = dist.log_mass(0).double() + process.log_likelihood(zt, t)
    return vocabulary.offsets[level] + _sum_tokens(full, vocabulary, level).argmax(-1)


def _sum_tokens(log_p: Tensor, vocabulary: Vocabulary, level: int) -> Tensor:
    """Return probabilities [r,n] of the n nodes of a level, up to a factor per row.

    `log_p` [r,V] are the log-probabilities of the tokens.
    """
    p = (log_p - log_p.amax(-1, keepdim=True)).exp()
    if level == 0:
        return p
    tokens = torch.arange(vocabulary.num_tokens, device=p.device)
    node = vocabulary.ancestor(tokens, level) - vocabulary.offsets[level]
    return p.new_zeros(len(p), vocabulary.level_sizes[level]).index_add(-1, node, p)
