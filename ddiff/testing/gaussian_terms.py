"""Laws of the single terms of the bound of a Gaussian process, and of its information time.

SNR = (a / sigma)^2, q_t(.|x) = N(a x, sigma^2). The density of the bound is -1/2 SNR' |x - x_hat|^2
in nats per unit of t, for a prediction x_hat of the clean vector x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.gaussian import GaussianProcess, PredictedMean
from ddiff.testing.gaussian_bound import INTERIOR, WINDOWS
from ddiff.testing.gaussian_probes import coefficients, normal_nodes, vectors
from ddiff.testing.probes import ENDS, INNER, NEAR_ENDS, integral, product, times
from ddiff.testing.report import Gap, compare, law

# ------------------------------------------------------------------ weight and density


@law("weight: its integral is half the loss of SNR", tolerance=1e-9)
def weight_integrates(process: GaussianProcess, finer: int = 1) -> Iterator[Gap]:
    """Check that the integral of `weight` over [s,t] is (SNR(s) - SNR(t)) / 2.

    The error is relative to this value. Tolerance 1e-9: Gauss-Legendre quadrature in logit t.
    """
    x0 = vectors(process, 1)

    def weight(t: Tensor) -> Tensor:
        rows = x0.expand(len(t), -1)
        return process.weight(rows, rows, t).unsqueeze(-1)

    for start, stop in WINDOWS:
        snr = process.snr(times((start, stop)))
        expected = (snr[0] - snr[1]) / 2.0
        got = integral(weight, start, stop, finer)
        yield compare(got, expected, {"from": start, "to": stop}, relative_to=expected)


@law("density = weight x divergence, with the sum over the dimensions", tolerance=1e-12)
def density_is_a_product(process: GaussianProcess) -> Iterator[Gap]:
    """Check density = weight * divergence, and that the divergence is the sum of squares.

    A mean over the dimensions, or a distance of directions only, is a training loss and no bound.
    The error is relative to the value. Tolerance 1e-12: float64 rounding.
    """
    t = times(INNER, NEAR_ENDS)
    x0 = vectors(process, len(t))
    prediction = PredictedMean(0.3 - 0.4 * x0)
    squares = torch.zeros_like(t)
    for dimension in range(process.width):
        squares = squares + (x0 - prediction.mean)[:, dimension] ** 2
    divergence = process.divergence(prediction, x0, x0, t)
    yield compare(divergence, squares, {"divergence at t": t}, relative_to=squares)
    expected = process.weight(x0, x0, t) * squares
    got = process.density(prediction, x0, x0, t)
    yield compare(got, expected, {"density at t": t}, relative_to=expected)


@law("closing: divergence by quadrature", tolerance=1e-9)
def closing_is_a_divergence(process: GaussianProcess) -> Iterator[Gap]:
    """Check that `closing_kl` is the divergence of q_t(.|x) from the start of sampling.

    The start is the prior N(0, 1) at t = 1, with or without a prediction, and N(a x_hat, sigma^2)
    at t < 1. The error is relative to 1 + the divergence. Tolerance 1e-9: the logarithm of the
    ratio is a quadratic function of z, for which the quadrature is exact to rounding.
    """
    x = vectors(process)
    h, weight = normal_nodes(8)
    predicted = 0.2 + 0.1 * x
    for t in times((0.31, 0.77, 1.0)):
        time = t.expand(len(x))
        a, sigma = coefficients(process, time, x)
        z = (a * x).unsqueeze(-1) + sigma.unsqueeze(-1) * h
        log_q = _log_normal(z, (a * x).unsqueeze(-1), sigma.unsqueeze(-1))
        is_end = bool(t == 1)
        mean, spread = (0.0 * x, torch.ones_like(x)) if is_end else (a * predicted, sigma)
        log_start = _log_normal(z, mean.unsqueeze(-1), spread.unsqueeze(-1))
        expected = ((log_q - log_start) @ weight).sum(-1)
        predictions = [PredictedMean(predicted), None] if is_end else [PredictedMean(predicted)]
        for prediction in predictions:
            got = process.closing_kl(prediction, x, time)
            yield compare(got, expected, {"t": time}, relative_to=1.0 + expected)


# ------------------------------------------------------------------ information


@law("information: that of a standard normal number", tolerance=1e-9)
def information_is_normal(process: GaussianProcess) -> Iterator[Gap]:
    """Check that `information` is I(X; Z_t) for X ~ N(0, 1), and `information_lost` its decrease.

    I(X; Z_t) is the mean of ln q_t(z|x) - ln q_t(z), a quadratic function of x and of the noise.
    Tolerance 1e-9: the quadrature is exact to rounding.
    """
    t = times(INNER, NEAR_ENDS, ENDS)
    h, weight = normal_nodes(8)
    a = process.signal(t)[:, None, None]
    sigma = process.deviation(t)[:, None, None]
    x = h.unsqueeze(-1)
    z = a * x + sigma * h
    spread = (a**2 + sigma**2).sqrt()
    difference = _log_normal(z, a * x, sigma) - _log_normal(z, torch.zeros_like(z), spread)
    expected = torch.einsum("tij,i,j->t", difference, weight, weight)
    got = process.information(t)
    yield compare(got, expected, {"t": t})
    start = process.information(torch.zeros_like(t))
    yield compare(process.information_lost(t), start - got, {"information lost at t": t})


@law("information time: the best linear prediction has a constant mean density", tolerance=1e-2)
def information_time_is_even(process: GaussianProcess) -> Iterator[Gap]:
    """Check that dt/dtau times the mean density is the same at every tau.

    The data are standard normal, and the prediction a z / (a^2 + sigma^2). The mean over data and
    noise must be the total loss of information times the width. t(tau) must rise, and dt/dtau must
    be its derivative. Errors are relative. Tolerance 1e-2: the information is interpolated between
    257 knots, with an error of 2e-3. It changes the variance of an estimate, but not its mean.
    """
    tau = torch.linspace(0.001, 0.999, 41, dtype=torch.float64)
    t, speed = process.information_time.at(tau)
    h, weight = normal_nodes(4)
    time, i, j = product(torch.arange(len(t)), torch.arange(len(h)), torch.arange(len(h)))
    x = h[i].unsqueeze(-1).expand(-1, process.width)
    a, sigma = coefficients(process, t[time], x)
    z = a * x + sigma * h[j].unsqueeze(-1)
    prediction = PredictedMean(a * z / (a**2 + sigma**2))
    density = process.density(prediction, x, z, t[time]).reshape(len(t), -1)
    mean = density @ (weight.unsqueeze(-1) * weight).reshape(-1)
    ends, _ = process.information_time.at(times(ENDS))
    information = process.information(ends)
    total = process.width * (information[0] - information[1])
    yield compare(speed * mean, total, {"tau": tau}, relative_to=total)
    step = 1e-5
    near = process.information_time.at(tau + step)[0] - process.information_time.at(tau - step)[0]
    yield compare(near / (2.0 * step), speed, {"dt/dtau at tau": tau}, relative_to=speed)


@law("gradients are finite at all times", tolerance=0.0)
def gradients_are_finite(process: GaussianProcess) -> Iterator[Gap]:
    """Check the gradients of every term of the bound by prediction and state, at t from 0 to 1.

    The terms are density, decode_nll and closing_kl, and the conversions of network outputs.
    Tolerance 0: a gradient is finite or not.
    """
    t = times(INNER, NEAR_ENDS, ENDS, INTERIOR)
    x0 = vectors(process, len(t))
    state = (0.7 * x0.flip(0)).requires_grad_()
    output = (0.5 * x0).requires_grad_()
    prediction = PredictedMean(output)
    terms = {
        "density": process.density(prediction, x0, state, t),
        "decode_nll": process.decode_nll(prediction, x0, state, t),
        "closing_kl": process.closing_kl(prediction, x0, t),
    }
    for kind in ("x0", "v", "u"):
        terms[f"to_clean {kind}"] = process.to_clean(kind, output, state, t)
    for name, term in terms.items():
        gradients = torch.autograd.grad(term.sum(), (output, state), allow_unused=True)
        for gradient in gradients:
            if gradient is not None:
                yield compare(gradient.isfinite().double(), 1.0, {"gradient of": name, "t": t})


def _log_normal(z: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    distance = (z - mean) / deviation
    return -0.5 * distance**2 - deviation.log() - 0.5 * math.log(2.0 * math.pi)
