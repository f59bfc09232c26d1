"""Gaussian process: noises vectors by z_t = a(t) x + sigma(t) eps, with standard normal eps.

A Gaussian process has the same members as a `ForwardProcess`. The bound, the objective and the
sampling loop therefore accept either of the two. A row is a vector of d numbers instead of a token,
and the prediction of a network is the mean x_hat of the clean vector instead of a distribution.

The bound of one vector x (arXiv 2107.00630), with SNR = (a / sigma)^2:

    -ln p(x) <= KL( N(a x, sigma^2) || N(0, 1) )                   closing, at t = 1
             + integral of -1/2 SNR'(t) |x - x_hat(z_t, t)|^2      diffusion
             + E[ -ln p(x | z_0) ]                               decoding, at t = 0

Time 0 is the time at which log SNR has its largest value, so every term is finite. Formulas are
float64. Shapes for r rows: x0, zt [r,d]; t, s [r]; uniforms u [r,d].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

from ddiff.core.description import SettingsRepr
from ddiff.core.gaussian_schedule import GaussianSchedule
from ddiff.core.information import InformationTime
from ddiff.core.numerics import EARLIEST, LATEST, Constant, draw_index, find_rows, interior
from ddiff.core.process import Query, States
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError

Output = Literal["eps", "x0", "v", "u"]
"""Output of a network that predicts vectors; see `GaussianProcess.to_clean`."""

# The middle of the first cell of width 2^-53, so that the uniform 0 gives a finite normal.
SMALLEST_UNIFORM = 2.0**-54

# Halvings of [0,1] in `times_of_log_snr`; 53 reach the resolution of float64 near t = 1.
HALVINGS = 60

# Default of the largest log SNR: the noise at t = 0 has a deviation of 0.0067 data units.
LARGEST_LOG_SNR = 10.0

# A number counts as a value of a grid if its distance is less than this share of the smallest
# distance of two values. float32 data on 2^16 values from -1 to 1 have rounding errors of 2e-3.
GRID_TOLERANCE = 0.01

# sigma(1) counts as 1 if it differs by less, since schedules round. The closing term that is left
# out is then below 1e-18 nats per number.
ROUNDING = 1e-9


class PredictedMean(NamedTuple):
    """Predicted mean x_hat [r,d] of the clean vector, given the noisy state of the whole sample."""

    mean: Tensor


class NormalPrior:
    """Standard normal distribution of vectors of `width` numbers, from which sampling starts."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __repr__(self) -> str:
        return f"NormalPrior({self.width} numbers)"

    def draw(self, u: Tensor) -> Tensor:
        """Map uniforms [...,d] to standard normal vectors [...,d]."""
        return to_normal(u)

    def draw_positions(self, rng: CounterRng, channel: str) -> Tensor:
        """Draw one vector for every position: [B,n,d], from one channel of the generator."""
        u = rng.uniform(channel, self.width)
        return self.draw(u.reshape(len(rng.index), rng.length, self.width))


