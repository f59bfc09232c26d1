"""Time rules: the time t of each position, and the weight of the position in the bound.

A time rule draws the information time tau, the fraction of the information that is lost
(`ddiff.core.information`), from an interval [start, stop]. The `TimeChange` of the process maps tau
to the time t of the formulas.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, final, get_args

import torch
from torch import Tensor

from ddiff.core.detour import Detour
from ddiff.core.information import TimeChange
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError

Shape = Literal["block", "slide"]


class Times(NamedTuple):
    """Times at which the positions of a batch are evaluated.

    The sum over the positions of speed * (integrand of the bound) is an unbiased estimate of the
    diffusion term of the bound.

    Attributes:
        t: [B,L] float64, the time of each position.
        speed: [B,L] weight of the position, dt_i/dv for a draw with v uniform in [0,1]; 0 if the
            position adds nothing to the bound.
        clean: bool [B,L], whether the position has its clean token: it is already decoded, or this
            rule does not corrupt it.
        at_prior: bool [B,L], whether the state of the position is drawn from the prior. Positions
            that add to the bound do not attend to such a position. None: no position is at the
            prior.
        block: [1 or B,L] long, block numbers that restrict attention (see `Noisy`). None: every
            position attends to every other position.
        paired: whether later blocks attend to the clean tokens of earlier blocks (`Noisy.memory`).
        absent: bool [B], samples without this field (of several); see `Noisy`. None: no sample.
        detour: detours [B,L] from the path of the level clock of a tree, for training
            (`ddiff.core.detour`). None: the occupancies of the levels are those of the clock.
    """

    t: Tensor
    speed: Tensor
    clean: Tensor
    at_prior: Tensor | None = None
    block: Tensor | None = None
    paired: bool = False
    absent: Tensor | None = None
    detour: Detour | None = None


class Noisy(NamedTuple):
    """Input of the network: a corrupted batch, its times, and which positions attend to which.

    Attributes:
        zt: [B,L] states.
        t: [B,L] float64 times, 0 at clean positions.
        clean: bool [B,L], whether a position has its clean token. Prompts are always clean. Other
            positions with t = 0 may be corrupted, if the process has noise at t = 0.
        block: [1 or B,L] long. If None, every position attends to every other position. Otherwise
            a position attends to its own and earlier blocks of zt.
        memory: [B,L] clean tokens. If given, a position attends to its own block of zt and to the
            earlier blocks of the memory. The network then predicts P(x_i | memory before its
            block, its block of zt), and all blocks can be evaluated in one pass.
        absent: bool [B]. In a sample with several fields, positions of other fields do not attend
            to a field that is absent from the sample. None: the field is in every sample.
    """

    zt: Tensor
    t: Tensor
    clean: Tensor
    block: Tensor | None = None
    memory: Tensor | None = None
    absent: Tensor | None = None


class TimeSampler(Protocol):
    """Interface of an object that draws the times of a batch.

    The times are a pure function of the random generator.
    """

    def draw(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> Times:
        """Draw the times of B samples, stratified over `slots` strata.

        Args:
            clock: information time of the process, which gives t and dt/dtau at each tau.
            rng: random generator of the samples.
            slot: [B] index of the stratum of each sample.
            slots: number of strata: the size of the global batch, or the number of draws of a
                document. A tensor [B] holds one number per sample.
            length: number of positions L.
        """

    def ends(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> tuple[Times, Times]:
        """Return the times of the decoding term and the times of the prior term of the bound.

        The decoding term is evaluated at the first time of each position, the prior term at the
        last. `Times.speed` is the weight of each position in the term. In the prior term, exactly
        the positions with speed > 0 have states drawn from the prior. The other positions have
        states drawn at their times. The arguments are those of `draw`.
        """


class TimeRule(TimeSampler, Protocol):
    """Time sampler that also defines the times of all positions as functions of tau, for sampling.

    tau is the information time (defined in this module), and falls from 1 to 0 in sampling.
    """

    tokens: int = 0
    """Number of tokens for which the draws have the least variance; 0: those of a row."""
    has_one_time: bool = False
    """True if all positions of a sequence have the same time."""
    has_detours: bool = False
    """True if `draw` returns detours from the path of the level clock of a tree (`Times.detour`).
    Evaluation and sampling stay on the path."""

    def at(self, clock: TimeChange, tau: Tensor, length: int) -> Times:
        """Return the times of all positions at the information time tau [B] in [0,1].

        `clock` converts tau into the time t. `length` is the number of positions. Samplers go from
        tau = 1, at which all positions are at the prior, to tau = 0, at which all positions are
        decoded.
        """

    def with_window(self, start: float, stop: float, tokens: int = 16) -> TimeRule:
        """Return the same rule, with information times drawn between `start` and `stop`.

        `tokens` is the sequence length for which the draws give the estimate of the bound with the
        least variance.
        """


@final
class FlatTimes(TimeRule):
    """Time rule in which all positions of a sequence have the same time.

    One information time tau per sequence is drawn in [start, stop], stratified over the sequences
    of a global batch.

    Strata are numbered in van der Corput order, so that every contiguous part of the batch (a rank,
    a micro-batch) gets times from the whole interval. `tokens` is the sequence length for which the
    estimate of the bound has the least variance. This number is fixed and does not follow the
    length of the batch, so that the times of a sequence do not depend on its padding.
    """

    has_one_time = True

    def __init__(self, start: float = 0.0, stop: float = 1.0, tokens: int = 16) -> None:
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
        v = draw_strata(rng, slot, slots)
        t, speed = clock.draw(v, self.start, self.stop, self.tokens)
        return _full_attention_times(t.expand(-1, length), speed.expand(-1, length))

    def at(self, clock: TimeChange, tau: Tensor, length: int) -> Times:
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

    def with_window(self, start: float, stop: float, tokens: int = 16) -> FlatTimes:
        return FlatTimes(start, stop, tokens)


@final
class OccupancyTimes(TimeRule):
    """Time rule of trees in which each sequence has level occupancies near the clock's path.

    The occupancy F_l(t) is the probability that a position has reached level l by time t. The level
    clock is a path F(t) of the occupancies. Each sequence gets a time as by `FlatTimes`, and a
    detour from this path (`ddiff.core.detour`), with the occupancies (1 - m) F(t) + m H(t). H is a
    random extreme path, and m is uniform in [0, spread). The weight of a position at level l is
    dF_l/dt of the detour, divided by the probability of level l on the detour. Each detour gives a
    bound, and the mean loss is the mean of these bounds.

    A network that is trained in this way is accurate near the path, so that the bound of other
    clocks can be measured. Evaluation (`with_window`) and sampling (`at`) use no detours.

    Args:
        spread: largest share m of an extreme path, in (0,1]. The variance of the weights grows like
            ln(1 / (1 - spread)) and is infinite for 1, since extreme paths leave levels empty.
        start, stop, tokens: as for `FlatTimes`.
    """

    has_one_time = True
    has_detours = True

    def __init__(
        self,
        spread: float = 0.5,
        start: float = 0.0,
        stop: float = 1.0,
        tokens: int = 16,
    ) -> None:
        if not 0.0 < spread <= 1.0:
            raise ArgumentError(f"OccupancyTimes: spread must be in (0, 1]; got {spread}.")
        self.spread = spread
        self.tokens = tokens
        self._on_path = FlatTimes(start, stop, tokens)

    def draw(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> Times:
        times = self._on_path.draw(clock, rng, slot, slots, length)
        # One detour per sequence: its positions are independent, with equal occupancies.
        drawn = rng.uniform("detour", 2)[:, :1].expand(-1, length, -1)
        return times._replace(detour=Detour(self.spread * drawn[..., 0], drawn[..., 1]))

    def at(self, clock: TimeChange, tau: Tensor, length: int) -> Times:
        return self._on_path.at(clock, tau, length)

    def ends(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> tuple[Times, Times]:
        return self._on_path.ends(clock, rng, slot, slots, length)

    def with_window(self, start: float, stop: float, tokens: int = 16) -> FlatTimes:
        return FlatTimes(start, stop, tokens)


@final
class WindowTimes(TimeRule):
    """Window of `width` positions that are denoised together, from left to right.

    Positions before the window are clean. Positions after the window are at the prior. `shape`
    selects the movement of the window:

    - "block": the windows are adjacent, and all positions of one window have the same time (arXiv
      2503.09573). Width 1 is autoregression. With width L the whole sequence has one time.
    - "slide": the window slides from left to right, and the information time tau (defined in this
      module) rises along the window from its left edge to its right edge (arXiv 2504.06416).

    For both shapes, as the window moves over the sequence, tau of each position runs exactly once
    through [start, stop]. The diffusion terms of the positions therefore add up to a bound, for any
    process.

    With `paired`, all windows are evaluated in one pass over the clean and the noisy sequence, and
    each window attends to the clean tokens before it (`Noisy.memory`). Without `paired`, one window
    drawn at random is evaluated, weighted as an unbiased estimate of the sum over all windows. The
    network input is then half as long, but the variance is higher.
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

    def with_window(self, start: float, stop: float, tokens: int = 16) -> WindowTimes:
        return WindowTimes(self.width, self.shape, self.paired, start, stop)

    def draw(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> Times:
        if not self.paired:
            return self._draw_one_window(clock, rng, slot, slots, length)
        if self.shape == "slide":
            phase = draw_strata(rng, slot, slots)
            return self._paired_slide_times(clock, phase * self.width, length)
        # All windows are evaluated in one pass, each at its own time.
        v = jointly_stratified(rng, slot, slots, self._num_windows(length))
        return self._paired_block_times(clock, v, length)

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

    def _paired_times(self, t: Tensor, speed: Tensor, window: Tensor) -> Times:
        return Times(t, speed, _all_false(t), block=window, paired=True)

    def _paired_block_times(self, clock: TimeChange, v: Tensor, length: int) -> Times:
        """Return the times of all blocks in one pass.

        `v` [B,count] holds a number in [0,1] for each of the blocks of a sequence, which determines
        the time of the block.
        """
        window = self._window_numbers(length, v.device)
        t, speed = clock.draw(v, self.start, self.stop, self.width)
        block_of_position = window[0]
        return self._paired_times(
            t[:, block_of_position],
            speed[:, block_of_position],
            window,
        )

    def _paired_slide_times(self, clock: TimeChange, offset: Tensor, length: int) -> Times:
        """Return the times of all sliding windows of each sequence in one pass.

        Windows are adjacent. In each window, the noise time rises from left to right. `clock` maps
        information time to noise time. The first window starts `offset` [B,1] positions to the left
        of the sequence. `offset` is in [0, width) and may be fractional.
        """
        place = torch.arange(length, device=offset.device) + offset
        window = (place / self.width).floor().long()
        t, speed = self._at_share(clock, place / self.width - window)
        return self._paired_times(t, speed, window)

    def _at_share(self, clock: TimeChange, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return t and dt/dshare at tau = start + share * (stop - start), with share in [0,1]."""
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
        # One number per sample determines both the window and the time within the window.
        v = draw_strata(rng, slot, slots).squeeze(-1)
        if self.shape == "slide":
            return self.at(clock, v, length)
        count = self._num_windows(length)
        # `settled` is the number of decoded windows as a real number. Its integer part is the
        # index of the current window, and its fractional part gives the time of this window.
        settled = (1.0 - v).unsqueeze(-1) * count
        # At v = 0 all windows are decoded, and the index would be one past the last window.
        current = settled.long().clamp(max=count - 1)
        t, speed = clock.draw(current + 1 - settled, self.start, self.stop, self.width)
        return self._one_open_block(t, speed * count, current, length)

    def at(self, clock: TimeChange, tau: Tensor, length: int) -> Times:
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
        """Return times with one noisy block per sequence.

        The block number `current` [B,1] is noisy at time t [B,1]. Earlier blocks are clean, later
        blocks are at the prior. `speed` [B,1] is the weight of the positions of the block.
        """
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
        """Return the times `t` and weights `speed`, with changes outside the current window.

        Positions in `clean` lie before the window and get time 0. Positions in `at_prior` lie after
        it and get time 1. All these positions get speed 0. `block` holds the block numbers that
        restrict attention.
        """
        t = t.masked_fill(clean, 0.0).masked_fill(at_prior, 1.0)
        speed = speed.masked_fill(clean | at_prior, 0.0)
        return Times(t, speed, clean, at_prior, block)

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
        """Return the times of the decoding and prior terms for paired sliding windows.

        The sequence is divided into adjacent windows, shifted by a random number of positions. Only
        one position of every window has a weight above 0: the first position in the decoding term,
        and the last position in the prior term. The weight is `width`, because the position stands
        for all positions of the window.
        """
        place = torch.arange(length, device=slot.device)
        shift = (rng.uniform("window")[:, :1] * self.width).floor()
        first = self._paired_slide_times(clock, shift, length)
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
        """Return the times of the decoding and prior terms, for `shape` "slide" without `paired`.

        Only one random position of each sequence has a weight above 0. The weight is the length of
        the sequence, because the position stands for all positions.
        """
        place = torch.arange(length, device=slot.device)
        chosen = (rng.uniform("window")[:, :1] * length).floor()
        # The chosen position is at the left edge of the window when it is decoded ...
        before = (place - chosen) / self.width
        t, speed = self._at_share(clock, before.clamp(0.0, 1.0))
        window = before.floor().long()
        decoded = self._one_open_window(t, speed, before < 0, before >= 1, window)
        # ... and at the right edge of the window when it leaves the prior.
        after = before + 1.0
        t, speed = self._at_share(clock, after.clamp(0.0, 1.0))
        window = _window_numbers_at(after)
        closed = self._one_open_window(t, speed, after <= 0, after > 1, window)
        weight = float(length)
        return (
            _with_weight(decoded, place == chosen, weight),
            _with_weight(closed, place == chosen, weight),
        )

    def _window_numbers(self, length: int, device: torch.device) -> Tensor:
        """Return the index of the window that contains each position, [1,L]."""
        return (torch.arange(length, device=device) // self.width).unsqueeze(0)

    def _num_windows(self, length: int) -> int:
        return -(-length // self.width)


def _check_window(name: str, start: float, stop: float) -> None:
    if not 0.0 <= start < stop <= 1.0:
        raise ArgumentError(
            f"{name}: need 0 <= start < stop <= 1; got start = {start}, stop = {stop}."
        )


def _window_numbers_at(depth: Tensor) -> Tensor:
    """Return the window number of each position.

    `depth` is the distance of a position from the left edge of the window that is being denoised,
    divided by the window width. This window has number 0 and depths in (0, 1]. Positions before and
    after it are divided into windows of the same width.
    """
    return depth.ceil().long() - 1


def _with_weight(times: Times, counted: Tensor, weight: float) -> Times:
    """Return `times` with speed `weight` where the mask `counted` is True, and speed 0 else."""
    speed = torch.where(counted, weight, 0.0)
    return times._replace(speed=speed.to(times.t))


def _all_false(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool)


def _full_attention_times(t: Tensor, speed: Tensor) -> Times:
    """Combine times t and speeds of positions that are all corrupted and attend to each other."""
    return Times(t, speed, _all_false(t))


# ---------------------------------------------------------------------- stratification


def stratified(u: Tensor, stratum: Tensor, strata: int | Tensor) -> Tensor:
    """Map uniforms u [B,k] to numbers [B,k] in [0,1) that lie in the given strata.

    The interval [0,1) is divided into `strata` equal parts. `strata` is a number, or a tensor [B]
    with one number per sample. `stratum` [B,k] is the number of the part of each result. Parts are
    numbered in van der Corput order, so that every contiguous range of strata covers the whole
    interval evenly.
    """
    counts = torch.as_tensor(strata, device=stratum.device)
    if counts.dim():
        counts = counts.unsqueeze(-1)
    counts = counts.expand_as(stratum)
    return (_van_der_corput_rank(stratum, counts) + u) / counts


def draw_strata(rng: CounterRng, slot: Tensor, slots: int | Tensor) -> Tensor:
    """Return one number in [0,1) per sample, a tensor [B,1], stratified over the batch.

    The result for sample i lies in the stratum with the index slot[i] of `slots` strata.
    """
    u = rng.uniform("time")[:, :1]
    return stratified(u, slot.unsqueeze(-1), slots)


def jointly_stratified(
    rng: CounterRng,
    slot: Tensor,
    slots: int | Tensor,
    count: int,
) -> Tensor:
    """Draw a number in [0,1) for each of the `count` windows of each sample, [B,count].

    Sample i has the stratum slot[i] out of `slots` strata. The numbers are stratified in three
    ways:

    - The numbers of one sample are evenly spaced.
    - The numbers of one window are stratified over the `slots` strata.
    - All numbers together are stratified: each of slots * count equal cells of [0,1) holds one.

    All numbers are shifted cyclically in [0,1) by a random amount per group of samples. Without
    this shift, the numbers of a window would lie in only one cell of each of its strata.
    """
    u = rng.uniform("time")[:, :1]
    if count == 1:
        return stratified(u, slot.unsqueeze(-1), slots)
    strata = torch.as_tensor(slots, device=slot.device).expand_as(slot).unsqueeze(-1)
    rank = _van_der_corput_rank(slot.unsqueeze(-1), strata)
    window = van_der_corput_order(count).to(slot.device)
    # Modulo count, the product strata * window repeats after count / common windows. Windows with
    # equal products would share cells, so each repetition is moved by one cell.
    common = torch.gcd(strata, torch.full_like(strata, count))
    cell = count * rank + strata * window + window // (count // common)
    rotation = rng.uniform_per_group("time").unsqueeze(-1)
    return ((cell + u) / (strata * count) + rotation / strata) % 1.0


def _van_der_corput_rank(stratum: Tensor, counts: Tensor) -> Tensor:
    """Return the rank of each stratum [B,k] in the van der Corput order of all strata.

    `counts` [B,k] are the numbers of strata, and the result is [B,k].
    """
    rank = torch.zeros_like(stratum)
    for count in counts.unique().tolist():
        order = van_der_corput_order(count).to(stratum)
        rank = torch.where(counts == count, order[stratum % count], rank)
    return rank


def van_der_corput_order(count: int) -> Tensor:
    """Return the van der Corput permutation [count] of 0..count-1.

    Entry i is the rank of the bit-reversed value of i.
    """
    bits = max(count - 1, 1).bit_length()
    index = torch.arange(count)
    reversed_index = torch.zeros_like(index)
    for bit in range(bits):
        reversed_index = reversed_index + (((index >> bit) & 1) << (bits - 1 - bit))
    return torch.argsort(torch.argsort(reversed_index))
