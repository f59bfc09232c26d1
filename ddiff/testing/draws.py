"""Laws of what is drawn: samples, steps and last draws have the law that the formulas say, and are functions of their
own uniforms alone.

A draw is a map from the unit cube to the states. Its law is measured exactly enough by mapping an even (Sobol) covering of
the cube, so that no test here is random: with n points a probability is off by about (pieces of the map) * log n / n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def estimate_distribution(
    draw: Callable[[Tensor, Tensor], Tensor], rows: int, dimensions: int, states: int
) -> Tensor:
    """[rows, states] the law of draw(which row [n], uniforms [n, dimensions]) over an even covering of the cube."""
    cube = grid_of_uniforms(POINTS, dimensions)
    row, point = product(torch.arange(rows), torch.arange(POINTS))
    drawn = draw(row, cube[point])
    counts = torch.zeros(rows * states, dtype=torch.float64)
    counts.index_add_(0, row * states + drawn, torch.ones(len(row), dtype=torch.float64))
    return counts.reshape(rows, states) / POINTS


@law("sample: its law = marginal", tolerance=5e-3)
def sample_follows_marginal(process: ForwardProcess) -> Iterator[Gap]:
    """z_t drawn from x0 has the law q_t(.|x0), at both ends too. 2048 even points resolve a probability to 5e-3."""
    vocabulary, distinct = process.vocabulary, times(INNER, ENDS)
    x0, t = product(torch.arange(vocabulary.num_tokens), distinct)
    draw = lambda row, u: process.sample(x0[row], t[row], u)  # noqa: E731
    drawn = estimate_distribution(draw, len(x0), process.uniforms_per_sample, vocabulary.num_states)
    expected = likelihoods(process, distinct).transpose(0, 1).reshape(len(x0), -1)
    yield compare(drawn, expected, {"x0": x0, "t": t})
    prior = estimate_distribution(
        lambda row, u: process.prior.draw(u[:, 0]), 1, 1, vocabulary.num_states
    )
    yield compare(prior, process.prior.log_prob.exp(), {"draws of": "the prior"})


@law("step: its law = posterior", tolerance=5e-3)
def step_follows_posterior(process: ForwardProcess) -> Iterator[Gap]:
    """z_s drawn from z_t has the law reverse_log_probs, also in one step from t = 1 to s = 0: a mask becomes a word with
    its true probability. 2048 even points resolve a probability to 5e-3."""
    for s, t in (*STEPS, (0.0, 1.0), (0.0, 0.31)):
        yield from _step_gaps(process, s, t)


def _step_gaps(process: ForwardProcess, s: float, t: float) -> Iterator[Gap]:
    vocabulary = process.vocabulary
    log_p = random_log_probs(vocabulary.num_tokens, 1, seed=3)
    reachable = (log_p.exp() @ likelihoods(process, times((t,)))[0])[0] > 1e-9
    zt = reachable.nonzero().squeeze(-1)
    last, first = (
        torch.full((len(zt),), t, dtype=torch.float64),
        torch.full((len(zt),), s, dtype=torch.float64),
    )

    def draw(row: Tensor, u: Tensor) -> Tensor:
        query = TableQuery(log_p.expand(len(row), -1), vocabulary)
        return process.step(query, zt[row], last[row], first[row], u)

    drawn = estimate_distribution(draw, len(zt), process.uniforms_per_step, vocabulary.num_states)
    expected = process.reverse_log_probs(log_p.expand(len(zt), -1), zt, last, first).exp()
    yield compare(drawn, expected, {"zt": zt, "s": s, "t": t})


@law("decode: its law = Bayes", tolerance=5e-3)
def decode_follows_bayes(process: ForwardProcess) -> Iterator[Gap]:
    """The last draw has the law p(x) q_t(z|x) / q_t-bar(z), the row's own evidence included, and at t = 0 a closed process
    returns the state itself. 2048 even points resolve a probability to 5e-3."""
    vocabulary = process.vocabulary
    log_p = random_log_probs(vocabulary.num_tokens, 1, seed=3)
    for t in (0.0, 0.02, 0.5, 0.97):
        joint = log_p.exp().T * likelihoods(process, times((t,)))[0]
        zt = (joint.sum(0) > 1e-9).nonzero().squeeze(-1)
        now = torch.full((len(zt),), t, dtype=torch.float64)

        def draw(row: Tensor, u: Tensor, zt: Tensor = zt, now: Tensor = now) -> Tensor:
            return process.decode(
                TableQuery(log_p.expand(len(row), -1), vocabulary), zt[row], now[row], u
            )

        drawn = estimate_distribution(
            draw, len(zt), process.uniforms_per_decode, vocabulary.num_tokens
        )
        yield compare(drawn, (joint / joint.sum(0)).T[zt], {"zt": zt, "t": t})


@law("step: asks at most once, and nothing when s = t", tolerance=0.0)
def step_queries_once(process: ForwardProcess) -> Iterator[Gap]:
    """One network call serves a whole step; only rows that are shown to the network may change; a step of no length
    changes nothing and asks nothing. Counts: nothing is allowed."""
    states = torch.arange(process.vocabulary.num_states)
    u = grid_of_uniforms(64, process.uniforms_per_step)
    zt, point = product(states, torch.arange(64))
    possible = likelihoods(process, times((0.5,)))[0].sum(0) > 0
    zt, point = zt[possible[zt]], point[possible[zt]]
    query = _fresh_query(process, len(zt))
    t = torch.full(zt.shape, 0.5, dtype=torch.float64)
    zs = process.step(query, zt, t, t - 0.2, u[point])
    yield compare(
        torch.tensor(max(query.calls - 1, 0)), 0.0, {"extra calls in a step from 0.5 to": 0.3}
    )
    unasked = torch.ones(len(zt), dtype=torch.bool).index_fill(0, query.asked, False)
    yield compare(zs[unasked], zt[unasked].double(), {"a row that was not asked, zt": zt[unasked]})
    query = _fresh_query(process, len(zt))
    zs = process.step(query, zt, t, t, u[point])
    yield compare(torch.tensor(query.calls), 0.0, {"calls in a step from 0.5 to": 0.5})
    yield compare(zs, zt.double(), {"s = t = 0.5, zt": zt})


@law("decode: asks at most once", tolerance=0.0)
def decode_queries_once(process: ForwardProcess) -> Iterator[Gap]:
    """One network call serves the last draw, none when a closed process is read at t = 0. Counts: nothing is allowed."""
    for t in (0.0, 0.3):
        x0, point = product(torch.arange(process.vocabulary.num_tokens), torch.arange(16))
        now = torch.full(x0.shape, t, dtype=torch.float64)
        zt = process.sample(x0, now, grid_of_uniforms(16, process.uniforms_per_sample)[point])
        query = _fresh_query(process, len(zt))
        process.decode(query, zt, now, grid_of_uniforms(16, process.uniforms_per_decode)[point])
        allowed = 0 if process.closes_at_clean and t == 0.0 else 1
        yield compare(torch.tensor(max(query.calls - allowed, 0)), 0.0, {"extra calls at t": t})


@law("a draw depends on its own uniforms only", tolerance=0.0)
def draws_are_their_own(process: ForwardProcess) -> Iterator[Gap]:
    """A row draws the same alone, in any company and again: other rows' uniforms do not reach it. Equal states, exactly."""
    x0 = torch.arange(process.vocabulary.num_tokens).repeat_interleave(24)
    count = len(x0)
    t = times(INNER)[torch.arange(count) % len(INNER)]
    u = {
        name: grid_of_uniforms(count + 1, dimensions)[1:]
        for name, dimensions in (
            ("sample", process.uniforms_per_sample),
            ("step", process.uniforms_per_step),
            ("decode", process.uniforms_per_decode),
            ("climb", process.uniforms_per_forward_step),
        )
    }
    zt = process.sample(x0, t, u["sample"])
    table = random_log_probs(process.vocabulary.num_tokens, count, seed=2)

    def stepped(rows: Tensor, uniforms: Tensor) -> Tensor:
        return process.step(
            TableQuery(table[rows], process.vocabulary), zt[rows], t[rows], t[rows] * 0.4, uniforms
        )

    def decoded(rows: Tensor, uniforms: Tensor) -> Tensor:
        return process.decode(
            TableQuery(table[rows], process.vocabulary), zt[rows], t[rows], uniforms
        )

    draws = {
        "sample": lambda rows, v: process.sample(x0[rows], t[rows], v),
        "climb": lambda rows, v: process.forward_step(zt[rows], t[rows] * 0.4, t[rows], v),
        "step": stepped,
        "decode": decoded,
    }
    for name, draw in draws.items():
        yield from _company_gaps(name, draw, u[name])


