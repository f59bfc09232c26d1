"""Times: the t at which each position is evaluated, and its share of the bound.

A time rule works in tau, the share of the information that is lost (`ddiff.core.information`): its
windows are shares of tau and its draws are made in tau. The process's clock, a `TimeChange`, turns
them into the times t of the formulas.
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
    """Times at which the positions of a batch are evaluated.

    A sum of speed * density over the positions is an unbiased estimate of the diffusion term.

    Attributes:
        t: [B,L] float64, the time of each position.
        speed: [B,L] dt_i/dv for a draw with v uniform in [0,1], 0 if the position adds nothing.
        clean: bool [B,L], whether the position holds its token: it is settled, or this rule does
            not corrupt it.
        at_prior: bool [B,L], whether the position holds a draw of the prior and no position that
            adds to the bound attends to it. None: no position does.
        block: [1 or B,L] long, block numbers that restrict attention (see `Noisy`). None: every
            position attends to every other.
        paired: whether later blocks attend to the clean tokens of earlier ones (`Noisy.memory`).
    """

    t: Tensor
    speed: Tensor
    clean: Tensor
    at_prior: Tensor | None = None
    block: Tensor | None = None
    paired: bool = False


class Noisy(NamedTuple):
    """Input of the network: a corrupted batch, its times, and which positions attend to which.

    Attributes:
        zt: [B,L] states.
        t: [B,L] float64 times, 0 at clean positions.
        clean: bool [B,L], whether a position holds its token. This is not t = 0: a process that
            does not close corrupts at t = 0 too, and a prompt never is corrupted.
        block: [1 or B,L] long. Without it every position attends to every other. With it a position
            attends to its own and earlier blocks of zt.
        memory: [B,L] clean tokens. With it a position attends to its own block of zt and to the
            earlier blocks of the memory, so that the network predicts P(x_i | memory before its
            block, its block of zt), and all blocks can be evaluated in one pass.
    """

    zt: Tensor
    t: Tensor
    clean: Tensor
    block: Tensor | None = None
    memory: Tensor | None = None


class TimeSampler(Protocol):
    """Draw times for a global batch of `slots` samples, a pure function of the generator."""

    def draw(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> Times:
        """Times for samples that hold the strata `slot` [B] of `slots`.

        Strata are those of a global batch, or of the document of each sample. `clock` is the
        process's: t and dt/dtau at a share tau of lost information.
        """

    def ends(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> tuple[Times, Times]:
        """Times of the decoding term and of the closing term; speed is the weight of a position.

        In the closing term exactly the positions with speed > 0 hold draws of the prior, the others
        are at their times.
        """


class TimeRule(TimeSampler, Protocol):
    """Time sampler with the path that it draws from."""

    def at(
        self,
        clock: TimeChange,
        tau: Tensor,
        length: int,
    ) -> Times:
        """State of the path at tau [B] in [0,1]: 0 all settled, 1 all at the prior.

        Samplers follow this path.
        """

    def with_window(
        self,
        start: float,
        stop: float,
        tokens: int = 16,
    ) -> TimeRule:
        """The same rule on another window of tau, with draws for sequences of `tokens` tokens."""


@final
class FlatTimes:
    """One tau per sequence in [start, stop], stratified: slot i of n has its stratum.

    Strata are dealt out in van der Corput order, so that every contiguous share of the slots (a
    rank, a micro-batch) gets times from the whole window. `tokens` is the sequence length for
    which the density of draws has the least variance; it is not the length of the batch, so that
    the times of a sequence do not depend on its padding.
    """

    def __init__(
        self,
        start: float = 0.0,
        stop: float = 1.0,
        tokens: int = 16,
    ) -> None:
        _check_window("FlatTimes", start, stop)
        if tokens < 1:
            raise ArgumentError(f"FlatTimes: tokens must be at least 1; got {tokens}.")
        self.start = start
        self.stop = stop
        self.tokens = tokens

    def draw(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> Times:
        v = _one_per_sample(rng, slot, slots)
        t, speed = clock.draw(v, self.start, self.stop, self.tokens)
        return _full_attention_times(t.expand(-1, length), speed.expand(-1, length))

    def at(
        self,
        clock: TimeChange,
        tau: Tensor,
        length: int,
    ) -> Times:
        width = self.stop - self.start
        t, speed = clock.at((self.start + width * tau).unsqueeze(-1))
        speed = width * speed
        return _full_attention_times(t.expand(-1, length), speed.expand(-1, length))

    def ends(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> tuple[Times, Times]:
        tau = torch.tensor([self.start, self.stop], dtype=torch.float64, device=slot.device)
        t, _ = clock.at(tau)
        ones = torch.ones(len(slot), length, dtype=torch.float64, device=slot.device)
        first = _full_attention_times(t[0] * ones, ones)
        last = _full_attention_times(t[1] * ones, ones)
        return first, last

    def with_window(
        self,
        start: float,
        stop: float,
        tokens: int = 16,
    ) -> FlatTimes:
        return FlatTimes(start, stop, tokens)


@final
class WindowTimes:
    """A window of `width` positions is denoised at a time, from left to right.

    Positions before the window are settled, positions after it are at the prior.

    "block": windows next to each other, all positions of one at the same time (arXiv 2503.09573;
    width 1 is autoregression, width L one t for all). "slide": the window slides from left to
    right, and tau rises along it from the settled side to the side at the prior (arXiv 2504.06416).
    In both a position passes once through [start, stop], and its path is part of a path of the
    whole sequence, so the sum is a bound for any process.

    `paired` evaluates every window in one pass, each next to the clean tokens before it
    (`Noisy.memory`). Without it one window of the sequence is evaluated and counts for all of them:
    no wider input, but more variance.
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
        _check_window("WindowTimes", start, stop)
        self.width = width
        self.shape = shape
        self.paired = paired
        self.start = start
        self.stop = stop

    def with_window(
        self,
        start: float,
        stop: float,
        tokens: int = 16,
    ) -> WindowTimes:
        return WindowTimes(
            self.width,
            self.shape,
            self.paired,
            start,
            stop,
        )

    def draw(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> Times:
        if not self.paired:
            return self._draw_one_window(
                clock,
                rng,
                slot,
                slots,
                length,
            )
        if self.shape == "slide":
            phase = _one_per_sample(rng, slot, slots)
            return self._all_slides(clock, phase * self.width, length)
        # All windows are evaluated in one pass, each at its own time.
        v = jointly_stratified(rng, slot, slots, self._num_windows(length))
        return self._all_blocks(clock, v, length)

    def ends(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> tuple[Times, Times]:
        if self.shape == "block":
            return self._block_ends(clock, rng, slot, length)
        if self.paired:
            return self._paired_slide_ends(clock, rng, slot, length)
        return self._slide_ends(clock, rng, slot, length)

    # ------------------------------------------------------------------ paired: all windows at once

    def _paired_times(
        self,
        t: Tensor,
        speed: Tensor,
        window: Tensor,
    ) -> Times:
        return Times(
            t,
            speed,
            _all_false(t),
            block=window,
            paired=True,
        )

    def _all_blocks(
        self,
        clock: TimeChange,
        v: Tensor,
        length: int,
    ) -> Times:
        """Every block at its own v [B,count]."""
        window = self._window_numbers(length, v.device)
        t, speed = clock.draw(v, self.start, self.stop, self.width)
        block_of_position = window[0]
        return self._paired_times(
            t[:, block_of_position],
            speed[:, block_of_position],
            window,
        )

    def _all_slides(
        self,
        clock: TimeChange,
        offset: Tensor,
        length: int,
    ) -> Times:
        """Every window of a slide.

        `offset` [B,1] in [0, width) is the part of the first window beyond the left edge.
        """
        place = torch.arange(length, device=offset.device) + offset
        window = (place / self.width).floor().long()
        t, speed = self._at_share(clock, place / self.width - window)
        return self._paired_times(t, speed, window)

    def _at_share(self, clock: TimeChange, share: Tensor) -> tuple[Tensor, Tensor]:
        """t and dt/dshare at a share in [0,1] of the way from start to stop."""
        t, speed = clock.at(self.start + (self.stop - self.start) * share)
        return t, speed * (self.stop - self.start)

    # ------------------------------------------------------------------ one window of each sequence

    def _draw_one_window(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> Times:
        v = _one_per_sample(rng, slot, slots).squeeze(-1)
        if self.shape == "slide":
            return self.at(clock, v, length)
        count = self._num_windows(length)
        # Number of windows that are settled, as a real number: its fraction is the time.
        settled = (1.0 - v).unsqueeze(-1) * count
        # v = 0 would name a window beyond the last.
        current = settled.long().clamp(max=count - 1)
        t, speed = clock.draw(current + 1 - settled, self.start, self.stop, self.width)
        return self._one_open_block(t, speed * count, current, length)

    def at(
        self,
        clock: TimeChange,
        tau: Tensor,
        length: int,
    ) -> Times:
        share = 1.0 - tau.unsqueeze(-1)
        if self.shape == "block":
            count = self._num_windows(length)
            current = (share * count).long().clamp(max=count - 1)
            t, speed = self._at_share(clock, current + 1 - share * count)
            return self._one_open_block(t, speed * count, current, length)
        place = torch.arange(length, device=tau.device)
        first = share * (length + self.width) - self.width
        depth = (place - first) / self.width
        t, speed = self._at_share(clock, depth.clamp(0.0, 1.0))
        speed = speed * ((length + self.width) / self.width)
        return self._one_open_window(
            t,
            speed,
            depth <= 0,
            depth > 1,
            _window_numbers_at(depth),
        )

    def _one_open_block(
        self,
        t: Tensor,
        speed: Tensor,
        current: Tensor,
        length: int,
    ) -> Times:
        """[B,1] each: block `current` is at t, earlier blocks are clean, later at the prior."""
        window = self._window_numbers(length, t.device)
        wide = torch.zeros_like(window, dtype=t.dtype)
        return self._one_open_window(
            t + wide,
            speed + wide,
            window < current,
            window > current,
            window,
        )

    def _one_open_window(
        self,
        t: Tensor,
        speed: Tensor,
        clean: Tensor,
        at_prior: Tensor,
        block: Tensor,
    ) -> Times:
        """Times of sequences with one open window, which counts for all windows."""
        t = t.masked_fill(clean, 0.0).masked_fill(at_prior, 1.0)
        speed = speed.masked_fill(clean | at_prior, 0.0)
        return Times(
            t,
            speed,
            clean,
            at_prior,
            block,
        )

    # ------------------------------------------------------------------ ends

    def _block_ends(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        length: int,
    ) -> tuple[Times, Times]:
        count = self._num_windows(length)
        ones = torch.ones(len(slot), length, dtype=torch.float64, device=slot.device)
        tau = torch.tensor([self.start, self.stop], dtype=torch.float64, device=slot.device)
        t, _ = clock.at(tau)
        if self.paired:
            window = self._window_numbers(length, slot.device)
            first = self._paired_times(t[0] * ones, ones, window)
            last = self._paired_times(t[1] * ones, ones, window)
            return first, last
        current = (rng.uniform("window")[:, :1] * count).long()
        one = ones[:, :1]
        first = self._one_open_block(t[0] * one, one * count, current, length)
        last = self._one_open_block(t[1] * one, one * count, current, length)
        return first, last

    def _paired_slide_ends(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        length: int,
    ) -> tuple[Times, Times]:
        """A position settles when first in its window, and leaves the prior when last."""
        place = torch.arange(length, device=slot.device)
        shift = (rng.uniform("window")[:, :1] * self.width).floor()
        first = self._all_slides(clock, shift, length)
        window = ((place + shift) / self.width).floor().long()
        place_in_window = (place + shift) % self.width
        t, speed = self._at_share(clock, (place_in_window + 1.0) / self.width)
        last = self._paired_times(t, speed, window)
        weight = float(self.width)
        return (
            _with_weight(first, place_in_window == 0, weight),
            _with_weight(last, place_in_window == self.width - 1, weight),
        )

    def _slide_ends(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        length: int,
    ) -> tuple[Times, Times]:
        """Ends of one randomly chosen position, which counts for all positions."""
        place = torch.arange(length, device=slot.device)
        chosen = (rng.uniform("window")[:, :1] * length).floor()
        # The chosen position is decoded while the next one is still at the prior ...
        before = (place - chosen) / self.width
        t, speed = self._at_share(clock, before.clamp(0.0, 1.0))
        window = before.floor().long()
        decoded = self._one_open_window(
            t,
            speed,
            before < 0,
            before >= 1,
            window,
        )
        # ... and leaves the prior when the last one has settled.
        after = before + 1.0
        t, speed = self._at_share(clock, after.clamp(0.0, 1.0))
        window = _window_numbers_at(after)
        closed = self._one_open_window(
            t,
            speed,
            after <= 0,
            after > 1,
            window,
        )
        weight = float(length)
        return (
            _with_weight(decoded, place == chosen, weight),
            _with_weight(closed, place == chosen, weight),
        )

    def _window_numbers(self, length: int, device: torch.device) -> Tensor:
        """[1,L] window of each position."""
        return (torch.arange(length, device=device) // self.width).unsqueeze(0)

    def _num_windows(self, length: int) -> int:
        return -(-length // self.width)


def _check_window(name: str, start: float, stop: float) -> None:
    if not 0.0 <= start < stop <= 1.0:
        raise ArgumentError(
            f"{name}: need 0 <= start < stop <= 1; got start = {start}, stop = {stop}."
        )


def _window_numbers_at(depth: Tensor) -> Tensor:
    """Window numbers by depth in units of windows: the open window holds depths (0, 1].

    Before and after it windows follow each other as if all were open.
    """
    return depth.ceil().long() - 1


def _with_weight(times: Times, counted: Tensor, weight: float) -> Times:
    """Give the counted positions a weight, and the others 0."""
    speed = torch.where(counted, weight, 0.0)
    return times._replace(speed=speed.to(times.t))


def _all_false(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool)


def _full_attention_times(t: Tensor, speed: Tensor) -> Times:
    """Times without clean positions, without positions at the prior and without blocks."""
    return Times(t, speed, _all_false(t))


# ---------------------------------------------------------------------- stratification


def stratified(u: Tensor, stratum: Tensor, strata: int | Tensor) -> Tensor:
    """[B,k] uniforms and strata -> [B,k] numbers in [0,1), each in its stratum of `strata`.

    `strata` is one number, or [B]. Strata are dealt out in van der Corput order, so that a
    contiguous share of them covers the whole interval evenly.
    """
    counts = torch.as_tensor(strata, device=stratum.device)
    if counts.dim():
        counts = counts.unsqueeze(-1)
    counts = counts.expand_as(stratum)
    return (_van_der_corput_rank(stratum, counts) + u) / counts


def _one_per_sample(rng: CounterRng, slot: Tensor, slots: int | Tensor) -> Tensor:
    """[B,1] one stratified number per sample."""
    u = rng.uniform("time")[:, :1]
    return stratified(u, slot.unsqueeze(-1), slots)


def jointly_stratified(
    rng: CounterRng,
    slot: Tensor,
    slots: int | Tensor,
    count: int,
) -> Tensor:
    """[B,count] numbers in [0,1), one for each of `count` windows of samples with strata `slot`.

    The windows of a sample are evenly spaced. Each window is stratified over the slots, and all
    windows of all slots together, one in each of slots * count cells. The cells are rotated by a
    number that is shared within a group, since otherwise a window would only get one cell of each
    of its strata.
    """
    u = rng.uniform("time")[:, :1]
    if count == 1:
        return stratified(u, slot.unsqueeze(-1), slots)
    strata = torch.as_tensor(slots, device=slot.device).expand_as(slot).unsqueeze(-1)
    rank = _van_der_corput_rank(slot.unsqueeze(-1), strata)
    window = van_der_corput_order(count).to(slot.device)
    # Modulo count, strata * window repeats after count / common windows: these would share cells,
    # so each repetition is moved by one.
    common = torch.gcd(strata, torch.full_like(strata, count))
    cell = count * rank + strata * window + window // (count // common)
    rotation = rng.uniform_per_group("time").unsqueeze(-1)
    return ((cell + u) / (strata * count) + rotation / strata) % 1.0


def _van_der_corput_rank(stratum: Tensor, counts: Tensor) -> Tensor:
    """[B,k] place of each stratum in the van der Corput order of its number of strata."""
    rank = torch.zeros_like(stratum)
    for count in counts.unique().tolist():
        order = van_der_corput_order(count).to(stratum)
        rank = torch.where(counts == count, order[stratum % count], rank)
    return rank


def van_der_corput_order(count: int) -> Tensor:
    """[count] permutation of 0..count-1: the ranks of the bit-reversed indices."""
    bits = max(count - 1, 1).bit_length()
    index = torch.arange(count)
    reversed_index = torch.zeros_like(index)
    for bit in range(bits):
        reversed_index = reversed_index + (((index >> bit) & 1) << (bits - 1 - bit))
    return torch.argsort(torch.argsort(reversed_index))
