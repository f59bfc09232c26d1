"""Faults planted in time rules, each found by the law meant for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faults import Fault, assert_found
from torch import Tensor

from ddiff.core.times import FlatTimes, Times, WindowTimes, stratified
from ddiff.testing import time_rule


class ContiguousSlices(FlatTimes):
    """Slot i of n reads (i + u)/n: every rank sees its own slice of time."""

    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        t = (slot.unsqueeze(-1) + noise.uniform("time")[:, :1]) / slots
        return super().draw(clock, noise, slot, slots, length)._replace(t=t.expand(-1, length))


class WithoutDensity(FlatTimes):
    """t drawn as u^2 with the speed of a uniform draw."""

    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        drawn = super().draw(clock, noise, slot, slots, length)
        return drawn._replace(t=drawn.t**2)


class BackInTime(FlatTimes):
    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        drawn = super().draw(clock, noise, slot, slots, length)
        return drawn._replace(speed=-drawn.speed)


class ByPlaceInTheBatch(FlatTimes):
    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        return super().draw(clock, noise, torch.arange(len(slot)), slots, length)


class WindowsByPlaceInTheGrid(WindowTimes):  # type: ignore[misc]
    """Times of all windows of a batch dealt out in one grid: a window then always has the same quarter of time."""

    def draw(self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int) -> Times:
        drawn = super().draw(clock, noise, slot, slots, length)
        stratum = slot.unsqueeze(-1) * length + torch.arange(length)
        return drawn._replace(t=stratified(noise.uniform("time"), stratum, slots * length))


class DecodedTwice(WindowTimes):  # type: ignore[misc]
    """Both the window that settles and the next one are read where a window settles."""

    def ends(
        self, clock: Any, noise: Any, slot: Tensor, slots: Any, length: int
    ) -> tuple[Times, Times]:
        first, last = super().ends(clock, noise, slot, slots, length)
        return first._replace(speed=first.speed + first.speed.roll(1, -1)), last


class PathsAtHalfSpeed(WindowTimes):  # type: ignore[misc]
    def at(self, clock: Any, tau: Tensor, length: int) -> Times:
        path = super().at(clock, tau, length)
        return path._replace(speed=path.speed / 2)


class WaitingInSight(WindowTimes):  # type: ignore[misc]
    """What is settled is in one block, all else in the next."""

    def at(self, clock: Any, tau: Tensor, length: int) -> Times:
        path = super().at(clock, tau, length)
        return path._replace(block=(~path.clean).long())


FAULTS = [
    Fault("contiguous slices of time", time_rule.parts_are_balanced, FlatTimes, ContiguousSlices),
    Fault(
        "windows by their place in the grid",
        time_rule.speeds_are_unbiased,
        lambda: WindowTimes(1),
        lambda: WindowsByPlaceInTheGrid(1),
    ),
    Fault(
        "two windows decoded at once",
        time_rule.ends_are_read_once,
        lambda: WindowTimes(2, "slide"),
        lambda: DecodedTwice(2, "slide"),
    ),
    Fault(
        "a path at half its speed",
        time_rule.paths_move_forward,
        lambda: WindowTimes(2, "slide", paired=False),
        lambda: PathsAtHalfSpeed(2, "slide", paired=False),
    ),
    Fault(
        "who waits in sight of who is read",
        time_rule.prior_positions_are_hidden,
        lambda: WindowTimes(2, paired=False),
        lambda: WaitingInSight(2, paired=False),
    ),
    Fault(
        "a draw of t without its density", time_rule.speeds_are_unbiased, FlatTimes, WithoutDensity
    ),
    Fault(
        "times by place in the batch",
        time_rule.times_are_independent_of_batch,
        FlatTimes,
        ByPlaceInTheBatch,
    ),
    Fault("speeds below zero", time_rule.times_are_valid, FlatTimes, BackInTime),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_found(fault)
