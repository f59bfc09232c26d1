"""Information time: the time change under which a constant prediction is charged evenly.

With X uniform over the tokens, I(X; Z_t) is the information in nats that the state at time t carries about its token. The
share of it that is lost by t,

    tau(t) = (I(X; Z_0) - I(X; Z_t)) / (I(X; Z_0) - I(X; Z_1)),

rises from 0 to 1. Its derivative is the mean density of the bound for the constant uniform prediction, so that under tau
uniform no time is charged more than another, and the estimate of the bound is not skewed. In t this fails wherever a
process loses its tokens quickly near one end. The integral of the density's weight would not serve as a time: it
diverges for uniform noise near t = 1.

For linear masking tau = t. A tree has tau in closed form, a sum over its levels (`TreeProcess.information`).

An even mean leaves the variance of single tokens. A token is noise with probability P(tau), small where tau is small, and
is then charged about 1/P, so that the sum over a sequence of L tokens has a second moment proportional to
1 + 1/(L P(tau)). Draws whose density is the square root of that have the least variance. It is the density that is used:
nearly flat for long sequences, crowded towards tau = 0 for short ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, final

import torch
from torch import Tensor

from ddiff.core.numerics import EARLIEST, LATEST, Constant

OfTime = Callable[[Tensor], Tensor]

KNOTS = 257  # in logit t between the interior times; processes change slowly on that scale
STEEP = 2.0  # rises of logit tau from knot to knot above which knots are put between them
REFINEMENTS = 40  # halvings of a cell of logit t, until it is as wide as the rounding of its ends
RELIABLE = 1e-11  # smaller shares of information are differences that rounding has spoilt
NEGLIGIBLE = 1e-9  # share of the information that the bound may leave out beyond the interior times
RAREST = 1e-15  # probabilities of being noise below this are rounding
MOST_PER_NOISE = 50.0  # nats that are lost per probability P of being noise: 1 + ln V + ln 1/P, P >= 1e-15, by Fano
SMALLEST = 2.0**-53  # shares are kept as far from 0 and 1, so that slopes there are finite


class TimeChange(Protocol):
    """A strictly increasing map from tau in [0,1] to t in [0,1]: the clock that a time rule draws by."""

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """tau of any shape, float64 -> (t, dt/dtau) of the same shape; dt/dtau is finite."""

    def draw(self, v: Tensor, start: float, stop: float, length: int) -> tuple[Tensor, Tensor]:
        """v uniform in [0,1] -> (t, dt/dv), t rising from tau = start to tau = stop.

        The density of the draws is that of the least variance for a sequence of `length` tokens.
        """


@final
class IdentityTime:
    """The identity, t = tau, with even draws."""

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        return tau, torch.ones_like(tau)

    def draw(self, v: Tensor, start: float, stop: float, length: int) -> tuple[Tensor, Tensor]:
        return start + (stop - start) * v, torch.full_like(v, stop - start)


@final
class MonotoneMap:
    """A strictly increasing map of (0,1) onto itself through given knots, with its exact derivative.

    Between the knots logit y is a monotone cubic of logit x (Fritsch & Carlson 1980), beyond them a straight line, which is
    a power law. Knots [k] are given by their logits, both rising.
    """

    def __init__(self, logit_x: Tensor, logit_y: Tensor) -> None:
        self._knots = Constant(torch.stack([logit_x, logit_y, _monotone_slopes(logit_x, logit_y)]))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x of any shape in (0,1) -> (y, dy/dx)."""
        logit_y, slope = self._interpolate(torch.logit(x))
        y = torch.sigmoid(logit_y)
        return y, y * torch.sigmoid(-logit_y) * slope / (x * (1.0 - x))

    def _interpolate(self, logit_x: Tensor) -> tuple[Tensor, Tensor]:
        x, y, slopes = self._knots.on(logit_x.device)
        left = (torch.searchsorted(x, logit_x.contiguous(), right=True) - 1).clamp(0, len(x) - 2)
        width = x[left + 1] - x[left]
        into = ((logit_x - x[left]) / width).clamp(0.0, 1.0)
        rise = y[left + 1] - y[left]
        start = slopes[left] * width
        end = slopes[left + 1] * width
        bend = 3.0 * rise - 2.0 * start - end
        twist = start + end - 2.0 * rise
        value = y[left] + into * (start + into * (bend + into * twist))
        slope = (start + into * (2.0 * bend + 3.0 * into * twist)) / width
        # beyond the outermost knots the line goes straight on with the slope that the cubic has there
        beyond = logit_x - logit_x.clamp(x[0], x[-1])
        return value + slope * beyond, slope


