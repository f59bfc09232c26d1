"""Laws of a clean law: all its answers come from one distribution over words."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.prediction import CleanDistribution, segment_logsumexp
from ddiff.core.vocabulary import Vocabulary
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law


def below(vocabulary: Vocabulary, node: int, level: int) -> Tensor:
    """The ids of `level` that lie below a node, in tree order."""
    start, stop = vocabulary.node_range(torch.tensor(node), level)
    return vocabulary.order(level)[int(start) : int(stop)]


def _asked(prediction: CleanDistribution) -> list[tuple[int, int]]:
    """Every (node, level below it) that may be asked about under `top`."""
    vocabulary = prediction.vocabulary
    top_level = int(vocabulary.level_of(torch.tensor(prediction.top)))
    nodes = [
        prediction.top,
        *(
            int(n)
            for level in range(1, top_level)
            for n in below(vocabulary, prediction.top, level)
        ),
    ]
    return [
        (node, level)
        for node in nodes
        for level in range(int(vocabulary.level_of(torch.tensor(node))))
    ]


def _words_below(prediction: CleanDistribution, node: int) -> Tensor:
    """[r,k] log P(word | top) of the words below a node, read from the words alone."""
    vocabulary = prediction.vocabulary
    first, _ = vocabulary.node_range(torch.tensor(prediction.top), 0)
    start, stop = vocabulary.node_range(torch.tensor(node), 0)
    return prediction.log_below(0).double()[:, int(start - first) : int(stop - first)]


@law("clean law: masses add up", tolerance=1e-10)
def masses_add_up(prediction: CleanDistribution) -> Iterator[Gap]:
    """log_below(l) sums to 1, and every node's mass is the sum of its words'. Rounding of log-sum-exps."""
    vocabulary = prediction.vocabulary
    words = below(vocabulary, prediction.top, 0)
    for level in range(int(vocabulary.level_of(torch.tensor(prediction.top)))):
        mass, nodes = prediction.log_below(level).double(), below(vocabulary, prediction.top, level)
        place = torch.empty(vocabulary.num_states, dtype=torch.long).index_copy_(
            0, nodes, torch.arange(len(nodes))
        )
        summed = segment_logsumexp(
            prediction.log_below(0).double(), place[vocabulary.ancestor(words, level)], len(nodes)
        )
        yield compare(mass.exp().sum(-1), 1.0, {"sum of level": level})
        yield compare(mass.exp(), summed.exp(), {"level": level})


@law("clean law: log_child is conditional", tolerance=1e-10)
def children_are_conditional(prediction: CleanDistribution) -> Iterator[Gap]:
    """log P(child | node) is the ratio of their words' masses at any depth, 0 for the node itself, and log_prob the same
    from the root. Rounding of log-sum-exps."""
    rows, known = len(prediction.log_below(0)), prediction.top == prediction.vocabulary.root
    top_level = int(prediction.vocabulary.level_of(torch.tensor(prediction.top)))
    for node, level in _asked(prediction):
        given = torch.full((rows,), node)
        yield compare(prediction.log_child(given, given), 0.0, {"node and child": node})
        yield compare(prediction.log_step(given, given), 0.0, {"node and child, by log_step": node})
        for child in below(prediction.vocabulary, node, level).tolist():
            mass = _words_below(prediction, child).logsumexp(-1)
            expected = mass - _words_below(prediction, node).logsumexp(-1)
            yield compare(
                prediction.log_child(given, torch.full((rows,), child)),
                expected,
                {"node": node, "child": child},
            )
            if node == prediction.top and level == top_level - 1:
                yield compare(
                    prediction.log_step(given, torch.full((rows,), child)),
                    expected,
                    {"child, by log_step": child},
                )
            if known:
                yield compare(
                    prediction.log_prob(torch.full((rows,), child)), mass, {"node": child}
                )


@law("clean law: draws follow it", tolerance=1e-9)
def draws_follow_law(prediction: CleanDistribution) -> Iterator[Gap]:
    """draw(node, level, u) is the descendant whose cell of the unit interval holds u: cells in tree order, as wide as
    exp log_child. Tried in the middle of every cell and just inside its ends; 1e-9 is how near."""
    rows = len(prediction.log_below(0))
    for node, level in _asked(prediction):
        ids = below(prediction.vocabulary, node, level)
        given, target = torch.full((rows,), node), torch.full((rows,), level)
        width = (
            torch.stack(
                [prediction.log_child(given, torch.full((rows,), int(child))) for child in ids], -1
            )
            .double()
            .exp()
        )
        right = width.cumsum(-1)
        for place in range(len(ids)):
            wide = width[:, place] > 1e-6
            for share in (1e-4, 0.5, 1.0 - 1e-4):
                u = right[:, place] - (1.0 - share) * width[:, place]
                drawn = prediction.draw(given, target, u.clamp(0.0, 1.0 - 1e-12))
                yield compare(drawn[wide], float(ids[place]), {"node": node, "u": u[wide]})


CLEAN_DISTRIBUTION_LAWS: tuple[Law, ...] = (
    masses_add_up,
    children_are_conditional,
    draws_follow_law,
)


def check_clean_distribution(prediction: CleanDistribution) -> list[LawReport]:
    """Every law of a law of the clean token, in float64 on a small vocabulary."""
    return evaluate_laws(prediction, CLEAN_DISTRIBUTION_LAWS)
