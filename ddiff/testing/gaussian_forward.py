"""Laws of the schedule, the network outputs, the transitions and the posterior of vectors.

A Gaussian process noises a clean vector x by z_t = a(t) x + sigma(t) eps, with standard normal eps
and SNR = (a / sigma)^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from ddiff.core.gaussian import GaussianProcess, Output
from ddiff.errors import ArgumentError
from ddiff.testing.chain import PAIRS, PAIRS_TO_ENDS, TRIPLES
from ddiff.testing.gaussian_probes import vectors
from ddiff.testing.probes import ENDS, INNER, NEAR_ENDS, product, times
from ddiff.testing.report import Gap, compare, law

# Times that are not multiples of 1/1000, so that the laws detect a process that rounds t to an
# index of a table.
UNEVEN_PAIRS = ((0.31416, 0.77183), (0.00123, 0.50037))
ETAS = (0.0, 0.3, 0.7, 1.0)
POINTS = 6001  # of the grid over z_s in place of an integral
NORMALS = (-1.3, 0.2, 2.1)  # values of eps


class _Rows:
    """Every combination of a clean vector x, a noise eps and a time t, one per row.

    Attributes: x, noise, zt = a x + sigma eps [r,d], t [r], and a, sigma [r,1].
    """

    def __init__(self, process: GaussianProcess, t: Tensor) -> None:
        clean = vectors(process)
        place, number, time = product(
            torch.arange(len(clean)), torch.arange(len(NORMALS)), torch.arange(len(t))
        )
        self.t = t[time]
        self.x = clean[place]
        # Every dimension has another noise.
        shift = torch.linspace(0.0, 0.5, process.width, dtype=torch.float64)
        self.noise = times(NORMALS)[number].unsqueeze(-1) - shift
        self.a = process.signal(self.t).unsqueeze(-1)
        self.sigma = process.deviation(self.t).unsqueeze(-1)
        self.zt = self.a * self.x + self.sigma * self.noise


# ------------------------------------------------------------------ schedule


@law("schedule: SNR = (a / sigma)^2", tolerance=1e-9)
def snr_is_derived(process: GaussianProcess) -> Iterator[Gap]:
    """Check that `snr` and `log_snr` are those of the signal factor a and the deviation sigma.

    The error is relative to SNR. Tolerance 1e-9: a schedule may compute the ratio a / sigma by
    another formula, with other rounding.
    """
    t = times(INNER, NEAR_ENDS)
    expected = (process.signal(t) / process.deviation(t)) ** 2
    yield compare(process.snr(t), expected, {"t": t}, relative_to=expected)
    log_snr = process.schedule.log_snr(process.schedule_time(t))
    yield compare(log_snr.exp(), expected, {"t": t}, relative_to=expected)


@law("schedule: log SNR falls from its largest to its smallest value", tolerance=1e-7)
def snr_falls(process: GaussianProcess) -> Iterator[Gap]:
    """Check that SNR falls strictly, and that log SNR has the declared values at t = 0 and t = 1.

    A process without `smallest_log_snr` ends where its schedule ends. Tolerance 1e-7: near t = 1
    the time is a float64 number near 1, so a log SNR of -30 there has an error of 1e-9.
    """
    ends = process.schedule.log_snr(process.schedule_time(times(ENDS)))
    yield compare(ends[0], process.largest_log_snr, {"log SNR at t": "0"})
    if process.smallest_log_snr is not None:
        yield compare(ends[1], process.smallest_log_snr, {"log SNR at t": "1"})
    inside = torch.sigmoid(torch.linspace(-27.0, 27.0, 217, dtype=torch.float64))
    t = torch.cat([times((0.0,)), inside, times((1.0,))])
    does_not_fall = process.snr(t).diff() >= 0
    yield compare(does_not_fall.double(), 0.0, {"SNR does not fall after t": t[:-1]})


@law("schedule: closes at the prior if and only if q_1 is the prior", tolerance=0.0)
def closes_as_declared(process: GaussianProcess) -> Iterator[Gap]:
    """Check that `closes_at_prior` is true exactly if a(1) = 0 and sigma(1) = 1.

    The bound leaves out its closing term if the process closes at the prior. sigma(1) counts as 1
    if it differs by less than 1e-9, for rounding. Tolerance 0: the statement is true or false.
    """
    a, sigma = process.signal(times((1.0,))), process.deviation(times((1.0,)))
    is_prior = (a == 0) & ((sigma - 1.0).abs() < 1e-9)
    yield compare(is_prior.double(), float(process.closes_at_prior), {"a(1)": a, "sigma(1)": sigma})


@law("schedule: VP schedules preserve the variance", tolerance=1e-12)
def variance_is_preserved(process: GaussianProcess) -> Iterator[Gap]:
    """Check that a^2 + sigma^2 = 1 at all times, for schedules that declare `preserves_variance`.

    Tolerance 1e-12: float64 rounding.
    """
    if process.schedule.preserves_variance:
        t = times(INNER, NEAR_ENDS, ENDS)
        yield compare(process.signal(t) ** 2 + process.deviation(t) ** 2, 1.0, {"t": t})


# ------------------------------------------------------------------ network outputs


@law("outputs: eps, x0, v and u convert to the clean vector and back", tolerance=1e-12)
def outputs_round_trip(process: GaussianProcess) -> Iterator[Gap]:
    """Check that `to_clean` and `from_clean` are inverse to each other at all times.

    The error of the clean vector is relative to 1 + sigma / a, and that of an output to 1 + a /
    sigma times 1 + its size, because a rounding error of the state grows by these factors.
    Tolerance 1e-12: float64 rounding.
    """
    rows = _Rows(process, times(INNER, NEAR_ENDS, ENDS))
    labels = {"t": rows.t}
    for kind in get_args(Output):
        if kind == "eps" and not bool((rows.a > 0).all()):
            continue  # refused, see `outputs_are_refused`
        output = process.from_clean(kind, rows.x, rows.zt, rows.t)
        clean = process.to_clean(kind, output, rows.zt, rows.t)
        at = {"output": kind, **labels}
        # At a = 0 the other outputs are the clean vector up to a factor of order 1.
        amplified = rows.sigma / rows.a if kind == "eps" else 0.0
        yield compare(clean, rows.x, at, relative_to=1.0 + amplified)
        again = process.from_clean(kind, clean, rows.zt, rows.t)
        yield compare(
            again, output, at, relative_to=(1.0 + rows.a / rows.sigma) * (1.0 + output.abs())
        )


@law("outputs: each has the value of its definition", tolerance=1e-7)
def outputs_are_defined(process: GaussianProcess) -> Iterator[Gap]:
    """Check `from_clean`: eps is the noise, v = a eps - sigma x, u = a' x + sigma' eps.

    a' and sigma' are derivatives by the time of the schedule, here difference quotients. The error
    is relative to 1 + the size of the output. Tolerance 1e-7: a difference quotient of fourth order
    with the step 1e-3 has an error of 1e-9.
    """
    rows = _Rows(process, times(INNER[1:-1]))
    labels = {"t": rows.t}
    time = process.schedule_time(rows.t)
    schedule = process.schedule
    d_a = difference_quotient(schedule.signal, time).unsqueeze(-1)
    d_sigma = difference_quotient(schedule.deviation, time).unsqueeze(-1)
    expected = {
        "x0": rows.x,
        "v": rows.a * rows.noise - rows.sigma * rows.x,
        "u": d_a * rows.x + d_sigma * rows.noise,
    }
    if bool((process.signal(times((1.0,))) > 0).all()):
        expected["eps"] = rows.noise
    for kind, value in expected.items():
        got = process.from_clean(kind, rows.x, rows.zt, rows.t)  # type: ignore[arg-type]
        yield compare(got, value, {"output": kind, **labels}, relative_to=1.0 + value.abs())


@law("outputs: singular and unknown outputs are refused", tolerance=0.0)
def outputs_are_refused(process: GaussianProcess) -> Iterator[Gap]:
    """Check that unknown outputs raise ArgumentError, and "eps" exactly if SNR(1) = 0.

    At SNR = 0 the noise does not determine the clean vector, and the conversion would divide by 0.
    Tolerance 0: a call is refused or not.
    """
    rows = _Rows(process, times(INNER))
    is_singular = float(process.signal(times((1.0,)))) == 0.0
    for kind in ("x0", "v", "u", "eps", "score"):
        expected = kind == "score" or (kind == "eps" and is_singular)
        for convert in (process.to_clean, process.from_clean):
            refused = _is_refused(convert, kind, rows.x, rows.zt, rows.t)
            labels = {"output": kind, "call": convert.__name__}
            yield compare(torch.tensor(float(refused)), float(expected), labels)


def _is_refused(call: Callable[..., Any], *arguments: Any) -> bool:
    try:
        call(*arguments)
    except ArgumentError:
        return True
    return False


@law("velocity = time derivative of a x + sigma eps", tolerance=1e-7)
def velocity_is_a_derivative(process: GaussianProcess) -> Iterator[Gap]:
    """Check that `velocity` is the derivative of z_t by t for fixed x and eps.

    This is the velocity of the probability flow. The error is relative to 1 + the size of the
    velocity. Tolerance 1e-7: a difference quotient of fourth order with the step 1e-3 has an error
    of 1e-9.
    """
    rows = _Rows(process, times(INNER[1:-1]))
    d_a = difference_quotient(process.signal, rows.t).unsqueeze(-1)
    d_sigma = difference_quotient(process.deviation, rows.t).unsqueeze(-1)
    expected = d_a * rows.x + d_sigma * rows.noise
    got = process.velocity(rows.x, rows.zt, rows.t)
    yield compare(got, expected, {"t": rows.t}, relative_to=1.0 + expected.abs())


def difference_quotient(
    function: Callable[[Tensor], Tensor], t: Tensor, step: float = 1e-3
) -> Tensor:
    """Return the derivative of an elementwise function at t, with an error of order step^4."""
    near = function(t + step) - function(t - step)
    far = function(t + 2.0 * step) - function(t - 2.0 * step)
    return (8.0 * near - far) / (12.0 * step)


# ------------------------------------------------------------------ transition and posterior


@law("transition: after q_s it gives q_t", tolerance=1e-12)
def transition_composes(process: GaussianProcess) -> Iterator[Gap]:
    """Check z_t = c z_s + w eps: c a_s = a_t, and c^2 sigma_s^2 + w^2 = sigma_t^2.

    (c, w) = `transition(s, t)`. The pairs include s = t, s = 0 and t = 1. Two transitions in
    sequence must give the transition of the whole interval. Tolerance 1e-12: float64 rounding.
    """
    s, t = times(*PAIRS, *PAIRS_TO_ENDS, *UNEVEN_PAIRS).reshape(-1, 2).T
    factor, deviation = process.transition(s, t)
    labels = {"s": s, "t": t}
    yield compare(factor * process.signal(s), process.signal(t), labels)
    variance = factor**2 * process.deviation(s) ** 2 + deviation**2
    yield compare(variance.sqrt(), process.deviation(t), labels)
    s, u, t = times(*TRIPLES).reshape(-1, 3).T
    labels = {"s": s, "u": u, "t": t}
    early, early_deviation = process.transition(s, u)
    late, late_deviation = process.transition(u, t)
    factor, deviation = process.transition(s, t)
    yield compare(late * early, factor, labels)
    yield compare(late**2 * early_deviation**2 + late_deviation**2, deviation**2, labels)


@law("posterior = Bayes", tolerance=1e-8)
def posterior_is_bayes(process: GaussianProcess) -> Iterator[Gap]:
    """Check mean and deviation of `posterior` by Bayes' rule, for eta = 1.

    The density of z_s given z_t and x is proportional to q_s(z_s|x) q(z_t|z_s), with the marginal
    and the transition of the process. Mean and deviation of this product are sums over a fine grid
    of z_s, and errors are relative to sigma_s. Tolerance 1e-8: the difference of two means of size
    1 has a rounding error of 1e-16, which is 1e-9 of a sigma_s of 1e-7.
    """
    for s, t in (*UNEVEN_PAIRS, (0.02, 0.5), (0.5, 0.97), (0.0, 0.31), (0.5, 1.0)):
        rows = _Rows(process, times((t,)))
        start = torch.full_like(rows.t, s)
        mean, deviation = process.posterior(rows.x, rows.zt, rows.t, start)
        labels = {"s": start, "t": rows.t}
        sigma = process.deviation(start).unsqueeze(-1)
        center = process.signal(start).unsqueeze(-1) * rows.x
        factor, added = (value[:, None, None] for value in process.transition(start, rows.t))
        # Steps of 1/300 of sigma_s, over 10 sigma_s on both sides.
        place = torch.linspace(-10.0, 10.0, POINTS, dtype=torch.float64)
        zs = center.unsqueeze(-1) + sigma.unsqueeze(-1) * place
        distance = (rows.zt.unsqueeze(-1) - factor * zs) / added
        share = (-0.5 * (place**2 + distance**2)).softmax(-1)
        expected = (share * place).sum(-1)
        yield compare((mean - center) / sigma, expected, labels)
        variance = (share * (place - expected.unsqueeze(-1)) ** 2).sum(-1)
        got = (deviation.unsqueeze(-1) / sigma).expand_as(expected)
        yield compare(got, variance.sqrt(), labels)


@law("posterior: every eta keeps the marginals", tolerance=1e-12)
def posterior_keeps_marginals(process: GaussianProcess) -> Iterator[Gap]:
    """Check that steps with `posterior` from t = 1 to t = 0 keep mean and deviation of q_t(.|x).

    The steps use the true vector x. The values of eta are 0, 0.3, 0.7 and 1, where 1 is the
    posterior of the process and 0 is deterministic. One of the steps has the length 0. Tolerance
    1e-12: float64 rounding, summed over 20 steps.
    """
    grid = torch.linspace(1.0, 0.0, 20, dtype=torch.float64)
    grid = torch.cat([grid[:8], grid[7:]])
    for eta in ETAS:
        x = vectors(process)
        t = torch.ones(len(x), dtype=torch.float64)
        mean = process.signal(t).unsqueeze(-1) * x
        variance = process.deviation(t) ** 2
        for s in grid[1:].tolist():
            start = torch.full_like(t, s)
            # The mean of the step is a linear function of the state, with the same slope in every
            # dimension.
            at_mean, added = process.posterior(x, mean, t, start, eta)
            at_next, _ = process.posterior(x, mean + 1.0, t, start, eta)
            slope = (at_next - at_mean)[:, 0]
            mean = at_mean
            variance = slope**2 * variance + added**2
            t = start
            sigma = process.deviation(t)
            labels = {"s": t, "eta": eta}
            expected = process.signal(t).unsqueeze(-1) * x
            yield compare(mean, expected, labels)
            yield compare(variance.sqrt(), sigma, labels)


@law("posterior: eta = 0 with the true vector is exact in one step", tolerance=1e-12)
def deterministic_step_is_exact(process: GaussianProcess) -> Iterator[Gap]:
    """Check that eta = 0 moves a x + sigma eps at t to a x + sigma eps at s, for any s <= t.

    With the true vector the noise eps keeps its value, so one long step is as exact as many short
    ones. Nothing is drawn. Tolerance 1e-12: float64 rounding.
    """
    s, t = times(*PAIRS, *PAIRS_TO_ENDS, *UNEVEN_PAIRS).reshape(-1, 2).T
    for start, stop in zip(s.tolist(), t.tolist()):
        rows = _Rows(process, times((stop,)))
        at = torch.full_like(rows.t, start)
        got, deviation = process.posterior(rows.x, rows.zt, rows.t, at, 0.0)
        sigma = process.deviation(at).unsqueeze(-1)
        expected = process.signal(at).unsqueeze(-1) * rows.x + sigma * rows.noise
        yield compare(got, expected, {"s": at, "t": rows.t})
        yield compare(deviation, 0.0, {"s": at, "t": rows.t})
