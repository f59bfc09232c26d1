"""Faults planted in vocabularies, each found by the law meant for it."""

from __future__ import annotations

import pytest
import torch
from chains import PAIR
from faults import Fault, assert_found, tree_of
from torch import Tensor

from ddiff.core.vocabulary import HierarchicalVocabulary
from ddiff.testing import clean_distribution, vocabulary


class InIdOrder(HierarchicalVocabulary):  # type: ignore[misc]
    """Ids taken for tree order."""

    def order(self, level: int, device: torch.device | None = None) -> Tensor:
        return self.offsets[level] + torch.arange(self.level_sizes[level])


class WithoutARoot(HierarchicalVocabulary):  # type: ignore[misc]
    def level_of(self, ids: Tensor) -> Tensor:
        return super().level_of(ids).clamp(max=self.num_levels - 1)


class OrphansOfTheRoot(HierarchicalVocabulary):  # type: ignore[misc]
    def parent(self, ids: Tensor) -> Tensor:
        return torch.full_like(ids, self.root)


class WithGrandchildren(HierarchicalVocabulary):  # type: ignore[misc]
    def children(self, node: int) -> Tensor:
        return (
            clean_distribution.below(self, node, 0)
            if node >= self.num_tokens
            else super().children(node)
        )


class Forgetful(HierarchicalVocabulary):  # type: ignore[misc]
    def save(self, path: str) -> None:
        HierarchicalVocabulary(self.parents).save(path)


FAULTS = [
    Fault(
        "ids taken for tree order",
        vocabulary.ranges_are_contiguous,
        lambda: PAIR,
        lambda: InIdOrder([[0, 1, 0, 0]]),
    ),
    Fault("a root of no level", vocabulary.ids_run_by_level, lambda: PAIR, tree_of(WithoutARoot)),
    Fault(
        "everybody's parent is the root",
        vocabulary.ancestors_follow_parents,
        lambda: PAIR,
        tree_of(OrphansOfTheRoot),
    ),
    Fault(
        "grandchildren for children",
        vocabulary.children_invert_parent,
        lambda: PAIR,
        tree_of(WithGrandchildren),
    ),
    Fault(
        "a fingerprint that is not saved",
        vocabulary.survives_saving,
        tree_of(HierarchicalVocabulary),
        tree_of(Forgetful),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_found(fault)
