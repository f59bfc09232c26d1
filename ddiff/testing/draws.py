"""Conformance checks of the draws of a process: samples, reverse steps and the final decoding.

A draw is a function from uniforms in the unit cube to states. Its distribution is measured on Sobol
points, which cover the cube evenly, so that the checks are not random. A draw is constant on pieces
of the cube. With n points, the error of a probability is about (number of pieces) * log(n) / n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import ForwardProcess
from ddiff.testing.probes import (
    ENDS,
    INNER,
    STEPS,
    TableQuery,
    grid_of_uniforms,
    likelihoods,
    product,
    random_log_probs,
    times,
)
from ddiff.testing.report import Gap, compare, law

POINTS = 2048

Draw = Callable[[Tensor, Tensor], Tensor]  # (row [n], uniforms [n,dimensions]) -> state [n]


def estimate_distribution(
    draw: Draw,
    rows: int,
    dimensions: int,
    states: int,
) -> Tensor:
    """Return the distributions [rows,states] of the states that a function draws at each row.

    Every row uses the same POINTS Sobol points as uniforms.

    Args:
        draw: function (row [n], uniforms [n,dimensions]) -> states [n].
        rows: number of rows.
        dimensions: number of uniforms of one draw.
        states: number of states.
    """
    cube = grid_of_uniforms(POINTS, dimensions)
    row, point = product(
        torch.arange(rows),
        torch.arange(POINTS),
    )
    # every row uses the same points, so that rows can be compared
    drawn = draw(row, cube[point])
    counts = torch.zeros(rows * states, dtype=torch.float64)
    counts.index_add_(
        0,
        row * states + drawn,
        torch.ones(len(row), dtype=torch.float64),
    )
    return counts.reshape(rows, states) / POINTS


def make_query(process: ForwardProcess, rows: int) -> TableQuery:
    """Make a query that predicts the same random distribution at each of `rows` rows.

    A query returns the network's predictions at chosen rows.
    """
    log_p = random_log_probs(
        process.vocabulary.num_tokens,
        1,
        seed=3,
    )
    return TableQuery(
        log_p.expand(rows, -1),
        process.vocabulary,
    )


def possible_states(
    process: ForwardProcess,
    t: float,
    least: float = 0.0,
) -> Tensor:
    """Return the states whose probability at time t, summed over clean tokens, exceeds `least`."""
    total = likelihoods(process, times((t,)))[0].sum(0)
    return (total > least).nonzero().squeeze(-1)


def full_time(like: Tensor, t: float) -> Tensor:
    """Return a float64 tensor of the shape of `like`, filled with the time t."""
    return torch.full(like.shape, t, dtype=torch.float64)


# ------------------------------------------------------------------ distributions of draws


@law("sample: distributed as the marginal", tolerance=5e-3)
def sample_follows_marginal(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `sample(x0, t)` draws the state z_t from the marginal q_t(.|x0).

    `prior.draw` must draw from the prior. The tested times include 0 and 1. Tolerance 5e-3: 2048
    Sobol points resolve a probability to 5e-3.
    """

    def draw(row: Tensor, u: Tensor) -> Tensor:
        return process.sample(x0[row], t[row], u)

    def draw_prior(row: Tensor, u: Tensor) -> Tensor:
        return process.prior.draw(u[:, 0])

    vocabulary = process.vocabulary
    distinct = times(INNER, ENDS)
    x0, t = product(
        torch.arange(vocabulary.num_tokens),
        distinct,
    )
    drawn = estimate_distribution(
        draw,
        len(x0),
        process.uniforms_per_sample,
        vocabulary.num_states,
    )
    # rows are ordered by x0, then t
    expected = likelihoods(process, distinct).transpose(0, 1).reshape(len(x0), -1)
    yield compare(drawn, expected, {"x0": x0, "t": t})
    prior = estimate_distribution(draw_prior, 1, 1, vocabulary.num_states)
    yield compare(
        prior,
        process.prior.log_prob.exp(),
        {"draws of": "the prior"},
    )