def _company_gaps(name: str, draw: Callable[[Tensor, Tensor], Tensor], u: Tensor) -> Iterator[Gap]:
    everybody = torch.arange(len(u))
    together = draw(everybody, u)
    labels = {"draw": name, "row": everybody}
    yield compare(draw(everybody, u), together.double(), {**labels, "drawn": "again"})
    mixed = (everybody * 7) % len(u)
    if len(mixed.unique()) == len(mixed):
        yield compare(
            draw(mixed, u[mixed]), together[mixed].double(), {**labels, "drawn": "in another order"}
        )
    some = everybody[::5]
    yield compare(
        draw(some, u[some]),
        together[some].double(),
        {"draw": name, "row": some, "drawn": "in less company"},
    )
    others = torch.where((everybody % 2 == 0).unsqueeze(-1), u, 1.0 - u - 2.0**-40)
    even = everybody[::2]
    changed = draw(everybody, others)[even]
    yield compare(
        changed,
        together[even].double(),
        {"draw": name, "row": even, "changed": "the others' uniforms"},
    )


@law("no function modifies its arguments", tolerance=0.0)
def arguments_are_untouched(process: ForwardProcess) -> Iterator[Gap]:
    """Every tensor that goes in comes out as it was. Exactly."""
    vocabulary = process.vocabulary
    x0 = torch.arange(vocabulary.num_tokens)
    t = torch.full(x0.shape, 0.5, dtype=torch.float64)
    s = t * 0.5
    u_sample = grid_of_uniforms(len(x0), process.uniforms_per_sample)
    u_step = grid_of_uniforms(len(x0), process.uniforms_per_step)
    u_decode = grid_of_uniforms(len(x0), process.uniforms_per_decode)
    zt = process.sample(x0.clone(), t, u_sample)
    log_p = random_log_probs(vocabulary.num_tokens, len(x0))
    query = TableQuery(log_p, vocabulary)
    prediction = DenseDistribution(log_p, vocabulary)
    u_climb = grid_of_uniforms(len(x0), process.uniforms_per_forward_step)
    u_event = grid_of_uniforms(len(x0), process.uniforms_per_event)
    vector = random_log_probs(vocabulary.num_states, len(x0)).exp()
    calls: dict[str, tuple[Callable, tuple]] = {
        "log_marginal": (process.log_marginal, (log_p, t)),
        "sample": (process.sample, (x0, t, u_sample)),
        "log_likelihood": (process.log_likelihood, (zt, t)),
        "rates.apply": (process.rates(t).apply, (vector,)),
        "rates.column": (process.rates(t).column, (zt,)),
        "transition": (process.transition, (s, t)),
        "transition.apply": (process.transition(s, t).apply, (vector,)),
        "density": (lambda *rows: process.density(prediction, *rows), (x0, zt, t)),
        "weight": (process.weight, (x0, zt, t)),
        "divergence": (lambda *rows: process.divergence(prediction, *rows), (x0, zt, t)),
        "transition.solve": (process.transition(s, t).solve, (vector,)),
        "reverse_rates": (lambda *rows: process.reverse_rates(prediction, *rows), (zt, t)),
        "climb": (process.forward_step, (x0, s, t, u_climb)),
        "reverse_log_probs": (process.reverse_log_probs, (log_p, zt, t, s)),
        "decode_nll": (lambda *rows: process.decode_nll(prediction, *rows), (x0, zt, t)),
        "closing_kl": (lambda *rows: process.closing_kl(prediction, *rows), (x0, t)),
        "active": (process.active, (zt,)),
        "trained_part": (process.trained_part, (zt,)),
        "scope": (process.scope, (zt,)),
        "step": (lambda *rows: process.step(query, *rows), (zt, t, s, u_step)),
        "decode": (lambda *rows: process.decode(query, *rows), (zt, t, u_decode)),
    }
    if process.has_events:
        calls["event_time"] = (process.event_time, (zt, t, u_event[:, 0]))
        calls["event"] = (lambda *rows: process.event(query, *rows), (zt, t, u_event))
    for name, (call, arguments) in calls.items():
        before = [argument.clone() for argument in (*arguments, log_p)]
        call(*arguments)
        for argument, copy in zip((*arguments, log_p), before):
            yield compare(argument, copy.double(), {"modified by": name})


def _fresh_query(process: ForwardProcess, rows: int) -> TableQuery:
    return TableQuery(
        random_log_probs(process.vocabulary.num_tokens, 1, seed=3).expand(rows, -1),
        process.vocabulary,
    )
