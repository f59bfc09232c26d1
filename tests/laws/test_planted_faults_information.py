"""Faults planted in information time; each must be detected by one conformance check.

Information time tau is the share of information on the token that is lost at noise time t.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from faults import Fault, assert_detected, power_masking, tree_on_pair
from torch import Tensor

from ddiff.core.information import IdentityTime, InformationTime
from ddiff.core.tree import TreeProcess
from ddiff.testing import information


class InformationWithoutNodes(TreeProcess):  # type: ignore[misc]
    """Fault: the information that clusters have about their tokens is left out."""

    def information(self, t: Tensor) -> Tensor:
        return self.clock.pi(t)[:, 0] * math.log(self.vocabulary.num_tokens)


class HalfSpeedClock:
    """Fault: the speed dt/dtau is half the true speed."""

    def __init__(self, clock: InformationTime) -> None:
        self.clock = clock

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        t, speed = self.clock.at(tau)
        return t, speed / 2.0


class HalfSpeedTree(TreeProcess):  # type: ignore[misc]
    """Fault: the information time is a `HalfSpeedClock`."""

    @property
    def information_time(self) -> Any:  # type: ignore[override]
        return HalfSpeedClock(
            InformationTime(self.information, self.information_lost, self.change_probability)
        )


class EvenTimesForEarlyMasks(TreeProcess):  # type: ignore[misc]
    """Fault: times are uniform in t, although the fraction t^0.3 of tokens is masked at time t."""

    @property
    def information_time(self) -> Any:  # type: ignore[override]
        return IdentityTime()


FAULTS = [
    Fault(
        "the information of clusters is left out",
        information.information_is_enumerated,
        tree_on_pair(TreeProcess),
        tree_on_pair(InformationWithoutNodes),
    ),
    Fault(
        "the speed is halved",
        information.clock_is_a_time_change,
        tree_on_pair(TreeProcess),
        tree_on_pair(HalfSpeedTree),
    ),
    Fault(
        "times are uniform although masks are early",
        information.tau_is_the_share_lost,
        power_masking(TreeProcess),
        power_masking(EvenTimesForEarlyMasks),
    ),
    Fault(
        "uniform times have a large variance at the ends",
        information.variance_has_no_tail,
        power_masking(TreeProcess),
        power_masking(EvenTimesForEarlyMasks),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)
