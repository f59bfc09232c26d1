"""Faults planted in vocabularies; each must be detected by one conformance check."""

from __future__ import annotations

import pytest
import torch
from chains import PAIR
from faults import Fault, assert_detected, small_tree
from torch import Tensor

from ddiff.core.vocabulary import HierarchicalVocabulary
from ddiff.testing import clean_distribution, vocabulary


class IdOrderAsTreeOrder(HierarchicalVocabulary):  # type: ignore[misc]
    """Fault: `order` sorts ids by number instead of by their path from the root."""

    def order(self, level: int, device: torch.device | None = None) -> Tensor:
        return self.offsets[level] + torch.arange(self.level_sizes[level])


class RootBelowItsLevel(HierarchicalVocabulary):  # type: ignore[misc]
    """Fault: `level_of` gives the root one level too low."""

    def level_of(self, ids: Tensor) -> Tensor:
        return super().level_of(ids).clamp(max=self.num_levels - 1)


class RootAsEveryParent(HierarchicalVocabulary):  # type: ignore[misc]
    """Fault: the parent of every id is the root."""

    def parent(self, ids: Tensor) -> Tensor:
        return torch.full_like(ids, self.root)


class GrandchildrenAsChildren(HierarchicalVocabulary):  # type: ignore[misc]
    """Fault: `children` of a node returns its leaf tokens."""

    def children(self, node: int) -> Tensor:
        return (
            clean_distribution.below(self, node, 0)
            if node >= self.num_tokens
            else super().children(node)
        )


class FingerprintNotSaved(HierarchicalVocabulary):  # type: ignore[misc]
    """Fault: `save` leaves out the fingerprint of the tokenizer."""

    def save(self, path: str) -> None:
        HierarchicalVocabulary(self.parents).save(path)


FAULTS = [
    Fault(
        "order returns ids in id order",
        vocabulary.ranges_are_contiguous,
        lambda: PAIR,
        lambda: IdOrderAsTreeOrder([[0, 1, 0, 0]]),
    ),
    Fault(
        "the root has the wrong level",
        vocabulary.ids_run_by_level,
        lambda: PAIR,
        small_tree(RootBelowItsLevel),
    ),
    Fault(
        "the parent of every id is the root",
        vocabulary.ancestors_follow_parents,
        lambda: PAIR,
        small_tree(RootAsEveryParent),
    ),
    Fault(
        "children returns grandchildren",
        vocabulary.children_invert_parent,
        lambda: PAIR,
        small_tree(GrandchildrenAsChildren),
    ),
    Fault(
        "save leaves out the fingerprint",
        vocabulary.survives_saving,
        small_tree(HierarchicalVocabulary),
        small_tree(FingerprintNotSaved),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)
