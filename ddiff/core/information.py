"""Information time tau: time measured by the fraction of the information that is lost.

With X uniform over the tokens, I(X; Z_t) is the information in nats that the state Z_t at time t
carries about its token X. The fraction of this information that is lost by time t,

    tau(t) = (I(X; Z_0) - I(X; Z_t)) / (I(X; Z_0) - I(X; Z_1)),

rises from 0 to 1.

The diffusion term of the bound is an integral over t. For the uniform prediction, the mean of its
integrand over tokens and states is proportional to dtau/dt. Per unit of tau, this mean is therefore
constant: if tau is drawn uniformly, every drawn time has the same mean, and the estimate of the
bound is not skewed. If t is drawn uniformly, the estimate is skewed for processes that lose their
tokens quickly near t = 0 or t = 1. The integral of `ForwardProcess.weight` cannot replace tau,
since this integral diverges at t = 1 for uniform noise.

For masked diffusion with the linear schedule alpha(t) = 1 - t, tau = t. For a tree, tau is a
closed-form sum over levels (`TreeProcess.information`).

The integrand at single tokens still varies, even if its mean is constant. A token is noise with
probability P(tau), which is small for small tau, and the integrand at a noisy token is then about
1/P. The sum over a sequence of L tokens therefore has a second moment proportional to 1 + 1/(L
P(tau)). The variance is least if the probability density of the drawn tau is proportional to the
square root of this moment. `TimeChange.draw` uses this probability density. It is nearly flat for
long sequences and concentrated near tau = 0 for short sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, final

import torch
from torch import Tensor

from ddiff.core.numerics import EARLIEST, LATEST, Constant, find_rows

TimeFunction = Callable[[Tensor], Tensor]

TIME_BINS = 8
"""Number of equal bins of information time into which the diffusion term is divided."""

# Number of knots. They are evenly spaced in logit t, because processes change slowly with logit t.
KNOTS = 257
# If logit tau rises by more than this number between two knots, knots are inserted.
STEEP = 2.0
# Largest number of halvings of a cell of logit t; then the cell is as small as rounding errors.
REFINEMENTS = 40
# Fractions of information below this number are dominated by rounding errors.
RELIABLE = 1e-11
# Fraction of the information that may be lost outside the interior times and is then neglected.
NEGLIGIBLE = 1e-9
# Probabilities of being noise below this number are rounding errors.
RAREST = 1e-15
# Largest loss of information in nats per probability P of being noise: 1 + ln V + ln 1/P with
# P >= 1e-15, by Fano's inequality.
MOST_PER_NOISE = 50.0
# Smallest distance of tau from 0 and 1, so that slopes are finite.
SMALLEST = 2.0**-53


class TimeChange(Protocol):
    """Strictly increasing map from information time tau in [0,1] to time t in [0,1]."""

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return the time t at information time tau, and dt/dtau, which is always finite."""

    def draw(
        self,
        v: Tensor,
        start: float,
        stop: float,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        """Map v, uniform in [0,1], to a random time t. Returns t and dt/dv.

        t rises with v from the time at information time tau = `start` to the time at tau = `stop`.
        With these draws, the estimate of the bound of a sequence of `length` tokens has the least
        variance.
        """


def find_time_bins(clock: TimeChange, t: Tensor, count: int = TIME_BINS) -> Tensor:
    """Return the index of the bin of information time of each time t, from 0 to count - 1.

    Bin k contains the times with k / count <= tau(t) < (k + 1) / count; the last bin also contains
    tau = 1. `clock` maps information time tau to time t.
    """
    tau = torch.arange(1, count, dtype=torch.float64, device=t.device) / count
    edges, _ = clock.at(tau)
    return torch.bucketize(t.double(), edges, right=True)


@final
class IdentityTime:
    """Time change that maps information time tau to the equal time t = tau, drawn uniformly."""

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        return tau, torch.ones_like(tau)

    def draw(
        self,
        v: Tensor,
        start: float,
        stop: float,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        return start + (stop - start) * v, torch.full_like(v, stop - start)


@final
class MonotoneMap:
    """Strictly increasing map x -> y of (0,1) onto itself through knots, with exact derivative.

    Between the knots logit y is a monotone cubic of logit x (Fritsch & Carlson 1980). Beyond the
    outermost knots logit y is linear in logit x, which is a power law. `logit_x` and `logit_y` [k]
    are the logits of the knots, both rising.
    """

    def __init__(self, logit_x: Tensor, logit_y: Tensor) -> None:
        slopes = _monotone_slopes(logit_x, logit_y)
        self._knots = Constant(torch.stack([logit_x, logit_y, slopes]))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and dy/dx at x in (0,1), both of the shape of x."""
        logit_y, slope = self._interpolate(torch.logit(x))
        y = torch.sigmoid(logit_y)
        # d logit(x) / dx = 1 / (x (1 - x)), and 1 - y = sigmoid(-logit_y).
        derivative = y * torch.sigmoid(-logit_y) * slope / (x * (1.0 - x))
        return y, derivative

    def _interpolate(self, logit_x: Tensor) -> tuple[Tensor, Tensor]:
        x, y, slopes = self._knots.on(logit_x.device)
        left = torch.searchsorted(x, logit_x.contiguous(), right=True) - 1
        left = left.clamp(0, len(x) - 2)
        width = x[left + 1] - x[left]
        position = ((logit_x - x[left]) / width).clamp(0.0, 1.0)
        rise = y[left + 1] - y[left]
        start = slopes[left] * width
        end = slopes[left + 1] * width
        quadratic = 3.0 * rise - 2.0 * start - end
        cubic = start + end - 2.0 * rise
        value = y[left] + position * (start + position * (quadratic + position * cubic))
        slope = (start + position * (2.0 * quadratic + 3.0 * position * cubic)) / width
        # Beyond the outermost knots the line continues with the slope of the cubic there.
        beyond = logit_x - logit_x.clamp(x[0], x[-1])
        return value + slope * beyond, slope


@final
class InformationTime:
    """Time t as a function of information time tau, interpolated between knots.

    dt/dtau is the exact derivative of the interpolant. A bound estimated in tau is therefore
    unbiased, however large the interpolation error is. This error affects only the variance.

    If logit tau rises by more than 2 between two knots, the cell between them is halved until the
    rise is at most 2. This happens, for example, if a process loses no information before t = 1/2.

    Rates are evaluated only at interior times, in [1e-12, 1 - 1e-12]. If more than 1e-9 of the
    information is lost before the first interior time, tau = 0 is mapped to this time instead of
    t = 0. The decoding term of the bound is then evaluated at this time. If more than 1e-9 of the
    information is lost after the last interior time, tau = 1 is mapped to the last interior time.

    Args:
        information: t [n] -> I(X; Z_t) in nats, the information of the state on its token X.
        information_lost: t [n] -> I(X; Z_0) - I(X; Z_t).
        change_probability: t [n] -> P(Z_t != X).
    """

    def __init__(
        self,
        information: TimeFunction,
        information_lost: TimeFunction,
        change_probability: TimeFunction,
    ) -> None:
        ends = torch.tensor([0.0, EARLIEST, LATEST, 1.0], dtype=torch.float64)
        shares = _InformationShares(information, information_lost, ends)
        total = shares.total
        self._total = max(float(total), 0.0)
        # With one token, or if tokens never change, no information is lost, and tau = t.
        loses = bool(total > NEGLIGIBLE)
        before, after = shares(ends)
        self.first = float(before[1]) if loses and before[1] > NEGLIGIBLE else 0.0
        self.last = 1.0 - float(after[2]) if loses and after[2] > NEGLIGIBLE else 1.0
        self._first_t = EARLIEST if self.first > 0.0 else 0.0
        self._last_t = LATEST if self.last < 1.0 else 1.0
        earliest, latest = torch.logit(ends[1:3]).tolist()
        even = torch.linspace(earliest, latest, KNOTS, dtype=torch.float64)
        knots = (even, even)
        if loses:
            knots = _select_rising(*_refine_knots(shares, even))
        self._map = MonotoneMap(*knots)
        self._change_probability = change_probability
        self._change_at_start = float(change_probability(ends[:1])[0])
        self.is_noise_at_start = self._change_at_start == 1.0
        self._quantile_maps: dict[tuple[float, float, int], MonotoneMap] = {}

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        width = self.last - self.first
        # The map is defined on the open interval; the ends are set below.
        share = (self.first + width * tau).clamp(SMALLEST, 1.0 - SMALLEST)
        t, speed = self._map(share)
        t = torch.where(tau >= 1.0, self._last_t, t)
        t = torch.where(tau <= 0.0, self._first_t, t)
        return t, width * speed

    def draw(
        self,
        v: Tensor,
        start: float,
        stop: float,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        window = (start, stop, length)
        if window not in self._quantile_maps:
            self._quantile_maps[window] = self._make_quantiles(*window)
        share, slope = self._quantile_maps[window](v.clamp(SMALLEST, 1.0 - SMALLEST))
        t, speed = self.at(start + (stop - start) * share)
        return t, (stop - start) * slope * speed

    def _make_quantiles(self, start: float, stop: float, length: int) -> MonotoneMap:
        """Return the map from a uniform v to (tau - start) / (stop - start) for `draw`.

        The window of tau is [start, stop], and `length` the number of tokens in a sequence. The map
        is the quantile function of the probability density in the module's docstring.
        """
        logit_share = torch.linspace(-27.0, 27.0, KNOTS, dtype=torch.float64)
        share = torch.sigmoid(logit_share)
        tau = start + (stop - start) * share
        density = (1.0 + 1.0 / (length * self._noise_probability(tau))).sqrt()
        # Trapezoids between the knots. Below the first knot `density` grows at most as
        # share^(-1/2), whose integral from 0 is 2 * share * density.
        cells = (density[1:] + density[:-1]) / 2.0 * share.diff()
        first = 2.0 * density[:1] * share[:1]
        below = torch.cat([first, cells]).cumsum(0)
        from_end = cells.flip(0).cumsum(0).flip(0)
        above = torch.cat([from_end, cells.new_zeros(1)])
        above = above + density[-1] * torch.sigmoid(-logit_share[-1])
        return MonotoneMap((below / above).log(), logit_share)

    def _noise_probability(self, tau: Tensor) -> Tensor:
        """Return P(tau) [n], the probability that a token clean at t = 0 is noise at t(tau).

        tau is the information time, and t(tau) the noise time. If every state is noise at the first
        time, as for vectors with Gaussian noise, P is 1.
        """
        if self.is_noise_at_start:
            return torch.ones_like(tau)
        changed = self._change_probability(self.at(tau)[0])
        # Tokens that are already noise at t = 0 add nothing to the diffusion term.
        since_start = changed - self._change_at_start
        changed = (since_start / max(1.0 - self._change_at_start, RAREST)).clamp(min=RAREST)
        # A discontinuous generator is integrated in steps, so the information may jump before any
        # token seems to have changed. Fano's inequality then bounds P from below.
        lost = (self.first + (self.last - self.first) * tau) * self._total
        return torch.maximum(changed, lost / MOST_PER_NOISE)


class _InformationShares:
    """Function t [n] -> [2,n]: the fractions of information lost before t and after t.

    `ends` [4] holds the times 0, 1e-12, 1 - 1e-12 and 1.
    """

    def __init__(
        self,
        information: TimeFunction,
        information_lost: TimeFunction,
        ends: Tensor,
    ) -> None:
        self._information = information
        self._information_lost = information_lost
        self._at_end = information(ends)[3]
        lost = information_lost(ends)
        self._lost_at_start = lost[0]
        self.total = lost[3] - lost[0]

    def __call__(self, t: Tensor) -> Tensor:
        after = self._information(t) - self._at_end
        before = self._information_lost(t) - self._lost_at_start
        return (torch.stack([before, after]) / self.total).clamp(min=0.0)


def uniform_reference(num_tokens: int) -> Tensor:
    """Return the log-probabilities [1,V] of the uniform distribution over V tokens."""
    return torch.full((1, num_tokens), -math.log(num_tokens), dtype=torch.float64)


def _refine_knots(shares: TimeFunction, logit_t: Tensor) -> tuple[Tensor, Tensor]:
    """Insert knots until logit tau rises by at most STEEP between neighbouring knots.

    Args:
        shares: t [n] -> [2,n], the fractions of the information lost before and after t.
        logit_t: logits of the times of the initial knots.

    Returns the fractions [2,k] at the final k knots, and logit t [k] of these knots.
    """
    shares_at = shares(torch.sigmoid(logit_t))
    for _ in range(REFINEMENTS):
        before, after = shares_at.clamp(min=RELIABLE)
        # If rounding makes tau fall, the running maximum limits the number of steep cells.
        logit_tau = (before / after).log().cummax(0).values
        steep = find_rows(logit_tau.diff() > STEEP)
        if len(steep) == 0:
            break
        middle = (logit_t[steep] + logit_t[steep + 1]) / 2.0
        logit_t, order = torch.cat([logit_t, middle]).sort()
        at_middle = shares(torch.sigmoid(middle))
        shares_at = torch.cat([shares_at, at_middle], -1)[:, order]
    return shares_at, logit_t


def _select_rising(shares_at: Tensor, logit_t: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the knots at which logit tau is larger than at all earlier knots.

    `logit_t` holds the knots, and `shares_at` the fractions of the information that are lost before
    and after each knot. Knots at which one of the fractions is below RELIABLE are dropped too.
    Returns logit tau and logit t of the k remaining knots, two tensors [k].
    """
    before, after = shares_at
    is_reliable = (before > RELIABLE) & (after > RELIABLE)
    logit_tau = (before / after).log()[is_reliable]
    logit_t = logit_t[is_reliable]
    nothing = logit_tau.new_full((1,), -torch.inf)
    highest_before = torch.cat([nothing, logit_tau.cummax(0).values[:-1]])
    rises = logit_tau > highest_before + 1e-9
    return logit_tau[rises], logit_t[rises]


def _monotone_slopes(x: Tensor, y: Tensor) -> Tensor:
    """Return the slopes [k] of a monotone cubic at k knots, whose coordinates x and y increase.

    An inner slope is a weighted harmonic mean of the slopes of the two adjacent secants.
    """
    width = x.diff()
    secant = y.diff() / width
    near = 2.0 * width[1:] + width[:-1]
    far = width[1:] + 2.0 * width[:-1]
    inner = (near + far) / (near / secant[:-1] + far / secant[1:])
    return torch.cat([secant[:1], inner, secant[-1:]])
