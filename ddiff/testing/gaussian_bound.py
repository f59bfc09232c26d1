"""Laws of the bound of a Gaussian process, with exact expectations by quadrature.

SNR = (a / sigma)^2, q_t(.|x) = N(a x, sigma^2). The density of the bound is -1/2 SNR' |x - x_hat|^2
in nats per unit of t, for a prediction x_hat of the clean vector x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.gaussian import GaussianProcess, PredictedMean
from ddiff.core.gaussian_schedule import Flow
from ddiff.core.numerics import EARLIEST, LATEST, pick
from ddiff.testing.gaussian_probes import (
    Mixture,
    Predict,
    coefficients,
    data_of,
    exact_prediction,
    expected_nelbo,
    nodes_for,
    normal_nodes,
    vectors,
)
from ddiff.testing.probes import (
    ENDS,
    INNER,
    logit_ends,
    logit_nodes,
    num_panels,
    product,
    times,
)
from ddiff.testing.report import Gap, compare, law

INTERIOR = (EARLIEST, LATEST)
WINDOWS = (INTERIOR, (0.02, 0.97), (0.31, 0.5))
# The largest distance of log SNR at both ends from 0 at which a bound counts as complete.
WIDE = 28.0


@law("bound: pointwise tight with the exact prediction", tolerance=1e-9)
def bound_is_pointwise_tight(process: GaussianProcess, finer: int = 1) -> Iterator[Gap]:
    """Check that with x_hat = E[x|z] the integral of the density is KL_s(x) - KL_t(x) at every x.

    KL_t(x) is the divergence of q_t(.|x) from the distribution of z_t. The data are a mixture of
    two normals, or values of the decoder's grid. The error is relative to 1 + KL_s(x). Tolerance
    1e-9: Gauss-Legendre quadrature in logit t and Gauss-Hermite quadrature over the noise, or
    equidistant nodes for data on a grid.
    """
    data = data_of(process)
    predict = exact_prediction(process, data)
    x = data.vectors(process)
    for start, stop in WINDOWS:
        got = _expected_diffusion(process, predict, x, start, stop, finer)
        ends = [_divergence_from_data(process, data, x, time) for time in (start, stop)]
        labels = {"from": start, "to": stop, "first number of x": x[:, 0]}
        yield compare(got, ends[0] - ends[1], labels, relative_to=1.0 + ends[0])


@law("bound: -ln p(x) with the exact prediction", tolerance=1e-9)
def bound_is_tight(process: GaussianProcess, finer: int = 1) -> Iterator[Gap]:
    """Check that closing + diffusion + decoding, as `nelbo` adds them, is -ln p(x) at every x.

    The law applies if log SNR is at least 28 at t = 0 and at most -28 at t = 1. For data on a grid
    of values the decoder is exact from a much smaller log SNR, so the first condition is dropped.
    Tolerance 1e-9: the ends add less than 1e-11 nats. The decoding term is a difference of numbers
    near 15 per dimension, from states with an error of 1e-16 relative to a deviation of 1e-7.
    """
    log_snr = process.schedule.log_snr(process.schedule_time(times(ENDS)))
    is_discrete = process.decoder.values is not None
    if (log_snr[0] < WIDE and not is_discrete) or log_snr[1] > -WIDE:
        return
    data = data_of(process)
    x = data.vectors(process)
    bound = expected_nelbo(process, exact_prediction(process, data), x, finer)
    expected = -data.log_density(x).sum(-1)
    yield compare(bound.total, expected, {"first number of x": x[:, 0]})


@law("bound: the schedule does not matter between equal SNR", tolerance=1e-9)
def schedule_does_not_matter(process: GaussianProcess, finer: int = 1) -> Iterator[Gap]:
    """Check that the diffusion term between two values of SNR is that of the flow schedule.

    The prediction is a function of z / sqrt(a^2 + sigma^2), so that both processes predict the same
    from the same information. The error is relative to the term. Tolerance 1e-9: Gauss-Legendre
    quadrature in logit t.
    """
    ends = process.schedule.log_snr(process.schedule_time(times(ENDS)))
    highest, lowest = min(float(ends[0]), 8.0), max(float(ends[1]), -8.0)
    other = GaussianProcess(Flow(), process.width, highest + 1.0)
    x = vectors(process)
    terms = []
    for one in (process, other):
        predict = _rescaled_prediction(one)
        start, stop = _time_of(one, highest), _time_of(one, lowest)
        terms.append(_expected_diffusion(one, predict, x, start, stop, finer))
    yield compare(terms[0], terms[1], {"first number of x": x[:, 0]}, relative_to=terms[1])


@law("bound: closed form for a constant prediction", tolerance=1e-9)
def constant_prediction(process: GaussianProcess, finer: int = 1) -> Iterator[Gap]:
    """Check the three terms, as `nelbo` adds them, for a prediction m that ignores the state.

    The diffusion term is (SNR(0) - SNR(1)) |x - m|^2 / 2, the closing term (a^2 x^2 + sigma^2 - 1 -
    ln sigma^2) / 2 per dimension, and the decoding term of a Gaussian decoder the entropy of N(0,
    sigma^2 / a^2). Errors are relative to 1 + the term. Tolerance 1e-9: Gauss-Legendre quadrature.
    """
    x = vectors(process)
    constant = 0.3
    bound = expected_nelbo(process, lambda zt, t: torch.full_like(zt, constant), x, finer)
    ends = times(INTERIOR)
    snr = process.snr(ends)
    diffusion = (snr[0] - snr[1]) / 2.0 * (x - constant).square().sum(-1)
    labels = {"first number of x": x[:, 0]}
    yield compare(bound.diffusion, diffusion, labels, relative_to=1.0 + diffusion)
    variance = process.deviation(ends)[1] ** 2
    per_number = process.signal(ends)[1] ** 2 * x**2 + variance - 1.0 - variance.log()
    yield compare(bound.closing, per_number.sum(-1) / 2.0, {"closing": "at t = 1", **labels})
    if process.decoder.values is None:
        entropy = 0.5 * torch.log(2.0 * math.pi * math.e / snr[0])
        yield compare(bound.decoding, process.width * entropy, {"decoding": "at t = 0", **labels})


@law("bound: another prediction adds the SNR-weighted square", tolerance=1e-9)
def other_predictions_are_worse(process: GaussianProcess) -> Iterator[Gap]:
    """Check that a prediction x_hat adds -1/2 SNR' E|x_hat - E[x|z]|^2 to the mean density.

    The mean is over data and noise. It holds at every time, so it holds for the bound. The error is
    relative to the density. Tolerance 1e-9: the equality holds at every state z, since the mean
    over x given z is exact.
    """
    data = data_of(process)
    t = times(INNER)
    z, x, weight = _joint_nodes(process, data, t)
    count = weight.shape[-1]
    rows_t = t.repeat_interleave(count)
    exact = exact_prediction(process, data)(z, rows_t)
    other = _rescaled_prediction(process)(z, rows_t)
    squares = (other - exact).square().sum(-1)
    added = process.density(PredictedMean(other), x, z, rows_t)
    least = process.density(PredictedMean(exact), x, z, rows_t)
    expected = process.weight(x, z, rows_t) * squares
    means = [(value.reshape(len(t), -1) * weight).sum(-1) for value in (added, least, expected)]
    yield compare(means[0] - means[1], means[2], {"t": t}, relative_to=means[0])


# ------------------------------------------------------------------ expectations


def _expected_diffusion(
    process: GaussianProcess, predict: Predict, x: Tensor, start: float, stop: float, finer: int
) -> Tensor:
    """Return the mean over the noise of the integral of the density over t in [start,stop].

    x [m,d] are clean vectors; the result is [m]. All dimensions have the same quadrature nodes.
    """
    h, normal_weight = nodes_for(process)
    _, y, time_weight = logit_nodes(start, stop, num_panels(start, stop, finer))
    first, last = logit_ends(start, stop)
    t = torch.sigmoid(y)
    slope = time_weight * t * (1.0 - t) * (last - first)
    sample, k, j = product(torch.arange(len(x)), torch.arange(len(t)), torch.arange(len(h)))
    x0 = x[sample]
    a, sigma = coefficients(process, t[k], x0)
    z = a * x0 + sigma * h[j].unsqueeze(-1)
    density = process.density(PredictedMean(predict(z, t[k])), x0, z, t[k])
    weight = (slope[k] * normal_weight[j]).reshape(len(x), -1)
    return (density.reshape(len(x), -1) * weight).sum(-1)


def _divergence_from_data(
    process: GaussianProcess, data: Mixture, x: Tensor, time: float
) -> Tensor:
    """Return KL( q_t(.|x) || distribution of z_t ) [m] for clean vectors x [m,d]."""
    h, weight = nodes_for(process)
    t = torch.full((len(x),), time, dtype=torch.float64)
    a, sigma = (value.unsqueeze(-1) for value in coefficients(process, t, x))
    noise = h.expand(*x.shape, -1)
    z = a * x.unsqueeze(-1) + sigma * noise
    # ln q_t(z|x) from the noise, without the rounding error of z - a x.
    log_q = -0.5 * (noise**2 + (2.0 * math.pi * sigma**2).log())
    log_p = data.log_noisy(z, a.expand_as(z), sigma.expand_as(z))
    return ((log_q - log_p) @ weight).sum(-1)


def _joint_nodes(
    process: GaussianProcess, data: Mixture, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return states z, clean vectors x [r,d] and weights [k,r/k] of data and noise at times t [k].

    States are drawn from every component of the data. At every state, x is drawn from its exact
    distribution given z, so that the mean over x given z is exact for quadratic functions of x.
    Rows are in the order of the times. All dimensions have the same nodes.
    """
    h, state_weight = normal_nodes()
    g, clean_weight = normal_nodes(3)
    components = torch.arange(len(data.weight))
    time, drawn, i, c, j = product(
        torch.arange(len(t)), components, torch.arange(len(h)), components, torch.arange(len(g))
    )
    a, sigma = process.signal(t[time]), process.deviation(t[time])
    deviation = (a**2 * data.spread[drawn] ** 2 + sigma**2).sqrt()
    z = a * data.mean[drawn] + deviation * h[i]
    spread = data.spread[c]
    clean_deviation = spread * sigma / (a**2 * spread**2 + sigma**2).sqrt()
    x = pick(data.mean_given(z, a, sigma), c) + clean_deviation * g[j]
    share = pick(data.shares(z, a, sigma), c)
    weight = data.weight[drawn] * state_weight[i] * share * clean_weight[j]
    shape = (-1, process.width)
    return (
        z.unsqueeze(-1).expand(shape),
        x.unsqueeze(-1).expand(shape),
        weight.reshape(len(t), -1),
    )


def _rescaled_prediction(process: GaussianProcess) -> Predict:
    """Return a prediction that depends on the state and on SNR only."""

    def predict(zt: Tensor, t: Tensor) -> Tensor:
        a, sigma = coefficients(process, t, zt)
        return torch.tanh(0.8 * zt / (a**2 + sigma**2).sqrt()) - 0.1

    return predict


def _time_of(process: GaussianProcess, log_snr: float) -> float:
    """Return the time t of the process at which log SNR has the given value."""
    first, last = process.schedule_time(times(ENDS)).tolist()
    return (process.schedule.time_of_log_snr(log_snr) - first) / (last - first)
