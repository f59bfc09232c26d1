"""Conformance checks of predicted distributions: the methods of a distribution must agree.

A prediction covers the tokens below one node of the vocabulary's tree, `prediction.top`. "Tree
order" is an order of the nodes of a level in which the nodes below any higher node are contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.prediction import CleanDistribution, segment_logsumexp
from ddiff.core.vocabulary import Vocabulary
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law


def below(
    vocabulary: Vocabulary,
    node: int,
    level: int,
) -> Tensor:
    """Return the ids of the nodes at `level` that are descendants of `node`.

    They are in tree order, in which the descendants of every node are contiguous.
    """
    start, stop = vocabulary.node_range(torch.tensor(node), level)
    return vocabulary.order(level)[int(start) : int(stop)]


def _level_of(vocabulary: Vocabulary, node: int) -> int:
    return int(vocabulary.level_of(torch.tensor(node)))


def _nodes_and_levels(prediction: CleanDistribution) -> list[tuple[int, int]]:
    """Return all pairs (node, level) of a predicted node and a level below this node.

    The nodes are `prediction.top`, below which the prediction was made, and all its descendants
    that are not tokens.
    """
    vocabulary = prediction.vocabulary
    # level 0 has no levels below it
    nodes = [prediction.top]
    for level in range(1, _level_of(vocabulary, prediction.top)):
        nodes.extend(below(vocabulary, prediction.top, level).tolist())
    pairs = []
    for node in nodes:
        for level in range(_level_of(vocabulary, node)):
            pairs.append((node, level))
    return pairs


def _log_mass(prediction: CleanDistribution, node: int) -> Tensor:
    """Return the log-probability [r] of a node given `prediction.top`.

    The probability is the sum of the probabilities of the leaf tokens below the node.
    """
    vocabulary = prediction.vocabulary
    first, _ = vocabulary.node_range(torch.tensor(prediction.top), 0)
    start, stop = vocabulary.node_range(torch.tensor(node), 0)
    tokens = slice(int(start - first), int(stop - first))
    return prediction.log_below(0).double()[:, tokens].logsumexp(-1)


@law("clean distribution: probabilities sum to 1 at every level", tolerance=1e-10)
def masses_add_up(prediction: CleanDistribution) -> Iterator[Gap]:
    """Check that the predicted probabilities of the nodes of each level sum to 1.

    The probability of a node must be the sum of the probabilities of its leaf tokens. Tolerance
    1e-10: float64 rounding of sums of exponentials.
    """
    vocabulary = prediction.vocabulary
    tokens = below(vocabulary, prediction.top, 0)
    log_p = prediction.log_below(0).double()
    for level in range(_level_of(vocabulary, prediction.top)):
        nodes = below(vocabulary, prediction.top, level)
        mass = prediction.log_below(level).double()
        place = torch.empty(
            vocabulary.num_states,
            dtype=torch.long,
        )
        place[nodes] = torch.arange(len(nodes))
        segment = place[vocabulary.ancestor(tokens, level)]
        summed = segment_logsumexp(log_p, segment, len(nodes))
        yield compare(
            mass.exp().sum(-1),
            1.0,
            {"sum of level": level},
        )
        yield compare(
            mass.exp(),
            summed.exp(),
            {"level": level},
        )


@law("clean distribution: log_child is conditional", tolerance=1e-10)
def children_are_conditional(prediction: CleanDistribution) -> Iterator[Gap]:
    """Check that log_child(node, child) is log P(child) - log P(node).

    P(node) is the predicted probability that the token is below the node. The child may be any
    descendant of the node. If child and node are equal, `log_child` must be 0. The prediction
    covers the tokens below `prediction.top`. For nodes one level below `prediction.top`, `log_step`
    must agree with `log_child`. If `prediction.top` is the root, `log_prob(child)` must be log
    P(child). Tolerance 1e-10: float64 rounding of sums of exponentials.
    """
    rows = len(prediction.log_below(0))
    vocabulary = prediction.vocabulary
    top_level = _level_of(vocabulary, prediction.top)
    for node, level in _nodes_and_levels(prediction):
        parent = torch.full((rows,), node)
        to_itself = prediction.log_child(parent, parent)
        yield compare(to_itself, 0.0, {"node and child": node})
        to_itself = prediction.log_step(parent, parent)
        yield compare(to_itself, 0.0, {"node and child, by log_step": node})
        for child in below(vocabulary, node, level).tolist():
            ids = torch.full((rows,), child)
            mass = _log_mass(prediction, child)
            expected = mass - _log_mass(prediction, node)
            got = prediction.log_child(parent, ids)
            yield compare(got, expected, {"node": node, "child": child})
            # log_step is only defined for children of the queried node itself
            if node == prediction.top and level == top_level - 1:
                got = prediction.log_step(parent, ids)
                yield compare(got, expected, {"child, by log_step": child})
            if prediction.top == vocabulary.root:
                yield compare(prediction.log_prob(ids), mass, {"node": child})


@law("clean distribution: draw is the inverse CDF", tolerance=1e-9)
def draws_follow_distribution(prediction: CleanDistribution) -> Iterator[Gap]:
    """Check that draw(node, level, u) is the inverse CDF of the node's descendants at `level`.

    The uniform u is in [0, 1). The descendants divide the unit interval into cells, in tree order;
    the width of a cell is the probability of its descendant. `draw` must return the descendant
    whose cell contains u. Each cell is tested at its middle and just inside its ends. Tolerance
    1e-9: ids are integers, so every wrong draw has an error of at least 1.
    """
    rows = len(prediction.log_below(0))
    for node, level in _nodes_and_levels(prediction):
        ids = below(prediction.vocabulary, node, level)
        parent = torch.full((rows,), node)
        target = torch.full((rows,), level)
        columns = []
        for child in ids:
            columns.append(prediction.log_child(parent, torch.full((rows,), int(child))))
        width = torch.stack(columns, -1).double().exp()
        # right ends of the cells
        right = width.cumsum(-1)
        for place in range(len(ids)):
            # a rounding error of the sum may be larger than a narrower cell
            wide = width[:, place] > 1e-6
            for share in (1e-4, 0.5, 1.0 - 1e-4):
                u = right[:, place] - (1.0 - share) * width[:, place]
                drawn = prediction.draw(
                    parent,
                    target,
                    u.clamp(0.0, 1.0 - 1e-12),
                )
                yield compare(
                    drawn[wide],
                    float(ids[place]),
                    {"node": node, "u": u[wide]},
                )


CLEAN_DISTRIBUTION_LAWS: tuple[Law, ...] = (
    masses_add_up,
    children_are_conditional,
    draws_follow_distribution,
)


def check_clean_distribution(prediction: CleanDistribution) -> list[LawReport]:
    """Apply every conformance check of clean-token distributions to a prediction.

    The prediction must be in float64 and on a small vocabulary.
    """
    return evaluate_laws(prediction, CLEAN_DISTRIBUTION_LAWS)
