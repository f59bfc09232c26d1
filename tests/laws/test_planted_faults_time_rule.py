"""Faults planted in time rules, each found by the law meant for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faults import Fault, assert_detected
from torch import Tensor

from ddiff.core.times import FlatTimes, Times, WindowTimes, stratified
from ddiff.testing import time_rule


class ContiguousSlices(FlatTimes):
    """Slot i of n has time (i + u)/n: every rank has its own slice of time."""

    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        t = (slot.unsqueeze(-1) + noise.uniform("time")[:, :1]) / slots
        return super().draw(clock, noise, slot, slots, length)._replace(t=t.expand(-1, length))


class SquaredUniformTimes(FlatTimes):
    """t drawn as u^2 with the speed of a uniform draw."""

    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        drawn = super().draw(clock, noise, slot, slots, length)
        return drawn._replace(t=drawn.t**2)


class NegativeSpeeds(FlatTimes):
    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        drawn = super().draw(clock, noise, slot, slots, length)
        return drawn._replace(speed=-drawn.speed)


class TimesByBatchPosition(FlatTimes):
    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        return super().draw(clock, noise, torch.arange(len(slot)), slots, length)


class StrataSharedByWindows(WindowTimes):  # type: ignore[misc]
    """Strata shared by all windows: a window then always has the same quarter of time."""

    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        drawn = super().draw(clock, noise, slot, slots, length)
        stratum = slot.unsqueeze(-1) * length + torch.arange(length)
        return drawn._replace(t=stratified(noise.uniform("time"), stratum, slots * length))


class TwoWindowsDecoded(WindowTimes):  # type: ignore[misc]
    """Reads the window that gets clean and the next one at the first end."""

    def ends(
        self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int
    ) -> tuple[Times, Times]:
        first, last = super().ends(clock, noise, slot, slots, length)
        return first._replace(speed=first.speed + first.speed.roll(1, -1)), last


class HalvedPathSpeed(WindowTimes):  # type: ignore[misc]
    def at(self, clock: Any, tau: Tensor, length: int) -> Times:
        path = super().at(clock, tau, length)
        return path._replace(speed=path.speed / 2)


class PriorInSight(WindowTimes):  # type: ignore[misc]
    """Clean positions are in one block, all others in the next."""

    def at(self, clock: Any, tau: Tensor, length: int) -> Times:
        path = super().at(clock, tau, length)
        return path._replace(block=(~path.clean).long())


FAULTS = [
    Fault("contiguous slices of time", time_rule.parts_are_balanced, FlatTimes, ContiguousSlices),
    Fault(
        "strata shared by the windows",
        time_rule.speeds_are_unbiased,
        lambda: WindowTimes(1),
        lambda: StrataSharedByWindows(1),
    ),
    Fault(
        "two windows read at one end",
        time_rule.ends_are_read_once,
        lambda: WindowTimes(2, "slide"),
        lambda: TwoWindowsDecoded(2, "slide"),
    ),
    Fault(
        "a path at half its speed",
        time_rule.paths_move_forward,
        lambda: WindowTimes(2, "slide", paired=False),
        lambda: HalvedPathSpeed(2, "slide", paired=False),
    ),
    Fault(
        "positions at the prior in a charged block",
        time_rule.prior_positions_are_hidden,
        lambda: WindowTimes(2, paired=False),
        lambda: PriorInSight(2, paired=False),
    ),
    Fault(
        "squared uniforms with the speed of uniforms",
        time_rule.speeds_are_unbiased,
        FlatTimes,
        SquaredUniformTimes,
    ),
    Fault(
        "times by position in the batch",
        time_rule.times_are_independent_of_batch,
        FlatTimes,
        TimesByBatchPosition,
    ),
    Fault("negative speeds", time_rule.times_are_valid, FlatTimes, NegativeSpeeds),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_detected(fault)