@final
class InformationTime:
    """t as a function of tau, by interpolation of information that is known at knots.

    `kept(t)` [n] is I(X; Z_t) in nats, `lost(t)` [n] is I(X; Z_0) - I(X; Z_t), `moved(t)` [n] is P(Z_t != X). dt/dtau is
    the exact derivative of the interpolant, so that a bound drawn in tau is unbiased whatever the interpolation error. That
    error affects its variance only.

    Where logit tau rises by more than 2 between two knots, as where a process starts to lose information in the midst of
    time, the cell is halved until it does not.

    Rates are read at interior times only. Where more than 1e-9 of the information is lost before the first of them, tau = 0
    is that time and not t = 0, and the bound decodes there; likewise at the last.
    """

    def __init__(self, kept: OfTime, lost: OfTime, moved: OfTime) -> None:
        ends = torch.tensor([0.0, EARLIEST, LATEST, 1.0], dtype=torch.float64)
        kept_last = kept(ends)[3]
        lost_at = lost(ends)
        total = lost_at[3] - lost_at[0]
        self._total = max(float(total), 0.0)
        # of one token, or where nothing ever happens, there is nothing to lose, and tau = t
        loses = bool(total > NEGLIGIBLE)

        def shares(t: Tensor) -> Tensor:
            """[2,n] The shares of the information that are lost before and after t [n]."""
            after = kept(t) - kept_last
            before = lost(t) - lost_at[0]
            return (torch.stack([before, after]) / total).clamp(min=0.0)

        before, after = shares(ends)
        self.first = float(before[1]) if loses and before[1] > NEGLIGIBLE else 0.0
        self.last = 1.0 - float(after[2]) if loses and after[2] > NEGLIGIBLE else 1.0
        self._first_t = EARLIEST if self.first > 0.0 else 0.0
        self._last_t = LATEST if self.last < 1.0 else 1.0
        earliest, latest = torch.logit(ends[1:3]).tolist()
        even = torch.linspace(earliest, latest, KNOTS, dtype=torch.float64)
        knots = _rising(*_refined(shares, even)) if loses else (even, even)
        self._map = MonotoneMap(*knots)
        self._moved = moved
        self._moved_first = float(moved(ends[:1])[0])
        self._draws: dict[tuple[float, float, int], MonotoneMap] = {}

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        width = self.last - self.first
        t, speed = self._map((self.first + width * tau).clamp(SMALLEST, 1.0 - SMALLEST))
        t = torch.where(tau <= 0.0, self._first_t, torch.where(tau >= 1.0, self._last_t, t))
        return t, width * speed

    def draw(self, v: Tensor, start: float, stop: float, length: int) -> tuple[Tensor, Tensor]:
        window = (start, stop, length)
        if window not in self._draws:
            self._draws[window] = self._quantiles(*window)
        share, slope = self._draws[window](v.clamp(SMALLEST, 1.0 - SMALLEST))
        t, speed = self.at(start + (stop - start) * share)
        return t, (stop - start) * slope * speed

    def _quantiles(self, start: float, stop: float, length: int) -> MonotoneMap:
        """v -> the share of the window that is the v-quantile of the density sqrt(1 + 1/(L P))."""
        logit_share = torch.linspace(-27.0, 27.0, KNOTS, dtype=torch.float64)
        share = torch.sigmoid(logit_share)
        tau = start + (stop - start) * share
        moved = self._moved(self.at(tau)[0])
        # tokens that are noise from t = 0 on are not charged for becoming it
        moved = ((moved - self._moved_first) / max(1.0 - self._moved_first, RAREST)).clamp(
            min=RAREST
        )
        # where information jumps, since a discontinuous generator is integrated in steps, none may seem to have moved yet
        moved = torch.maximum(
            moved, (self.first + (self.last - self.first) * tau) * self._total / MOST_PER_NOISE
        )
        density = (1.0 + 1.0 / (length * moved)).sqrt()
        # trapezoids between the knots; below the first the density is at most a square root of 1 / share, hence the 2
        cells = (density[1:] + density[:-1]) / 2.0 * share.diff()
        below = torch.cat([2.0 * density[:1] * share[:1], cells]).cumsum(0)
        above = torch.cat([cells.flip(0).cumsum(0).flip(0), cells.new_zeros(1)])
        above = above + density[-1] * torch.sigmoid(-logit_share[-1])
        return MonotoneMap((below / above).log(), logit_share)


def uniform_reference(num_tokens: int) -> Tensor:
    """[1,V] log-probabilities of the reference distribution."""
    return torch.full((1, num_tokens), -math.log(num_tokens), dtype=torch.float64)


def _refined(shares: OfTime, logit_t: Tensor) -> tuple[Tensor, Tensor]:
    """The shares [2,k] at knots between which logit tau rises by at most STEEP, and logit t [k] of the knots."""
    shares_at = shares(torch.sigmoid(logit_t))
    for _ in range(REFINEMENTS):
        before, after = shares_at.clamp(min=RELIABLE)
        # the running maximum bounds the number of steep cells, also where rounding makes tau fall
        logit_tau = (before / after).log().cummax(0).values
        steep = (logit_tau.diff() > STEEP).nonzero().squeeze(-1)
        if len(steep) == 0:
            break
        middle = (logit_t[steep] + logit_t[steep + 1]) / 2.0
        logit_t, order = torch.cat([logit_t, middle]).sort()
        shares_at = torch.cat([shares_at, shares(torch.sigmoid(middle))], -1)[:, order]
    return shares_at, logit_t


def _rising(shares_at: Tensor, logit_t: Tensor) -> tuple[Tensor, Tensor]:
    """The knots at which logit tau is reliable and higher than at every earlier one."""
    before, after = shares_at
    reliable = (before > RELIABLE) & (after > RELIABLE)
    logit_tau = (before / after).log()[reliable]
    logit_t = logit_t[reliable]
    reached = torch.cat([logit_tau.new_full((1,), -torch.inf), logit_tau.cummax(0).values[:-1]])
    rises = logit_tau > reached + 1e-9
    return logit_tau[rises], logit_t[rises]


def _monotone_slopes(x: Tensor, y: Tensor) -> Tensor:
    """[k] slopes of a monotone cubic through rising knots: harmonic means of the neighbouring secants."""
    secant = y.diff() / x.diff()
    width = x.diff()
    near = 2.0 * width[1:] + width[:-1]
    far = width[1:] + 2.0 * width[:-1]
    inner = (near + far) / (near / secant[:-1] + far / secant[1:])
    return torch.cat([secant[:1], inner, secant[-1:]])