@law("step: distributed as the posterior", tolerance=5e-3)
def step_follows_posterior(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `step` from t to s draws z_s from the distribution `reverse_log_probs`.

    The steps include one from t = 1 to s = 0. Tolerance 5e-3: 2048 Sobol points resolve a
    probability to 5e-3.
    """
    for s, t in (*STEPS, (0.0, 1.0), (0.0, 0.31)):
        yield from _step_gaps(process, s, t)


def _step_gaps(
    process: ForwardProcess,
    s: float,
    t: float,
) -> Iterator[Gap]:
    def draw(row: Tensor, u: Tensor) -> Tensor:
        query = TableQuery(log_p.expand(len(row), -1), vocabulary)
        return process.step(
            query,
            zt[row],
            last[row],
            first[row],
            u,
        )

    vocabulary = process.vocabulary
    log_p = random_log_probs(vocabulary.num_tokens, 1, seed=3)
    # a state of probability 0 has no posterior
    marginal = log_p.exp() @ likelihoods(process, times((t,)))[0]
    zt = (marginal[0] > 1e-9).nonzero().squeeze(-1)
    last = full_time(zt, t)
    first = full_time(zt, s)
    drawn = estimate_distribution(
        draw,
        len(zt),
        process.uniforms_per_step,
        vocabulary.num_states,
    )
    expected = process.reverse_log_probs(log_p.expand(len(zt), -1), zt, last, first).exp()
    yield compare(
        drawn,
        expected,
        {"zt": zt, "s": s, "t": t},
    )


@law("decode: distributed by Bayes' rule", tolerance=5e-3)
def decode_follows_bayes(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `decode`, the final sampling step, draws the token x from its posterior given z_t.

    The posterior is p(x) q_t(z_t|x), normalized over x, where p is the prediction. If a process has
    no noise at t = 0 (`closes_at_clean`), `decode` must return the state z_t there. Tolerance 5e-3:
    2048 Sobol points resolve a probability to 5e-3.
    """
    for t in (0.0, 0.02, 0.5, 0.97):
        yield from _decode_gaps(process, t)


def _decode_gaps(
    process: ForwardProcess,
    t: float,
) -> Iterator[Gap]:
    def draw(row: Tensor, u: Tensor) -> Tensor:
        query = TableQuery(log_p.expand(len(row), -1), vocabulary)
        return process.decode(query, zt[row], now[row], u)

    vocabulary = process.vocabulary
    log_p = random_log_probs(vocabulary.num_tokens, 1, seed=3)
    # decoding multiplies the prediction by q_t(z|x)
    joint = log_p.exp().T * likelihoods(process, times((t,)))[0]  # [V,S]
    zt = (joint.sum(0) > 1e-9).nonzero().squeeze(-1)
    now = full_time(zt, t)
    drawn = estimate_distribution(
        draw,
        len(zt),
        process.uniforms_per_decode,
        vocabulary.num_tokens,
    )
    expected = (joint / joint.sum(0)).T[zt]
    yield compare(drawn, expected, {"zt": zt, "t": t})


# ------------------------------------------------------------------ queries


@law("step: queries the network at most once, never if s = t", tolerance=0.0)
def step_queries_once(process: ForwardProcess) -> Iterator[Gap]:
    """Check that a sampling step queries the network at most once, and not at all if s = t.

    Rows that are not queried must keep their states. A step with s = t must change no state.
    Tolerance 0: calls are counted.
    """
    zt, point = product(
        possible_states(process, 0.5),
        torch.arange(64),
    )
    u = grid_of_uniforms(64, process.uniforms_per_step)[point]
    t = full_time(zt, 0.5)
    query = make_query(process, len(zt))
    zs = process.step(query, zt, t, t - 0.2, u)
    extra_calls = torch.tensor(max(query.calls - 1, 0))
    yield compare(extra_calls, 0.0, {"extra calls in a step from 0.5 to": 0.3})
    yield compare_not_queried(query, zs, zt)
    # make a new query, since each query counts its calls
    query = make_query(process, len(zt))
    zs = process.step(query, zt, t, t, u)
    yield compare(
        torch.tensor(query.calls),
        0.0,
        {"calls in a step from 0.5 to": 0.5},
    )
    yield compare(zs, zt.double(), {"s = t = 0.5, zt": zt})


def compare_not_queried(
    query: TableQuery,
    zs: Tensor,
    zt: Tensor,
) -> Gap:
    """Compare the states zs after a step with the states zt before, at rows that were not queried.

    `query` has recorded the rows that were queried.
    """
    others = torch.ones(len(zt), dtype=torch.bool)
    others[query.queried] = False
    labels = {"a row that was not queried, zt": zt[others]}
    return compare(
        zs[others],
        zt[others].double(),
        labels,
    )


@law("decode: queries the network at most once", tolerance=0.0)
def decode_queries_once(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `decode`, the final sampling step, queries the network at most once.

    At t = 0, a process with `closes_at_clean` (all states are clean at t = 0) must not query the
    network. Tolerance 0: calls are counted.
    """
    x0, point = product(
        torch.arange(process.vocabulary.num_tokens),
        torch.arange(16),
    )
    u_sample = grid_of_uniforms(16, process.uniforms_per_sample)[point]
    u_decode = grid_of_uniforms(16, process.uniforms_per_decode)[point]
    for t in (0.0, 0.3):
        now = full_time(x0, t)
        zt = process.sample(x0, now, u_sample)
        query = make_query(process, len(zt))
        process.decode(query, zt, now, u_decode)
        allowed = 0 if process.closes_at_clean and t == 0.0 else 1
        extra_calls = torch.tensor(max(query.calls - allowed, 0))
        yield compare(extra_calls, 0.0, {"extra calls at t": t})


# ------------------------------------------------------------------ independence of rows


class RowDraws(NamedTuple):
    """Methods of a process that draw states, for fixed rows of arguments.

    Each method is a function (row indices [n], uniforms [n,dimensions]) -> states [n]. The fields
    are tokens x0, states zt, times t and predictions log_p, with one entry per row.
    """

    process: ForwardProcess
    x0: Tensor
    zt: Tensor
    t: Tensor
    log_p: Tensor

    def sample(
        self,
        row: Tensor,
        u: Tensor,
    ) -> Tensor:
        return self.process.sample(self.x0[row], self.t[row], u)

    def forward_step(
        self,
        row: Tensor,
        u: Tensor,
    ) -> Tensor:
        return self.process.forward_step(
            self.zt[row],
            self.t[row] * 0.4,
            self.t[row],
            u,
        )

    def step(
        self,
        row: Tensor,
        u: Tensor,
    ) -> Tensor:
        return self.process.step(
            self._query(row),
            self.zt[row],
            self.t[row],
            self.t[row] * 0.4,
            u,
        )

    def decode(
        self,
        row: Tensor,
        u: Tensor,
    ) -> Tensor:
        return self.process.decode(
            self._query(row),
            self.zt[row],
            self.t[row],
            u,
        )

    def _query(self, row: Tensor) -> TableQuery:
        return TableQuery(
            self.log_p[row],
            self.process.vocabulary,
        )


@law("draws: a row depends on its own uniforms only", tolerance=0.0)
def draws_depend_on_own_uniforms(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the state drawn at a row depends only on the uniforms of that row.

    `sample`, `forward_step`, `step` and `decode` must draw the same states in four cases: in a
    second call, in another order of rows, in a smaller batch, and with different uniforms at the
    other rows. Tolerance 0: states are integers.
    """
    num_tokens = process.vocabulary.num_tokens
    x0 = torch.arange(num_tokens).repeat_interleave(24)
    count = len(x0)
    t = times(INNER)[torch.arange(count) % len(INNER)]
    dimensions = {
        "sample": process.uniforms_per_sample,
        "forward_step": process.uniforms_per_forward_step,
        "step": process.uniforms_per_step,
        "decode": process.uniforms_per_decode,
    }
    # the first Sobol point is 0, an unlikely corner of the cube
    u = {name: grid_of_uniforms(count + 1, size)[1:] for name, size in dimensions.items()}
    zt = process.sample(x0, t, u["sample"])
    draws = RowDraws(
        process,
        x0,
        zt,
        t,
        random_log_probs(num_tokens, count, seed=2),
    )
    yield from _batch_gaps("sample", draws.sample, u["sample"])
    yield from _batch_gaps("forward_step", draws.forward_step, u["forward_step"])
    yield from _batch_gaps("step", draws.step, u["step"])
    yield from _batch_gaps("decode", draws.decode, u["decode"])


def _batch_gaps(
    name: str,
    draw: Draw,
    u: Tensor,
) -> Iterator[Gap]:
    every = torch.arange(len(u))
    expected = draw(every, u)

    def gap(
        rows: Tensor,
        drawn: Tensor,
        how: str,
    ) -> Gap:
        return compare(
            drawn,
            expected[rows].double(),
            {"draw": name, "row": rows, "drawn": how},
        )

    yield gap(every, draw(every, u), "again")
    # this is a permutation if 7 does not divide the count
    mixed = (every * 7) % len(u)
    if len(mixed.unique()) == len(mixed):
        yield gap(
            mixed,
            draw(mixed, u[mixed]),
            "in another order",
        )
    some = every[::5]
    yield gap(
        some,
        draw(some, u[some]),
        "in a smaller batch",
    )
    is_even = (every % 2 == 0).unsqueeze(-1)
    changed = torch.where(is_even, u, 1.0 - u - 2.0**-40)  # stays below 1
    even = every[::2]
    yield gap(
        even,
        draw(every, changed)[even],
        "with other uniforms at other rows",
    )


# ------------------------------------------------------------------ arguments


@law("no function modifies its arguments", tolerance=0.0)
def arguments_are_unchanged(process: ForwardProcess) -> Iterator[Gap]:
    """Check that no method of the process modifies a tensor argument in place.

    Arguments are compared with copies that are made before the call. Tolerance 0: the values must
    be identical.
    """
    num_tokens = process.vocabulary.num_tokens
    log_p = random_log_probs(num_tokens, num_tokens)
    for name, (call, arguments) in _calls(process, log_p).items():
        before = [argument.clone() for argument in (*arguments, log_p)]
        call(*arguments)
        for argument, copy in zip((*arguments, log_p), before):
            yield compare(argument, copy.double(), {"modified by": name})


Call = tuple[Callable[..., object], tuple[Tensor, ...]]


def _calls(
    process: ForwardProcess,
    log_p: Tensor,
) -> dict[str, Call]:
    """Return one example call (method, arguments) of each process method that takes tensors.

    The keys are the names of the methods. Every argument has one row per token. `log_p` [V,V]
    contains the predictions.
    """
    x0 = torch.arange(process.vocabulary.num_tokens)
    t = full_time(x0, 0.5)
    # every method is defined at times inside (0, 1)
    s = t * 0.5
    zt = process.sample(
        x0.clone(),
        t,
        grid_of_uniforms(len(x0), process.uniforms_per_sample),
    )
    vector = random_log_probs(process.vocabulary.num_states, len(x0)).exp()
    rates = process.rates(t)
    transition = process.transition(s, t)
    return {
        "log_marginal": (process.log_marginal, (log_p, t)),
        "log_likelihood": (process.log_likelihood, (zt, t)),
        "rates.apply": (rates.apply, (vector,)),
        "rates.column": (rates.column, (zt,)),
        "transition": (process.transition, (s, t)),
        "transition.apply": (transition.apply, (vector,)),
        "transition.solve": (transition.solve, (vector,)),
        "weight": (process.weight, (x0, zt, t)),
        "reverse_log_probs": (process.reverse_log_probs, (log_p, zt, t, s)),
        "active": (process.active, (zt,)),
        "trained_part": (process.trained_part, (zt,)),
        "scope": (process.scope, (zt,)),
        **_calls_with_prediction(process, log_p, x0, zt, t),
        **_calls_with_uniforms(process, log_p, x0, zt, t, s),
    }


def _calls_with_prediction(
    process: ForwardProcess, log_p: Tensor, x0: Tensor, zt: Tensor, t: Tensor
) -> dict[str, Call]:
    prediction = DenseDistribution(log_p, process.vocabulary)
    rows = (x0, zt, t)
    return {
        "density": (partial(process.density, prediction), rows),
        "divergence": (partial(process.divergence, prediction), rows),
        "decode_nll": (partial(process.decode_nll, prediction), rows),
        "reverse_rates": (partial(process.reverse_rates, prediction), (zt, t)),
        "closing_kl": (partial(process.closing_kl, prediction), (x0, t)),
    }


def _calls_with_uniforms(
    process: ForwardProcess, log_p: Tensor, x0: Tensor, zt: Tensor, t: Tensor, s: Tensor
) -> dict[str, Call]:
    query = TableQuery(log_p, process.vocabulary)
    u_sample = grid_of_uniforms(len(x0), process.uniforms_per_sample)
    u_forward = grid_of_uniforms(len(x0), process.uniforms_per_forward_step)
    u_step = grid_of_uniforms(len(x0), process.uniforms_per_step)
    u_decode = grid_of_uniforms(len(x0), process.uniforms_per_decode)
    calls: dict[str, Call] = {
        "sample": (process.sample, (x0, t, u_sample)),
        "forward_step": (process.forward_step, (x0, s, t, u_forward)),
        "step": (partial(process.step, query), (zt, t, s, u_step)),
        "decode": (partial(process.decode, query), (zt, t, u_decode)),
    }
    if process.has_events:
        u_event = grid_of_uniforms(len(x0), process.uniforms_per_event)
        calls["event_time"] = (process.event_time, (zt, t, u_event[:, 0]))
        calls["event"] = (partial(process.event, query), (zt, t, u_event))
    return calls