class VectorDecoder(SettingsRepr, ABC):
    """Distribution p(x | z_0) of the clean vector, given its noisy state at the last step.

    The decoder uses y = z / a, the state in the units of x, and its deviation `noise` = sigma / a.
    It uses no network: at the largest log SNR, y is more accurate than a prediction.
    """

    @property
    def values(self) -> Tensor | None:
        """Values [k] of one dimension in ascending order; None if every real number can occur."""
        return None

    def check(self, x: Tensor) -> None:
        """Raise ArgumentError if a number of the clean vectors x [...,d] cannot occur."""

    @abstractmethod
    def nll(self, x0: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Return -ln p(x0 | y) [r] in nats, for x0, y [r,d] and noise [r]."""

    @abstractmethod
    def draw(self, y: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """Draw x [r,d] from p(x | y), from uniforms u [r,d]."""

    @abstractmethod
    def most_likely(self, y: Tensor) -> Tensor:
        """Return the most likely x [r,d] of p(x | y)."""


@final
class GaussianDecoder(VectorDecoder):
    """Decoder of continuous data: p(x | z) = N(z / a, sigma^2 / a^2) in every dimension.

    `nll` is then a density, in nats of continuous data.
    """

    def nll(self, x0: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        distance = (x0 - y) / noise.unsqueeze(-1)
        log_volume = 0.5 * math.log(2.0 * math.pi) + noise.log()
        return 0.5 * distance.square().sum(-1) + x0.shape[-1] * log_volume

    def draw(self, y: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        return y + noise.unsqueeze(-1) * to_normal(u)

    def most_likely(self, y: Tensor) -> Tensor:
        return y


@final
class GridDecoder(VectorDecoder):
    """Decoder of data on a grid of values: p(x = v | z) proportional to N(v; z / a, sigma^2 / a^2).

    `nll` is then a log-probability, in nats of discrete data. It raises ArgumentError for numbers
    that are not on the grid.

    Args:
        values: the values v of one dimension, [k] with k >= 2, all different.
    """

    def __init__(self, values: Tensor) -> None:
        values = values.double().sort().values
        if values.dim() != 1 or len(values) < 2 or not bool((values.diff() > 0).all()):
            raise ArgumentError(
                "GridDecoder: values must be one dimension of at least two different numbers; got "
                f"a tensor of shape {tuple(values.shape)}."
            )
        self.num_values = len(values)
        self._values = Constant(values)
        self._middles = Constant((values[1:] + values[:-1]) / 2.0)
        self._tolerance = GRID_TOLERANCE * float(values.diff().min())

    @property
    def values(self) -> Tensor:
        return self._values.on(torch.device("cpu"))

    def check(self, x: Tensor) -> None:
        x = x.double()
        distance = (x - self._values.on(x.device)[self._nearest(x)]).abs()
        # NaN has no distance, and is not on the grid.
        is_off = ~(distance <= self._tolerance)
        if not bool(is_off.any()):
            return
        number = float(x[is_off][0])
        values = self.values.tolist()
        raise ArgumentError(
            f"GridDecoder: every number of the vectors must be one of the {self.num_values} "
            f"values, from {values[0]:.6g} to {values[-1]:.6g}; got {number:.6g} and "
            f"{int(is_off.sum()) - 1} more numbers that are not. List all values of the data in "
            'values, round the data to these values, or use decoder = "gaussian" for continuous '
            "data."
        )

    def _nearest(self, x: Tensor) -> Tensor:
        """Return the indices of the values nearest to x, in the shape of x."""
        return torch.bucketize(x, self._middles.on(x.device))

    def nll(self, x0: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        self.check(x0)
        log_p = self._log_probs(y, noise)
        nearest = self._nearest(x0)
        return -log_p.gather(-1, nearest.unsqueeze(-1)).squeeze(-1).sum(-1)

    def draw(self, y: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        probabilities = self._log_probs(y, noise).exp()
        drawn = draw_index(probabilities.flatten(0, 1), u.reshape(-1))
        return self._values.on(y.device)[drawn].reshape(y.shape)

    def most_likely(self, y: Tensor) -> Tensor:
        values = self._values.on(y.device)
        return values[(y.unsqueeze(-1) - values).abs().argmin(-1)]

    def _log_probs(self, y: Tensor, noise: Tensor) -> Tensor:
        """Return ln p(v | y) [r,d,k] for the k values of every dimension."""
        distance = (y.unsqueeze(-1) - self._values.on(y.device)) / noise[:, None, None]
        return (-0.5 * distance.square()).log_softmax(-1)


@final
class GaussianProcess(SettingsRepr):
    """Process of vectors of `width` numbers, z_t = a x + sigma eps on a schedule.

    The data should have mean 0 and variance 1 in each dimension.

    Args:
        schedule: functions a and sigma.
        width: numbers per vector, d.
        largest_log_snr: log SNR at t = 0. The decoder covers the information beyond it.
        smallest_log_snr: log SNR at t = 1; None for the end of the schedule.
        decoder: distribution of the clean vector at t = 0.
    """

    states: States = "vectors"
    closes_at_clean = False
    exact_step = True
    has_events = False

    def __init__(
        self,
        schedule: GaussianSchedule,
        width: int,
        largest_log_snr: float = LARGEST_LOG_SNR,
        smallest_log_snr: float | None = None,
        decoder: VectorDecoder | None = None,
    ) -> None:
        if width < 1:
            raise ArgumentError(f"GaussianProcess: width must be at least 1; got {width}.")
        self.schedule = schedule
        self.width = width
        self.largest_log_snr = largest_log_snr
        self.smallest_log_snr = smallest_log_snr
        self.decoder = decoder or GaussianDecoder()
        self.prior = NormalPrior(width)
        self.uniforms_per_sample = width
        self.uniforms_per_step = width
        self.uniforms_per_decode = width
        self._times_of_deviations: dict[float, float] = {}
        self._first = schedule.time_of_log_snr(largest_log_snr)
        self._last = 1.0
        if smallest_log_snr is not None:
            self._last = schedule.time_of_log_snr(smallest_log_snr)
        if not 0.0 < self._first < self._last or self._ends_early(smallest_log_snr):
            raise ArgumentError(
                "GaussianProcess: smallest_log_snr < largest_log_snr must hold, within the values "
                f"of the schedule; got {smallest_log_snr} and {largest_log_snr} for {schedule}."
            )
        end = torch.ones(1, dtype=torch.float64)
        self._ends_without_signal = float(self.signal(end)) == 0.0
        # The prior has variance 1, so a schedule that ends with other noise has a closing term.
        self.closes_at_prior = (
            self._ends_without_signal and abs(float(self.deviation(end)) - 1.0) < ROUNDING
        )

    def _ends_early(self, smallest_log_snr: float | None) -> bool:
        """Return whether the schedule ends before log SNR has the given value."""
        if smallest_log_snr is None:
            return False
        end = float(self.schedule.log_snr(torch.ones(1, dtype=torch.float64)))
        return end > smallest_log_snr + ROUNDING

    # ------------------------------------------------------------------ schedule

    def schedule_time(self, t: Tensor) -> Tensor:
        """Map t in [0,1] to the time of the schedule, between the two ends of log SNR."""
        return self._first + (self._last - self._first) * t

    def times_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the times t in [0,1] at which log SNR has the given values, by bisection.

        A value that log SNR does not take gives the nearest end.
        """
        early = torch.zeros_like(log_snr)
        late = torch.ones_like(log_snr)
        for _ in range(HALVINGS):
            middle = (early + late) / 2.0
            is_before = self.snr(middle).log() > log_snr
            early = torch.where(is_before, middle, early)
            late = torch.where(is_before, late, middle)
        return late

    def time_of_deviation(self, deviation: float) -> float:
        """Return the time t at which sigma / a has the value `deviation`.

        The state divided by a is then the clean vector plus noise of this standard deviation.
        Raises ArgumentError for a value that sigma / a does not have between t = 0 and t = 1.
        """
        if deviation in self._times_of_deviations:
            return self._times_of_deviations[deviation]
        ends = self.snr(torch.tensor([0.0, 1.0], dtype=torch.float64)).rsqrt().tolist()
        if not ends[0] < deviation < ends[1]:
            raise ArgumentError(
                "deviation must lie between sigma / a at both ends of the process, "
                f"{ends[0]:.3g} and {ends[1]:.3g}; got {deviation}."
            )
        log_snr = torch.tensor([-2.0 * math.log(deviation)], dtype=torch.float64)
        time = float(self.times_of_log_snr(log_snr))
        # Training asks for the same deviation in every step.
        self._times_of_deviations[deviation] = time
        return time

    def signal(self, t: Tensor) -> Tensor:
        """Return a(t) [r]."""
        return self.schedule.signal(self.schedule_time(t))

    def deviation(self, t: Tensor) -> Tensor:
        """Return sigma(t) [r] > 0."""
        return self.schedule.deviation(self.schedule_time(t))

    def snr(self, t: Tensor) -> Tensor:
        """Return SNR(t) = (a / sigma)^2 [r]."""
        return self.schedule.ratio(self.schedule_time(t)) ** 2

    # ------------------------------------------------------------------ forward

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw z_t [r,d] given x0 from uniforms u [r,d]."""
        signal = self.signal(t).unsqueeze(-1)
        return signal * x0 + self.deviation(t).unsqueeze(-1) * to_normal(u)

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (c, w) [r] of the forward transition z_t = c z_s + w eps, for s <= t."""
        # At s = t = 1 both signals may be 0.
        factor = torch.where(s == t, 1.0, self.signal(t) / self.signal(s))
        return factor, self.deviation(t) * self._share_added(s, t).sqrt()

    def _share_added(self, s: Tensor, t: Tensor) -> Tensor:
        """Return 1 - SNR(t) / SNR(s) [r], the share of the noise variance at t added since s."""
        # Without cancellation if s is near t. At SNR(t) = 0 the logarithm is -inf and the share 1.
        return torch.where(s == t, 0.0, -torch.expm1(self._log_snr_lost(s, t)))

    def _share_kept(self, s: Tensor, t: Tensor) -> Tensor:
        """Return SNR(t) / SNR(s) [r], without cancellation if it is small."""
        return torch.where(s == t, 1.0, self._log_snr_lost(s, t).exp())

    def _log_snr_lost(self, s: Tensor, t: Tensor) -> Tensor:
        """Return ln(SNR(t) / SNR(s)) [r] <= 0."""
        early = self.schedule.ratio(self.schedule_time(s)).log()
        late = self.schedule.ratio(self.schedule_time(t)).log()
        return 2.0 * (late - early)

    # ------------------------------------------------------------------ network outputs

    def to_clean(self, kind: Output, output: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Convert the output of a network [r,d] to x_hat [r,d], in float64.

        Kinds: "eps", the noise; "x0", the clean vector; "v" = a eps - sigma x (arXiv 2202.00512);
        "u" = a' x + sigma' eps, the velocity in the time of the schedule (arXiv 2210.02747). Raises
        ArgumentError for "eps" if a(1) = 0, since the noise does not determine x there.
        """
        state_factor, output_factor = self.output_factors(kind, t).unbind(-1)
        from_state = state_factor.unsqueeze(-1) * zt.double()
        return from_state + output_factor.unsqueeze(-1) * output.double()

    def output_factors(self, kind: Output, t: Tensor) -> Tensor:
        """Return the factors [r,2] of the state and of the output in x_hat.

        x_hat = factors[:, 0] * z_t + factors[:, 1] * output. They depend on the time only, so a
        training step can compute them on the host.
        """
        self.check_output(kind)
        a = self.signal(t)
        sigma = self.deviation(t)
        zero = torch.zeros_like(a)
        if kind == "x0":
            return torch.stack([zero, zero + 1.0], -1)
        if kind == "eps":
            return torch.stack([1.0 / a, -sigma / a], -1)
        if kind == "v":
            return torch.stack([a, -sigma], -1) / (a**2 + sigma**2).unsqueeze(-1)
        d_a, d_sigma = self._slopes(t)
        return torch.stack([d_sigma, -sigma], -1) / (d_sigma * a - sigma * d_a).unsqueeze(-1)

    def from_clean(self, kind: Output, clean: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return the output of a network [r,d] that `to_clean` converts to `clean` [r,d]."""
        self.check_output(kind)
        clean = clean.double()
        zt = zt.double()
        a = self.signal(t).unsqueeze(-1)
        sigma = self.deviation(t).unsqueeze(-1)
        noise = (zt - a * clean) / sigma
        if kind == "x0":
            return clean
        if kind == "eps":
            return noise
        if kind == "v":
            return a * noise - sigma * clean
        d_a, d_sigma = self._slopes(t)
        return d_a.unsqueeze(-1) * clean + d_sigma.unsqueeze(-1) * noise

    def check_output(self, kind: Output) -> None:
        """Raise ArgumentError if a network cannot predict this kind of output."""
        if kind not in get_args(Output):
            raise ArgumentError(
                f"GaussianProcess: the output must be one of {', '.join(get_args(Output))}; got "
                f"{kind!r}."
            )
        if kind == "eps" and self._ends_without_signal:
            raise ArgumentError(
                'GaussianProcess: a network cannot predict "eps" on a schedule with SNR(1) = 0, '
                f"such as {self.schedule}: at t = 1 the noise is the state itself and carries no "
                'information on the clean vector. Predict "v", "x0" or "u", or set '
                "smallest_log_snr."
            )

    def _slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return da/du and dsigma/du [r], for the time u of the schedule."""
        # Some schedules have an infinite slope of a at the time 1.
        time = interior(self.schedule_time(t))
        d_a = _derivative(self.schedule.signal, time)
        d_sigma = _derivative(self.schedule.deviation, time)
        return d_a, d_sigma

    # ------------------------------------------------------------------ the bound

    def active(self, zt: Tensor) -> Tensor:
        """Return bool [r]: True, since every row adds to the bound."""
        return torch.ones(len(zt), dtype=torch.bool, device=zt.device)

    def scope(self, zt: Tensor) -> Tensor:
        """Return the query node [r] of each row: 0, since vectors have no tree."""
        return torch.zeros(len(zt), dtype=torch.long, device=zt.device)

    def closing_scope(self, zt: Tensor) -> Tensor:
        """Return the query node [r] of each row: 0."""
        return self.scope(zt)

    def end_needs_network(self, t: Tensor) -> Tensor:
        """Return bool in the shape of t: True between the first and the last interior time.

        Decoding before the first interior time uses the state, and closing after the last one the
        prior. The information time may stand for t = 0 and t = 1 by these times.
        """
        return (t > EARLIEST) & (t < LATEST)

    def density(self, prediction: PredictedMean, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return -1/2 SNR'(t) |x - x_hat|^2 [r], in nats per unit of t."""
        return self.weight(x0, zt, t) * self.divergence(prediction, x0, zt, t)

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return -1/2 SNR'(t) [r]."""
        return -0.5 * _derivative(self.snr, interior(t))

    def divergence(self, prediction: PredictedMean, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return |x - x_hat|^2 [r]."""
        return (x0 - prediction.mean).square().sum(-1)

    def decode_nll(
        self, prediction: PredictedMean | None, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        """Return -ln p(x0 | z_t) [r] of the decoder, in nats.

        A prediction is needed at t > 0 only; see `_estimate`.
        """
        clean = None if prediction is None else prediction.mean
        y, noise = self._estimate(clean, zt, t)
        return self.decoder.nll(x0.double(), y, noise)

    def closing_kl(self, prediction: PredictedMean | None, x0: Tensor, t: Tensor) -> Tensor:
        """Return the divergence of q_t(.|x0) from the start of sampling [r], in nats.

        At t = 1 it is KL( N(a x, sigma^2) || N(0, 1) ), without a prediction. At t < 1 sampling
        starts from N(a x_hat, sigma^2), with x_hat predicted from a draw of the prior at t = 1, and
        the divergence is SNR(t) |x - x_hat|^2 / 2.
        """
        a = self.signal(t)
        variance = self.deviation(t) ** 2
        per_number = 0.5 * (variance - 1.0 - variance.log())
        to_prior = 0.5 * a**2 * x0.square().sum(-1) + self.width * per_number
        if prediction is None:
            return to_prior
        to_prediction = 0.5 * self.snr(t) * (x0 - prediction.mean).square().sum(-1)
        return torch.where(t < LATEST, to_prediction, to_prior)

    # ------------------------------------------------------------------ information

    def information(self, t: Tensor) -> Tensor:
        """Return I(X; Z_t) [n] in nats, for a standard normal number X."""
        return 0.5 * torch.log1p(self.snr(t))

    def information_lost(self, t: Tensor) -> Tensor:
        """Return I(X; Z_0) - I(X; Z_t) [n] in nats."""
        start = self.snr(torch.zeros_like(t))
        now = self.snr(t)
        return 0.5 * torch.log1p((start - now) / (1.0 + now))

    def change_probability(self, t: Tensor) -> Tensor:
        """Return P(Z_t != X) [n] = 1: noise changes every vector."""
        return torch.ones_like(t)

    @cached_property
    def information_time(self) -> InformationTime:
        """Information time of a standard normal number: t as a function of the share lost.

        The best linear prediction then has the same mean density at every tau.
        """
        return InformationTime(self.information, self.information_lost, self.change_probability)

    # ------------------------------------------------------------------ reverse

    def posterior(
        self, clean: Tensor, zt: Tensor, t: Tensor, s: Tensor, eta: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return mean [r,d] and deviation [r] of z_s given z_t and the clean vector, s <= t.

        eta = 1 is the posterior of the process (arXiv 2006.11239). eta = 0 is deterministic: the
        noise keeps its direction (DDIM, arXiv 2010.02502). Every eta in [0,1] has the same marginal
        q_s(.|x). At s = t the result is z_t for every eta.
        """
        a = self.signal(t).unsqueeze(-1)
        noise = (zt - a * clean) / self.deviation(t).unsqueeze(-1)
        sigma_s = self.deviation(s)
        drawn = eta * sigma_s * self._share_added(s, t).sqrt()
        # sigma_s^2 - drawn^2, without cancellation if eta is 1 and SNR(t) is almost 0.
        kept = sigma_s * (1.0 - eta**2 + eta**2 * self._share_kept(s, t)).sqrt()
        mean = self.signal(s).unsqueeze(-1) * clean + kept.unsqueeze(-1) * noise
        return mean, drawn

    def velocity(self, clean: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return dz/dt [r,d] of the probability flow."""
        return (self._last - self._first) * self.from_clean("u", clean, zt, t)

    def noise_rate(self, t: Tensor) -> Tensor:
        """Return g(t)^2 [r], the rate of the noise variance that the process adds.

        g^2 = -sigma^2 d log SNR / dt. It is evaluated at interior times.
        """

        def log_snr(time: Tensor) -> Tensor:
            return self.schedule.log_snr(self.schedule_time(time))

        return -(self.deviation(t) ** 2) * _derivative(log_snr, interior(t))

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """Draw z_s given z_t from the posterior with the predicted clean vector."""
        zs = zt.clone()
        moving = find_rows(s < t)
        if len(moving) == 0:
            return zs
        z = zt[moving]
        clean = self.predict(query, moving, z)
        mean, deviation = self.posterior(clean, z, t[moving], s[moving])
        zs[moving] = (mean + deviation.unsqueeze(-1) * to_normal(u[moving])).to(zs.dtype)
        return zs

    def predict(self, query: Query, rows: Tensor, zt: Tensor) -> Tensor:
        """Query the network at `rows` [k] with states zt [k,d]. Returns x_hat [k,d] in float64."""
        return query(rows, self.scope(zt), _take_mean)

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw the clean vector from p(x | z_t), whose -ln is `decode_nll`.

        The network is queried once, at rows with t > 0.
        """
        clean = torch.zeros_like(zt, dtype=torch.float64)
        late = find_rows(t > EARLIEST)
        if len(late):
            clean[late] = self.predict(query, late, zt[late])
        y, noise = self._estimate(clean, zt, t)
        return self.decoder.draw(y, noise, u)

    def decode_most_likely(self, zt: Tensor) -> Tensor:
        """Return the most likely clean vector [r,d], given states zt [r,d] at t = 0."""
        y, _ = self._estimate(None, zt, torch.zeros_like(zt[:, 0], dtype=torch.float64))
        return self.decoder.most_likely(y)

    def _estimate(self, clean: Tensor | None, zt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the estimate y [r,d] of the clean vector and its deviation [r].

        At t = 0 the estimate is z / a with the deviation sigma / a. At t > 0 it is the prediction
        `clean`, with the deviation 1 / sqrt(1 + SNR) of a standard normal number given z_t.
        """
        is_late = t > EARLIEST
        # a may be 0 at t = 1, and a gradient through the unused quotient would be NaN.
        a = torch.where(is_late, 1.0, self.signal(t))
        y = zt.double() / a.unsqueeze(-1)
        noise = self.deviation(t) / a
        if clean is None:
            return y, noise
        y = torch.where(is_late.unsqueeze(-1), clean.double(), y)
        return y, torch.where(is_late, (1.0 + self.snr(t)).rsqrt(), noise)


def to_normal(u: Tensor) -> Tensor:
    """Map uniforms in [0,1) to standard normal numbers, by the inverse of their distribution."""
    return torch.special.ndtri(u.clamp(min=SMALLEST_UNIFORM))


def _take_mean(prediction: Any) -> Tensor:
    if not isinstance(prediction, PredictedMean):
        raise ArgumentError(
            "GaussianProcess: the network must predict vectors (PredictedMean); got "
            f"{type(prediction).__name__}. Give the field a head for vectors."
        )
    return prediction.mean.double()


def _derivative(function: Any, t: Tensor) -> Tensor:
    """Return the derivative of an elementwise function at t, by autograd."""
    with torch.enable_grad():
        time = t.detach().requires_grad_()
        return torch.autograd.grad(function(time).sum(), time)[0]
