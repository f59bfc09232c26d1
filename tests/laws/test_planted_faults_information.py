"""Faults planted in information time, each found by the law meant for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from faults import Fault, assert_found, masks_by_power, on_pair
from torch import Tensor

from ddiff.core.information import IdentityTime, InformationTime
from ddiff.core.tree import TreeProcess
from ddiff.testing import information


class MasksAlone(TreeProcess):  # type: ignore[misc]
    """Clusters taken for masks: what a cluster says of its token is left out."""

    def information(self, t: Tensor) -> Tensor:
        return self.clock.pi(t)[:, 0] * math.log(self.vocabulary.num_tokens)


class SlowClock:
    """The times of another clock, told with half their speed."""

    def __init__(self, clock: InformationTime) -> None:
        self.clock = clock

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        t, speed = self.clock.at(tau)
        return t, speed / 2.0


class SlowTree(TreeProcess):  # type: ignore[misc]
    @property
    def information_time(self) -> Any:  # type: ignore[override]
        return SlowClock(
            InformationTime(self.information, self.information_lost, self.change_probability)
        )


class EarlyMasks(TreeProcess):  # type: ignore[misc]
    """t^0.3 of the tokens are masked by t, and times are drawn evenly in t all the same."""

    @property
    def information_time(self) -> Any:  # type: ignore[override]
        return IdentityTime()


FAULTS = [
    Fault(
        "information without clusters",
        information.information_is_enumerated,
        on_pair(TreeProcess),
        on_pair(MasksAlone),
    ),
    Fault(
        "a clock at half its speed",
        information.clock_is_a_time_change,
        on_pair(TreeProcess),
        on_pair(SlowTree),
    ),
    Fault(
        "a clock that does not follow the information",
        information.tau_is_the_share_lost,
        masks_by_power(TreeProcess),
        masks_by_power(EarlyMasks),
    ),
    Fault(
        "even times where tokens are masked early",
        information.variance_has_no_tail,
        masks_by_power(TreeProcess),
        masks_by_power(EarlyMasks),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_found(fault)
