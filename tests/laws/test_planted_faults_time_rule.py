"""Faults planted in time rules; each must be detected by one conformance check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faults import Fault, assert_detected
from torch import Tensor

from ddiff.core.times import FlatTimes, Times, WindowTimes, stratified
from ddiff.testing import time_rule


class ContiguousSlices(FlatTimes):
    """Fault: sample i of n has the time (i + u)/n, so that each rank has only a slice of times."""

    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        t = (slot.unsqueeze(-1) + noise.uniform("time")[:, :1]) / slots
        return super().draw(clock, noise, slot, slots, length)._replace(t=t.expand(-1, length))


class SquaredUniformTimes(FlatTimes):
    """Fault: times are squared uniforms, but the declared speed is that of uniforms."""

    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        drawn = super().draw(clock, noise, slot, slots, length)
        return drawn._replace(t=drawn.t**2)


class NegativeSpeeds(FlatTimes):
    """Fault: speeds are negative."""

    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        drawn = super().draw(clock, noise, slot, slots, length)
        return drawn._replace(speed=-drawn.speed)


class TimesByBatchPosition(FlatTimes):
    """Fault: times depend on the index within the batch instead of the global index."""

    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        return super().draw(clock, noise, torch.arange(len(slot)), slots, length)


class StrataSharedByWindows(WindowTimes):  # type: ignore[misc]
    """Fault: all windows share strata, so a window always has the same quarter of time."""

    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        drawn = super().draw(clock, noise, slot, slots, length)
        stratum = slot.unsqueeze(-1) * length + torch.arange(length)
        return drawn._replace(t=stratified(noise.uniform("time"), stratum, slots * length))


class TwoWindowsDecoded(WindowTimes):  # type: ignore[misc]
    """Fault: the decoding term scores two windows instead of one."""

    def ends(
        self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int
    ) -> tuple[Times, Times]:
        first, last = super().ends(clock, noise, slot, slots, length)
        return first._replace(speed=first.speed + first.speed.roll(1, -1)), last


class HalvedPathSpeed(WindowTimes):  # type: ignore[misc]
    """Fault: the declared speed of the path is half the true speed."""

    def at(self, clock: Any, tau: Tensor, length: int) -> Times:
        path = super().at(clock, tau, length)
        return path._replace(speed=path.speed / 2)


class PriorInSight(WindowTimes):  # type: ignore[misc]
    """Fault: positions at the prior are in the block of scored positions, which attend to them."""

    def at(self, clock: Any, tau: Tensor, length: int) -> Times:
        path = super().at(clock, tau, length)
        return path._replace(block=(~path.clean).long())


FAULTS = [
    Fault(
        "each rank has a contiguous slice of time",
        time_rule.parts_are_balanced,
        FlatTimes,
        ContiguousSlices,
    ),
    Fault(
        "all windows share their strata",
        time_rule.speeds_are_unbiased,
        lambda: WindowTimes(1),
        lambda: StrataSharedByWindows(1),
    ),
    Fault(
        "two windows are scored at one end",
        time_rule.ends_are_scored_once,
        lambda: WindowTimes(2, "slide"),
        lambda: TwoWindowsDecoded(2, "slide"),
    ),
    Fault(
        "the declared speed of the path is halved",
        time_rule.paths_move_forward,
        lambda: WindowTimes(2, "slide", paired=False),
        lambda: HalvedPathSpeed(2, "slide", paired=False),
    ),
    Fault(
        "positions at the prior are in a scored block",
        time_rule.prior_positions_are_hidden,
        lambda: WindowTimes(2, paired=False),
        lambda: PriorInSight(2, paired=False),
    ),
    Fault(
        "times are squared but speeds are not adapted",
        time_rule.speeds_are_unbiased,
        FlatTimes,
        SquaredUniformTimes,
    ),
    Fault(
        "times depend on the index within the batch",
        time_rule.times_are_independent_of_batch,
        FlatTimes,
        TimesByBatchPosition,
    ),
    Fault("speeds are negative", time_rule.times_are_valid, FlatTimes, NegativeSpeeds),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)
