"""Laws of the draws of a Gaussian process: noisy vectors, steps, decoded vectors and the prior.

A draw is a function of uniforms. Means over the uniforms are computed with quadrature nodes in
place of random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddiff.core.gaussian import GaussianProcess, PredictedMean
from ddiff.core.rng import CounterRng
from ddiff.testing.gaussian_forward import UNEVEN_PAIRS
from ddiff.testing.gaussian_probes import VectorQuery, normal_grid, vectors
from ddiff.testing.probes import ENDS, INNER, NEAR_ENDS, STEPS, product, times
from ddiff.testing.report import Gap, compare, law

MIDPOINTS = 4096  # uniforms in place of random draws of one number
REACH = 9.0  # deviations over which a density of a decoder is summed
POINTS = 31  # per dimension of this sum
DECODING_TIMES = (0.0, 0.31, 0.97, 1.0)


@law("sample = marginal", tolerance=1e-7)
def sample_follows_marginal(process: GaussianProcess) -> Iterator[Gap]:
    """Check that `sample` draws from N(a x, sigma^2), independently in every dimension.

    Mean, covariance and fourth moment of (z_t - a x) / sigma must be 0, 1 and 3. Tolerance 1e-7:
    the rounding error of z_t is 1e-16, which is 1e-9 of a sigma of 1e-7, and the fourth moment
    multiplies it by 100.
    """
    u, weight = _normal_uniforms(process.width)
    for t in times(INNER, NEAR_ENDS, ENDS):
        for x in vectors(process, 2):
            x0 = x.expand_as(u)
            time = t.expand(len(u))
            z = process.sample(x0, time, u)
            center = process.signal(time).unsqueeze(-1) * x0
            scaled = (z - center) / process.deviation(time).unsqueeze(-1)
            yield from _moment_gaps(scaled, weight, {"t": t})


@law("step = posterior", tolerance=1e-7)
def step_follows_posterior(process: GaussianProcess) -> Iterator[Gap]:
    """Check that `step` draws z_s from the posterior of the predicted vector.

    Mean and deviation are those of `posterior`. Moments are compared as for `sample`. With s = t
    the state must not change. Tolerance 1e-7: as for `sample`.
    """
    u, weight = _normal_uniforms(process.width)
    for s, t in (*STEPS, *UNEVEN_PAIRS, (0.0, 0.31), (0.5, 1.0), (0.0, 1.0)):
        clean, state = vectors(process, 2)
        start, stop = torch.full((len(u),), s), torch.full((len(u),), t)
        start, stop = start.double(), stop.double()
        zt = state.expand_as(u)
        query = VectorQuery(clean.expand_as(u))
        zs = process.step(query, zt, stop, start, u)
        mean, deviation = process.posterior(clean.expand_as(u), zt, stop, start)
        scaled = (zs - mean) / deviation.unsqueeze(-1)
        yield from _moment_gaps(scaled, weight, {"s": s, "t": t})
        kept = process.step(query, zt, stop, stop, u)
        yield compare(kept, zt, {"s = t": t})


@law("prior: draws are standard normal", tolerance=1e-9)
def prior_is_standard_normal(process: GaussianProcess) -> Iterator[Gap]:
    """Check the moments of draws from the prior, and that a draw depends on its own sample only.

    `draw_positions` must return vectors [B,n,d] that are the same in every batch. Tolerance 1e-9:
    Gauss-Hermite nodes are exact for moments up to the fourth, up to rounding of the uniforms.
    """
    u, weight = _normal_uniforms(process.width)
    yield from _moment_gaps(process.prior.draw(u), weight, {"draw of the": "prior"})
    whole = process.prior.draw_positions(CounterRng(3, 0, torch.arange(6), 5), "prior")
    part = process.prior.draw_positions(CounterRng(3, 0, torch.arange(4, 6), 5), "prior")
    shape = torch.tensor(whole.shape)
    yield compare(shape, torch.tensor([6, 5, process.width]), {"draw_positions": "shape"})
    yield compare(part, whole[4:], {"draw_positions": "of two samples"})


@law("decoder: probabilities sum to 1", tolerance=1e-9)
def decoder_normalizes(process: GaussianProcess) -> Iterator[Gap]:
    """Check that exp(-decode_nll) is a distribution of the clean vector, at t = 0 and t > 0.

    It is summed over the values of the decoder, or integrated over all real numbers. Tolerance
    1e-9: sums over equidistant points are exact to rounding for a Gaussian density.
    """
    for t in times(DECODING_TIMES):
        case = _Decoding(process, t)
        yield compare(case.probability.sum(), 1.0, {"t": t})


@law("decoder: draws follow decode_nll", tolerance=2e-3)
def decode_follows_nll(process: GaussianProcess) -> Iterator[Gap]:
    """Check that `decode` draws from the distribution of `decode_nll`, in every dimension.

    Compared are the means of sine and cosine of (x - y) / w and of half of it, with y the estimate
    and w its deviation. The draws use 4096 equidistant uniforms. Tolerance 2e-3: with values on a
    grid, the mean over 4096 uniforms has an error of 1/4096 for each value.
    """
    u = _midpoints(process.width)
    for t in times(DECODING_TIMES):
        case = _Decoding(process, t)
        query = VectorQuery(case.clean.expand_as(u))
        drawn = process.decode(query, case.zt.expand_as(u), t.expand(len(u)), u)
        for scale in (1.0, 0.5):
            for function in (torch.sin, torch.cos):
                got = function((drawn - case.center) / case.width * scale).mean(0)
                values = function((case.points - case.center) / case.width * scale)
                expected = case.probability @ values
                yield compare(got, expected, {"t": t, "mean of": function.__name__})


@law("draws: one query, of the rows that need a prediction", tolerance=0.0)
def draws_query_once(process: GaussianProcess) -> Iterator[Gap]:
    """Check that `step` queries only the rows with s < t, and `decode` only those with t > 0.

    Each makes at most one query, which is what the number of network evaluations counts. Tolerance
    0: counts and row numbers are integers.
    """
    s = times((0.2, 0.5, 0.0, 0.0))
    t = times((0.7, 0.5, 0.0, 1.0))
    x = vectors(process, 4)
    u = torch.full_like(x, 0.3)
    for name, rows in (("step", [0, 3]), ("decode", [0, 1, 3])):
        query = VectorQuery(x)
        if name == "step":
            process.step(query, x, t, s, u)
        else:
            process.decode(query, x, t, u)
        yield compare(torch.tensor(query.calls), 1.0, {"calls of": name})
        expected = torch.zeros(len(x)).index_fill_(0, torch.tensor(rows), 1.0)
        got = torch.zeros(len(x)).index_fill_(0, query.queried, 1.0)
        yield compare(got, expected, {"rows queried by": name})


@law("draws: a row depends on its own inputs only", tolerance=1e-12)
def draws_are_independent(process: GaussianProcess) -> Iterator[Gap]:
    """Check that draws and terms of the bound of a row are the same in every batch of rows.

    Tolerance 1e-12: a matrix product may round differently for other numbers of rows.
    """
    rows = _rows(process)
    for name, call in _calls(process).items():
        whole = call(rows)
        for chosen in (torch.arange(0, len(whole), 3), torch.arange(len(whole)).flip(0)):
            part = call({key: value[chosen] for key, value in rows.items()})
            yield compare(part, whole[chosen], {"result of": name}, relative_to=_scale(whole))


@law("draws: arguments are not modified", tolerance=0.0)
def arguments_are_unchanged(process: GaussianProcess) -> Iterator[Gap]:
    """Check that no member of the process writes into its arguments.

    Tolerance 0: the arguments must be bitwise unchanged.
    """
    rows = _rows(process)
    before = copy.deepcopy(rows)
    for name, call in _calls(process).items():
        call(rows)
        for key, value in rows.items():
            yield compare(value, before[key], {"argument": key, "after": name})


# ------------------------------------------------------------------ inputs


class _Decoding:
    """One row to decode at a time t, and all clean vectors with their probabilities.

    Attributes:
        zt, clean: state and prediction [1,d].
        center, width: estimate [d] of the clean vector, and its deviation.
        points: clean vectors [m,d], and `probability` [m] of each, with the volume of its cell.
    """

    def __init__(self, process: GaussianProcess, t: Tensor) -> None:
        time = t.reshape(1)
        a, sigma = process.signal(time), process.deviation(time)
        self.zt = a * vectors(process, 1) + 0.4 * sigma
        self.clean = vectors(process, 2)[1:]
        is_first = bool(t == 0)
        self.center = (self.zt / a if is_first else self.clean)[0]
        self.width = float(sigma / a) if is_first else float((1.0 + process.snr(time)).rsqrt())
        values = process.decoder.values
        cell = 1.0
        if values is None:
            place = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
            step = self.width * float(place[1] - place[0])
            cell = step**process.width
            axes = [center + self.width * place for center in self.center]
        else:
            axes = [values] * process.width
        self.points = torch.stack(product(*axes), -1)
        count = len(self.points)
        prediction = PredictedMean(self.clean.expand(count, -1))
        nll = process.decode_nll(
            prediction, self.points, self.zt.expand(count, -1), time.expand(count)
        )
        self.probability = (-nll).exp() * cell


def _normal_uniforms(width: int) -> tuple[Tensor, Tensor]:
    """Return uniforms [r,width] of Gauss-Hermite nodes, and the weights [r] of the nodes."""
    h, weight = normal_grid(width)
    return torch.special.ndtr(h), weight


def _midpoints(width: int) -> Tensor:
    """Return uniforms [n,width]: equidistant in every dimension, in a different order in each."""
    middle = (torch.arange(MIDPOINTS, dtype=torch.float64) + 0.5) / MIDPOINTS
    order = torch.Generator().manual_seed(1)
    columns = [middle[torch.randperm(MIDPOINTS, generator=order)] for _ in range(width)]
    return torch.stack(columns, -1)


def _moment_gaps(values: Tensor, weight: Tensor, labels: dict) -> Iterator[Gap]:
    """Compare weighted moments of values [r,d] with those of a standard normal vector."""
    yield compare(weight @ values, 0.0, {"moment": "mean", **labels})
    covariance = (weight.unsqueeze(-1) * values).T @ values
    identity = torch.eye(values.shape[-1], dtype=torch.float64)
    yield compare(covariance, identity, {"moment": "covariance", **labels})
    yield compare(weight @ values**4, 3.0, {"moment": "fourth", **labels})


def _rows(process: GaussianProcess) -> dict[str, Tensor]:
    """Return arguments of all members of a process: x0, zt, u, clean [r,d], and s < t [r]."""
    t = times(INNER, ENDS)
    x0 = vectors(process, len(t))
    u = torch.linspace(0.02, 0.97, x0.numel(), dtype=torch.float64).reshape(x0.shape)
    return {"x0": x0, "zt": x0.flip(0) * 0.8, "u": u, "clean": x0 * 0.5, "t": t, "s": 0.4 * t}


def _calls(process: GaussianProcess) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """Return functions of the rows, one for each member that draws or gives a term of the bound."""

    def posterior(rows: dict[str, Tensor]) -> Tensor:
        mean, deviation = process.posterior(rows["clean"], rows["zt"], rows["t"], rows["s"])
        return mean + deviation.unsqueeze(-1)

    def sample(rows: dict[str, Tensor]) -> Tensor:
        return process.sample(rows["x0"], rows["t"], rows["u"])

    def step(rows: dict[str, Tensor]) -> Tensor:
        query = VectorQuery(rows["clean"])
        return process.step(query, rows["zt"], rows["t"], rows["s"], rows["u"])

    def decode(rows: dict[str, Tensor]) -> Tensor:
        return process.decode(VectorQuery(rows["clean"]), rows["zt"], rows["t"], rows["u"])

    def density(rows: dict[str, Tensor]) -> Tensor:
        return process.density(PredictedMean(rows["clean"]), rows["x0"], rows["zt"], rows["t"])

    def decode_nll(rows: dict[str, Tensor]) -> Tensor:
        return process.decode_nll(PredictedMean(rows["clean"]), rows["x0"], rows["zt"], rows["t"])

    def closing_kl(rows: dict[str, Tensor]) -> Tensor:
        return process.closing_kl(PredictedMean(rows["clean"]), rows["x0"], rows["t"])

    def velocity(rows: dict[str, Tensor]) -> Tensor:
        return process.velocity(rows["clean"], rows["zt"], rows["t"])

    functions = (posterior, sample, step, decode, density, decode_nll, closing_kl, velocity)
    return {function.__name__: function for function in functions}


def _scale(values: Tensor) -> Tensor:
    return 1.0 + values.abs().amax()
