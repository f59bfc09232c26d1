"""Times: at which t each position is read, and how much of the bound that reading stands for."""

from __future__ import annotations

from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from ddiff.core.noise import Noise
from ddiff.errors import ArgumentError


class Times(NamedTuple):
    """[B,L] each, float64, float64 and bool.

    `t` the position's own time; `speed` = dt_i/dtau over the density of the draw, 0 where the position is not charged;
    `clean` where the position still holds its token (settled, or not noised by this rule). A sum of speed * density is an
    unbiased bound. A position that is not clean may well have speed 0: it waits at the prior.
    """

    t: Tensor
    speed: Tensor
    clean: Tensor


class Noisy(NamedTuple):
    """What a network is shown: states zt [B,L], times t [B,L] float64 (0 at clean positions), clean [B,L] bool.

    "Clean" is not t = 0: a process that does not close corrupts at t = 0 too, and a prompt never is.
    """

    zt: Tensor
    t: Tensor
    clean: Tensor


class TimeRule(Protocol):
    """Draws times for a global batch of `slots` samples; a pure function of the noise."""

    def draw(self, noise: Noise, slot: Tensor, slots: int | Tensor, length: int) -> Times:
        """Times for samples that hold the strata `slot` [B] of `slots`: of a global batch, or of each one's document."""

    def ends(self, noise: Noise, slot: Tensor, slots: int | Tensor, length: int) -> tuple[Times, Times]:
        """Where the decoding term and the closing term are read; speed is the weight of a position that is read."""


@final
class FlatTimes:
    """One t per sequence in [start, stop], stratified: slot i of n has its stratum, in van der Corput order.

    The spread-out order gives every contiguous share of the slots (a rank, a micro-batch) times from the whole window.
    """

    def __init__(self, start: float = 0.0, stop: float = 1.0) -> None:
        if not 0.0 <= start < stop <= 1.0:
            raise ArgumentError(f"FlatTimes: need 0 <= start < stop <= 1; got start = {start}, stop = {stop}.")
        self.start, self.stop = start, stop

    def draw(self, noise: Noise, slot: Tensor, slots: int | Tensor, length: int) -> Times:
        groups = torch.as_tensor(slots, device=slot.device).expand_as(slot)
        stratum = torch.zeros_like(slot)
        for count in groups.unique().tolist():
            stratum = torch.where(groups == count, van_der_corput_order(count).to(slot)[slot % count], stratum)
        share = (stratum + noise.uniform("time")[:, 0]) / groups
        width = self.stop - self.start
        return _everywhere((self.start + width * share).unsqueeze(-1).expand(-1, length), width)

    def ends(self, noise: Noise, slot: Tensor, slots: int | Tensor, length: int) -> tuple[Times, Times]:
        first = torch.full((len(slot), length), self.start, dtype=torch.float64, device=slot.device)
        return _everywhere(first, 1.0), _everywhere(torch.full_like(first, self.stop), 1.0)


def _everywhere(t: Tensor, speed: float) -> Times:
    return Times(t, torch.full_like(t, speed), torch.zeros_like(t, dtype=torch.bool))


def van_der_corput_order(count: int) -> Tensor:
    """[count] a permutation of 0..count-1: the ranks of the bit-reversed indices."""
    bits = max(count - 1, 1).bit_length()
    index = torch.arange(count)
    reversed_index = sum(((index >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    return torch.argsort(torch.argsort(torch.as_tensor(reversed_index)))
