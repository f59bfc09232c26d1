"""Conformance checks of information time, from which noise times of the bound are drawn.

Information time tau is the fraction of the information I(X; Z_t) that is lost by time t, where X is
a uniform token and Z_t its noisy state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.information import TimeChange
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import ForwardProcess
from ddiff.testing.probes import ENDS, INNER, NEAR_ENDS, likelihoods, product, times
from ddiff.testing.report import Gap, compare, law

WINDOWS = ((1e-3, 1.0 - 1e-3), (0.0, 1.0))
TOKENS = 64  # length of the sequence for which times are drawn
OUTER = 0.01  # fraction of the draws at each end that counts as extreme


@law("information: matches the enumerated joint of token and state", tolerance=1e-9)
def information_is_enumerated(process: ForwardProcess) -> Iterator[Gap]:
    """Check the information of a process against an enumeration of tokens and states.

    For a uniform token X and its noisy state Z_t, `information` must be I(X; Z_t),
    `information_lost` must be I(X; Z_0) - I(X; Z_t), and `change_probability` must be P(Z_t != X).
    Tolerance 1e-9: float64 rounding.
    """
    t = times(ENDS, NEAR_ENDS, INNER)
    q = likelihoods(process, t)
    # this is the marginal of Z_t for a uniform token X
    mean = q.mean(1, keepdim=True)
    # 0 ln 0 = 0: a ratio of 1 has logarithm 0
    ratio = torch.where(
        q > 0,
        q / torch.where(mean > 0, mean, 1.0),
        1.0,
    )
    expected = (q * ratio.log()).sum(-1).mean(-1)
    yield compare(process.information(t), expected, {"t": t})
    yield compare(
        process.information_lost(t),
        expected[0] - expected,
        {"t": t},
    )
    stayed = q.diagonal(dim1=-2, dim2=-1).mean(-1)
    yield compare(
        process.change_probability(t),
        1.0 - stayed,
        {"change_probability, t": t},
    )


@law("information time: increasing, with dt/dtau its derivative", tolerance=1e-3)
def clock_is_a_time_change(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the noise time t increases with information time tau, and that dt/dtau is correct.

    The integral of dt/dtau between two values of tau is compared with the difference of t at these
    values. The error is relative to the difference. A wrong derivative would bias every estimate of
    the bound. Tolerance 1e-3: the error of Simpson's rule on 2000 pairs of intervals.
    """
    tau = torch.linspace(0.01, 0.99, 4001, dtype=torch.float64)
    t, speed = process.information_time.at(tau)
    yield compare(
        (t.diff() > 0).double(),
        1.0,
        {"after tau": tau[:-1]},
    )
    spacing = float(tau[1] - tau[0])
    # Simpson's rule on each pair of neighbouring intervals
    integrals = (speed[:-2:2] + 4.0 * speed[1:-1:2] + speed[2::2]) * spacing / 3.0
    moved = t[2::2] - t[:-2:2]
    yield compare(
        integrals,
        moved,
        {"tau": tau[1:-1:2]},
        relative_to=moved,
    )


@law("information time: tau is the fraction of the information lost", tolerance=0.01)
def tau_is_the_share_lost(process: ForwardProcess) -> Iterator[Gap]:
    """Check that tau is the fraction of the information that is lost by time t(tau).

    The information is the mutual information of a uniform token and its noisy state. All
    information that is lost between tau = 0 and tau = 1 counts as 1. Tolerance 0.01: the error of
    interpolation, which affects only the variance of estimates.
    """
    tau = torch.linspace(0.0, 1.0, 41, dtype=torch.float64)
    t, _ = process.information_time.at(tau)
    information = process.information(t)
    lost = (information[0] - information) / (information[0] - information[-1])
    yield compare(lost, tau, {"tau": tau})


@law("bound: extreme noise times hold little of the variance", tolerance=0.4)
def variance_has_no_tail(process: ForwardProcess) -> Iterator[Gap]:
    """Check that extreme noise times contribute at most 40 % of the bound's second moment.

    The second moment is E[(speed * density)^2] for a network that predicts the uniform
    distribution. The noise time t is drawn as a function of a uniform v in [0, 1]
    (`information_time.draw`), the speed is dt/dv, and the density is the integrand of the bound.
    Extreme times are those with v below 0.01 or above 0.99. If they contribute a larger fraction,
    most estimates of the bound miss a few large terms and are too low. Tolerance 0.4: the fraction
    is below 0.35 for every process of ddiff, and it would be between 0.5 and 1 if t were drawn
    uniformly.

    Remedy for a broken law: correct the overridden `information` and `change_probability`, or let
    the window start later.
    """
    for window in WINDOWS:
        share = tail_variance_share(process, process.information_time, window)
        yield compare(share, 0.0, {"window": window})


def tail_variance_share(
    process: ForwardProcess, clock: TimeChange, window: tuple[float, float]
) -> Tensor:
    """Return the fraction of the diffusion term's second moment that lies at extreme noise times.

    `clock.draw` maps a uniform v in [0, 1] to the noise time. The fraction tau of the information
    that is lost at this time runs from `window[0]` to `window[1]`. Extreme times are those with v
    below 0.01 or above 0.99. The result is NaN if the second moment is infinite, and
    `variance_has_no_tail` then fails.
    """
    # cells are fine near the ends, where the integrand may be steep
    edge = torch.linspace(0.0, OUTER, 26, dtype=torch.float64)
    inner = torch.linspace(
        OUTER,
        1.0 - OUTER,
        99,
        dtype=torch.float64,
    )
    edges = torch.cat([edge[:-1], inner, 1.0 - edge.flip(0)[1:]])
    middle = (edges[1:] + edges[:-1]) / 2.0
    t, speed = clock.draw(middle, *window, TOKENS)
    moment = edges.diff() * speed**2 * _mean_square_density(process, t)
    outer = (middle < OUTER) | (middle > 1.0 - OUTER)
    return moment[outer].sum() / moment.sum()


def _mean_square_density(process: ForwardProcess, t: Tensor) -> Tensor:
    """Return E[density^2] [n] at times t [n], for a network that predicts the uniform distribution.

    The density is the integrand of the bound. The expectation is over a uniform clean token x and
    its state z ~ q_t(.|x).
    """
    vocabulary = process.vocabulary
    num_tokens = vocabulary.num_tokens
    time, x0, zt = product(
        torch.arange(len(t)), torch.arange(num_tokens), torch.arange(vocabulary.num_states)
    )
    log_p = torch.full(
        (len(x0), num_tokens),
        -math.log(num_tokens),
        dtype=torch.float64,
    )
    density = process.density(
        DenseDistribution(log_p, vocabulary),
        x0,
        zt,
        t[time],
    )
    probability = likelihoods(process, t).reshape(-1)
    # the density of a state of probability 0 may be infinite
    charged = torch.where(
        probability > 0,
        probability * density**2,
        0.0,
    )
    return charged.reshape(len(t), -1).sum(-1) / num_tokens
