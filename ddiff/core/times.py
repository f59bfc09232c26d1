"""Times: at which t each position is read, and how much of the bound that reading stands for.

A time rule speaks of tau, the share of the information that is lost (`ddiff.core.information`): its windows are shares
of tau and its draws are made in tau. The process's clock, a `TimeChange`, turns them into the times t that formulas take.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, final, get_args

import torch
from torch import Tensor

from ddiff.core.information import TimeChange
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError

Shape = Literal["block", "slide"]


class Times(NamedTuple):
    """At which time each position of a batch is read.

    `t` [B,L] float64, the position's own time; `speed` [B,L] = dt_i/dv for a draw with v uniform in [0,1], 0 where the
    position is not charged; `clean` bool [B,L] where it still holds its token (settled, or not noised by this rule). A
    sum of speed * density is an unbiased bound. `at_prior` bool [B,L] (None: nowhere) where the position holds a draw
    of the prior and no position that is charged sees it; `block` [1 or B,L] long numbers who sees whom (None:
    everybody everybody), and `paired` shows later blocks the clean words of earlier ones beside the noisy ones: see
    `Noisy`.
    """

    t: Tensor
    speed: Tensor
    clean: Tensor
    at_prior: Tensor | None = None
    block: Tensor | None = None
    paired: bool = False


class Noisy(NamedTuple):
    """What a network is shown: states zt [B,L], times t [B,L] float64 (0 at clean positions), clean [B,L] bool.

    "Clean" is not t = 0: a process that does not close corrupts at t = 0 too, and a prompt never is. Without `block` every
    position sees every other. With `block` [1 or B,L] long it sees its own and earlier blocks of zt. With `memory`
    [B,L] words too, it sees its own block of zt and the earlier blocks of the memory: its law is P(x_i | memory before
    its block, its block of zt), and all blocks can be read in one pass.
    """

    zt: Tensor
    t: Tensor
    clean: Tensor
    block: Tensor | None = None
    memory: Tensor | None = None


class TimeSampler(Protocol):
    """Times for a global batch of `slots` samples, a pure function of the noise: what the bound asks of a rule."""

    def draw(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> Times:
        """Times for samples that hold the strata `slot` [B] of `slots`: of a global batch, or of each one's document.

        `clock` is the process's: t and dt/dtau at a share tau of lost information.
        """

    def ends(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> tuple[Times, Times]:
        """The times at which the decoding term and the closing term are read; speed is a position's weight there.

        In the closing term exactly the positions with speed > 0 hold draws of the prior, the others stand at their
        times.
        """


class TimeRule(TimeSampler, Protocol):
    """A rule with the path that it draws from."""

    def at(self, clock: TimeChange, tau: Tensor, length: int) -> Times:
        """[B] the state of the path at tau in [0,1], 0 all settled and 1 all at the prior: what samplers walk along."""

    def with_window(self, start: float, stop: float, tokens: int = 16) -> TimeRule:
        """The same rule on another window of tau, its draws made for sequences of `tokens` tokens."""


@final
class FlatTimes:
    """One tau per sequence in [start, stop], stratified: slot i of n has its stratum, in van der Corput order.

    The spread-out order gives every contiguous share of the slots (a rank, a micro-batch) times from the whole window.
    `tokens` is the number of tokens of a sequence for which the density of draws has the least variance; it is not read
    off the batch, so that a sequence's times do not depend on how far it is padded.
    """

    def __init__(self, start: float = 0.0, stop: float = 1.0, tokens: int = 16) -> None:
        if not 0.0 <= start < stop <= 1.0:
            raise ArgumentError(
                f"FlatTimes: need 0 <= start < stop <= 1; got start = {start}, stop = {stop}."
            )
        if tokens < 1:
            raise ArgumentError(f"FlatTimes: tokens must be at least 1; got {tokens}.")
        self.start, self.stop, self.tokens = start, stop, tokens

    def draw(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> Times:
        v = stratified(rng.uniform("time")[:, :1], slot.unsqueeze(-1), slots)
        t, speed = clock.draw(v, self.start, self.stop, self.tokens)
        return _everywhere(t.expand(-1, length), speed.expand(-1, length))

    def at(self, clock: TimeChange, tau: Tensor, length: int) -> Times:
        width = self.stop - self.start
        t, speed = clock.at((self.start + width * tau).unsqueeze(-1))
        return _everywhere(t.expand(-1, length), (width * speed).expand(-1, length))

    def ends(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> tuple[Times, Times]:
        tau = torch.tensor([self.start, self.stop], dtype=torch.float64, device=slot.device)
        t = clock.at(tau)[0]
        ones = torch.ones(len(slot), length, dtype=torch.float64, device=slot.device)
        return _everywhere(t[0] * ones, ones), _everywhere(t[1] * ones, ones)

    def with_window(self, start: float, stop: float, tokens: int = 16) -> FlatTimes:
        return FlatTimes(start, stop, tokens)


@final
class WindowTimes:
    """A window of `width` positions is denoised at a time; what is before it is settled, what is after it waits.

    "block": windows stand side by side, all positions of one at the same time (arXiv 2503.09573; width 1 is
    autoregression, width L one t for all). "slide": the window glides from left to right, and tau rises along it from the
    settled side to the waiting one (arXiv 2504.06416). In both a position goes once through [start, stop] and its
    path is part of a path of the whole sequence, so the sum is a bound for any process.

    `paired` reads every window in one pass, each beside the clean words before it (Noisy.memory). Without it one
    window of the sequence is read, which counts for all of them: no wider input, but more variance.
    """

    def __init__(
        self,
        width: int,
        shape: Shape = "block",
        paired: bool = True,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        if width < 1:
            raise ArgumentError(f"WindowTimes: width must be at least 1; got {width}.")
        if shape not in get_args(Shape):
            raise ArgumentError(f'WindowTimes: shape must be "block" or "slide"; got {shape!r}.')
        if not 0.0 <= start < stop <= 1.0:
            raise ArgumentError(
                f"WindowTimes: need 0 <= start < stop <= 1; got start = {start}, stop = {stop}."
            )
        self.width, self.shape, self.paired, self.start, self.stop = (
            width,
            shape,
            paired,
            start,
            stop,
        )

    def with_window(self, start: float, stop: float, tokens: int = 16) -> WindowTimes:
        return WindowTimes(self.width, self.shape, self.paired, start, stop)

    def draw(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> Times:
        if not self.paired:
            return self._one_window(clock, rng, slot, slots, length)
        if self.shape == "slide":
            phase = stratified(rng.uniform("time")[:, :1], slot.unsqueeze(-1), slots)
            return self._sliding(clock, phase * self.width, length)
        return self._all_blocks(
            clock, jointly_stratified(rng, slot, slots, self._count(length)), length
        )

    def ends(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> tuple[Times, Times]:
        if self.shape == "block":
            return self._ends_of_blocks(clock, rng, slot, length)
        return self._ends_of_slides(clock, rng, slot, length)

    # ------------------------------------------------------------------ paired: every window at once

    def _all_windows(self, t: Tensor, speed: Tensor, window: Tensor) -> Times:
        return Times(t, speed, _nowhere(t), block=window, paired=True)

    def _all_blocks(self, clock: TimeChange, v: Tensor, length: int) -> Times:
        """Every block at its own v [B,count]."""
        window = self._windows(length, v.device)
        t, speed = clock.draw(v, self.start, self.stop, self.width)
        return self._all_windows(t[:, window[0]], speed[:, window[0]], window)

    def _sliding(self, clock: TimeChange, offset: Tensor, length: int) -> Times:
        """`offset` [B,1] in [0, width): the part of the first window that hangs over the left edge."""
        place = torch.arange(length, device=offset.device) + offset
        window = (place / self.width).floor().long()
        return self._all_windows(*self._on_the_way(clock, place / self.width - window), window)

    def _on_the_way(self, clock: TimeChange, share: Tensor) -> tuple[Tensor, Tensor]:
        """t and dt/dshare at a share in [0,1] of the way from start to stop."""
        t, speed = clock.at(self.start + (self.stop - self.start) * share)
        return t, speed * (self.stop - self.start)

    # ------------------------------------------------------------------ one window of each sequence

    def _one_window(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> Times:
        v = stratified(rng.uniform("time")[:, :1], slot.unsqueeze(-1), slots).squeeze(-1)
        if self.shape == "slide":
            return self.at(clock, v, length)
        count = self._count(length)
        share = (1.0 - v).unsqueeze(-1) * count
        current = share.long().clamp(max=count - 1)
        t, speed = clock.draw(current + 1 - share, self.start, self.stop, self.width)
        return self._open_block(t, speed * count, current, length)

    def at(self, clock: TimeChange, tau: Tensor, length: int) -> Times:
        share = 1.0 - tau.unsqueeze(-1)
        if self.shape == "block":
            count = self._count(length)
            current = (share * count).long().clamp(max=count - 1)
            t, speed = self._on_the_way(clock, current + 1 - share * count)
            return self._open_block(t, speed * count, current, length)
        place = torch.arange(length, device=tau.device)
        first = share * (length + self.width) - self.width
        level = (place - first) / self.width
        t, speed = self._on_the_way(clock, level.clamp(0.0, 1.0))
        speed = speed * ((length + self.width) / self.width)
        return self._placed(t, speed, level <= 0, level > 1, _after(level))

    def _open_block(self, t: Tensor, speed: Tensor, current: Tensor, length: int) -> Times:
        """[B,1] each: the block `current` is at t, those before it are clean, those after it wait."""
        window = self._windows(length, t.device)
        wide = torch.zeros_like(window, dtype=t.dtype)
        return self._placed(t + wide, speed + wide, window < current, window > current, window)

    def _placed(
        self, t: Tensor, speed: Tensor, clean: Tensor, waiting: Tensor, block: Tensor
    ) -> Times:
        """Times of sequences of which one window is open; speed is that of its reading for all windows."""
        t = t.masked_fill(clean, 0.0).masked_fill(waiting, 1.0)
        return Times(t, speed.masked_fill(clean | waiting, 0.0), clean, waiting, block)

    # ------------------------------------------------------------------ ends

    def _ends_of_blocks(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, length: int
    ) -> tuple[Times, Times]:
        count = self._count(length)
        ones = torch.ones(len(slot), length, dtype=torch.float64, device=slot.device)
        t = clock.at(
            torch.tensor([self.start, self.stop], dtype=torch.float64, device=slot.device)
        )[0]
        if self.paired:
            window = self._windows(length, slot.device)
            return self._all_windows(t[0] * ones, ones, window), self._all_windows(
                t[1] * ones, ones, window
            )
        current = (rng.uniform("window")[:, :1] * count).long()
        weight = ones[:, :1] * count
        first = self._open_block(t[0] * ones[:, :1], weight, current, length)
        return first, self._open_block(t[1] * ones[:, :1], weight, current, length)

    def _ends_of_slides(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, length: int
    ) -> tuple[Times, Times]:
        """A position settles when it is first in its window, and has just come off the prior when it is last."""
        place = torch.arange(length, device=slot.device)
        if self.paired:
            shift = (rng.uniform("window")[:, :1] * self.width).floor()
            first = self._sliding(clock, shift, length)
            window = ((place + shift) / self.width).floor().long()
            along = ((place + shift) % self.width + 1.0) / self.width
            last = self._all_windows(*self._on_the_way(clock, along), window)
            charged = (place + shift) % self.width
            times = float(self.width)
            return _charged(first, charged == 0, times), _charged(
                last, charged == self.width - 1, times
            )
        chosen = (rng.uniform("window")[:, :1] * length).floor()
        before = (place - chosen) / self.width
        after = before + 1.0
        # decoded while the next one still waits; come off the prior when the last one has settled
        t, speed = self._on_the_way(clock, before.clamp(0.0, 1.0))
        decoded = self._placed(t, speed, before < 0, before >= 1, before.floor().long())
        t, speed = self._on_the_way(clock, after.clamp(0.0, 1.0))
        closed = self._placed(t, speed, after <= 0, after > 1, _after(after))
        return (
            _charged(decoded, place == chosen, float(length)),
            _charged(closed, place == chosen, float(length)),
        )

    def _windows(self, length: int, device: torch.device) -> Tensor:
        return (torch.arange(length, device=device) // self.width).unsqueeze(0)

    def _count(self, length: int) -> int:
        return -(-length // self.width)


def _after(level: Tensor) -> Tensor:
    """The windows when the open one holds (0, 1]: before and after it they follow each other as if all were open."""
    return level.ceil().long() - 1


def _charged(times: Times, charged: Tensor, weight: float) -> Times:
    return times._replace(speed=torch.where(charged, weight, 0.0).to(times.t))


def stratified(u: Tensor, stratum: Tensor, strata: int | Tensor) -> Tensor:
    """[B,k] uniforms and strata -> [B,k] numbers in [0,1), each in its stratum of `strata` (one number, or [B]).

    Strata are dealt out in van der Corput order, so that a contiguous share of them covers the whole interval evenly.
    """
    groups = torch.as_tensor(strata, device=stratum.device)
    groups = (groups.unsqueeze(-1) if groups.dim() else groups).expand_as(stratum)
    return (_rank(stratum, groups) + u) / groups


def jointly_stratified(rng: CounterRng, slot: Tensor, slots: int | Tensor, count: int) -> Tensor:
    """[B,count] numbers in [0,1), one for each of `count` windows of the samples that hold the strata `slot` of `slots`.

    The windows of a sample stand evenly apart; each window is stratified over the slots, and all windows of all slots
    together, one in each of slots * count cells. The cells are turned by a number that all of a group share, since
    otherwise a window would see only one cell of each of its strata.
    """
    u = rng.uniform("time")[:, :1]
    if count == 1:
        return stratified(u, slot.unsqueeze(-1), slots)
    groups = torch.as_tensor(slots, device=slot.device).expand_as(slot).unsqueeze(-1)
    rank = _rank(slot.unsqueeze(-1), groups)
    window = van_der_corput_order(count).to(slot.device)
    # windows that slots * window would put into the same cell, as many as the common divisor, are moved by one each
    common = torch.gcd(groups, torch.full_like(groups, count))
    cell = count * rank + groups * window + window // (count // common)
    turn = rng.uniform_per_group("time").unsqueeze(-1)
    return ((cell + u) / (groups * count) + turn / groups) % 1.0


def _rank(stratum: Tensor, groups: Tensor) -> Tensor:
    """[B,k] the place of each stratum in the van der Corput order of its group."""
    rank = torch.zeros_like(stratum)
    for count in groups.unique().tolist():
        rank = torch.where(
            groups == count, van_der_corput_order(count).to(stratum)[stratum % count], rank
        )
    return rank


def _nowhere(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool)


def _everywhere(t: Tensor, speed: Tensor) -> Times:
    return Times(t, speed, _nowhere(t))


def van_der_corput_order(count: int) -> Tensor:
    """[count] a permutation of 0..count-1: the ranks of the bit-reversed indices."""
    bits = max(count - 1, 1).bit_length()
    index = torch.arange(count)
    reversed_index = sum(((index >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    return torch.argsort(torch.argsort(torch.as_tensor(reversed_index)))
