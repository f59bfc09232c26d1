"""Conformance checks of the reverse chain: scores, reverse rates, forward steps and events.

An event is a time at which the reverse chain may change its state (`event_time`, `event`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ddiff.core.oracle import propagate
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import ForwardProcess, RowFunction
from ddiff.testing.derived_formulas import make_certain, score_from_distribution
from ddiff.testing.draws import (
    compare_not_queried,
    estimate_distribution,
    full_time,
    make_query,
    possible_states,
)
from ddiff.testing.probes import (
    INNER,
    ReachableRows,
    TableQuery,
    grid_of_uniforms,
    integral,
    likelihoods,
    likelihoods_by_row,
    product,
    random_log_probs,
    times,
    token_likelihoods,
)
from ddiff.testing.report import Gap, compare, law

UNIFORMS = (0.9, 0.5, 0.05)  # uniforms passed to `event_time`
NEAR = 1e-5  # relative step in u of the difference quotient for the rate of events
READABLE = 1e10  # largest condition number at which a score determines the clean token


# ------------------------------------------------------------------ scores


class ScoreQuery:
    """Query that returns scores instead of the predictions of a network.

    Each row has the score of the same log-distribution log_p [1,V] of the clean token, at its state
    in zt and its time in t.
    """

    def __init__(
        self,
        process: ForwardProcess,
        log_p: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> None:
        self.process = process
        self.log_p = log_p
        self.zt = zt
        self.t = t

    def __call__(self, rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        log_p = self.log_p.expand(len(rows), -1)
        score = score_from_distribution(
            self.process,
            log_p,
            self.zt[rows],
            self.t[rows],
        )
        return fn(score, *per_row)


@law("decode: tokens drawn from a score follow exp(-decode_nll)", tolerance=5e-3)
def scores_are_decoded(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `decode`, given a score, draws tokens x from the distribution exp(-decode_nll(x)).

    `decode` is the final sampling step, and `decode_nll` is the decoding term of the bound.
    Tolerance 5e-3: 2048 Sobol points resolve a probability to 5e-3.
    """
    for t in (0.02, 0.5, 0.97):
        yield from _decoded_score_gaps(process, t)


def _decoded_score_gaps(
    process: ForwardProcess,
    t: float,
) -> Iterator[Gap]:
    def draw(row: Tensor, u: Tensor) -> Tensor:
        query = ScoreQuery(process, log_p, zt[row], now[row])
        return process.decode(query, zt[row], now[row], u)

    tokens = torch.arange(process.vocabulary.num_tokens)
    log_p = random_log_probs(len(tokens), 1, seed=3)
    # a score is relative to the probability of z_t
    zt = possible_states(process, t, least=1e-9)
    now = full_time(zt, t)
    drawn = estimate_distribution(
        draw,
        len(zt),
        process.uniforms_per_decode,
        len(tokens),
    )
    state, x0 = product(zt, tokens)
    then = full_time(x0, t)
    score = score_from_distribution(
        process,
        log_p.expand(len(x0), -1),
        state,
        then,
    )
    charged = process.decode_nll(score, x0, state, then)
    expected = charged.neg().exp().reshape(drawn.shape)
    yield compare(drawn, expected, {"zt": zt, "t": t})


@law("tweedie: an exact score gives the posterior", tolerance=1e-12)
def scores_decode_to_posterior(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `tweedie` recovers the distribution p of the clean token from its score.

    The score s is computed from p. Tweedie's formula is p = s K^-1, where K is the kernel
    `from_clean(t)`. The posterior p(x) q_t(z|x), normalized over x, must be exact for every state z
    at all t >= 1e-6. The error is relative to `condition_number` of K. If the condition number is
    above 1e10, the score carries no information on the token, and `tweedie` is only required to
    return a distribution. Tolerance 1e-12: float64 rounding of s.
    """
    grid = times(
        (1e-6, 1e-3),
        INNER,
        (0.999, 1.0 - 1e-6, 1.0 - 1e-12, 1.0),
    )
    condition = condition_number(process, process.clamp_score_time(grid))
    log_probs = _distributions_with_zeros(process.vocabulary.num_tokens)
    rows = ReachableRows(process, grid, log_probs)
    log_marginal = process.log_marginal(
        rows.log_p,
        process.clamp_score_time(rows.t),
    )
    own = log_marginal.gather(-1, rows.zt.unsqueeze(-1)).squeeze(-1)
    # a score is a ratio to the probability of z_t, which must not be 0
    rows = rows.select(own.isfinite())
    score = score_from_distribution(
        process,
        rows.log_p,
        rows.zt,
        process.clamp_score_time(rows.t),
    )
    decoded = process.tweedie(score, rows.t)
    yield compare(
        decoded.exp().sum(-1),
        1.0,
        rows.labels,
    )

    evidence = process.log_likelihood(rows.zt, rows.t)
    got = (decoded + evidence).softmax(-1)
    expected = (rows.log_p + evidence).softmax(-1)
    condition = condition[torch.searchsorted(grid, rows.t)]
    readable = condition < READABLE
    scale = (condition[readable] / 100.0).clamp(min=1.0).unsqueeze(-1)
    yield compare(
        got[readable],
        expected[readable],
        rows.select(readable).labels,
        relative_to=scale,
    )


def _distributions_with_zeros(num_tokens: int) -> Tensor:
    """Return log-distributions [n,V] over V tokens.

    The last distribution gives half of the tokens probability 0.
    """
    count = max(1, num_tokens // 2)
    weights = torch.zeros(1, num_tokens, dtype=torch.float64)
    weights[0, :count] = torch.arange(1, count + 1)
    return torch.cat([random_log_probs(num_tokens), (weights / weights.sum()).log()])


def condition_number(process: ForwardProcess, t: Tensor) -> Tensor:
    """Return the condition number [n] of recovering the clean token at times t [n].

    The condition number is that of the matrix q_t(z|x) [V,S], after its columns are scaled to equal
    means. A large number means that the noise at time t hides the clean token.
    """
    forward = likelihoods(process, t)
    mean = forward.mean(1, keepdim=True)
    scaled = torch.where(
        mean > 0,
        forward / torch.where(mean > 0, mean, 1.0),
        0.0,
    )
    # singular values are sorted, the largest first
    singular = torch.linalg.svdvals(scaled)
    return singular[:, 0] / singular[:, -1].clamp(min=1e-300)


@law("score: same terms of the bound as its distribution", tolerance=1e-9)
def scores_at_ends(process: ForwardProcess) -> Iterator[Gap]:
    """Check that a score gives the same terms of the bound as the distribution it is computed from.

    The decoding term `decode_nll` and the prior term `closing_kl` of the score must equal those of
    the distribution. For the score, `weight` times `divergence` must equal `density`, the integrand
    of the bound. Errors are relative. The error of `decode_nll` is also relative to
    `condition_number`, which is large if the noise hides the clean token. Tolerance 1e-9: float64
    rounding.
    """
    rows = ReachableRows(process, times(INNER))
    score = score_from_distribution(process, rows.log_p, rows.zt, rows.t)
    evidence = token_likelihoods(process, rows.zt, rows.t)
    posterior = (rows.log_p + evidence.log()).log_softmax(-1)
    expected = -posterior.gather(-1, rows.x0.unsqueeze(-1)).squeeze(-1)
    got = process.decode_nll(score, *rows.args)
    distinct, place = rows.t.unique(return_inverse=True)
    # a small probability has a large logarithm with a large error
    condition = condition_number(process, distinct)[place] * expected.exp()
    readable = condition < READABLE
    scale = 1.0 + expected + 1e-4 * condition
    labels = rows.select(readable).labels
    yield compare(
        got[readable],
        expected[readable],
        labels,
        relative_to=scale[readable],
    )

    closing = process.closing_kl(rows.dist, rows.x0, rows.t)
    yield compare(
        process.closing_kl(score, rows.x0, rows.t),
        closing,
        rows.labels,
    )

    density = process.density(score, *rows.args)
    product_of_factors = process.weight(*rows.args) * process.divergence(score, *rows.args)
    yield compare(
        product_of_factors,
        density,
        rows.labels,
        relative_to=1.0 + density.abs(),
    )


# ------------------------------------------------------------------ operators


@law("from_clean: row x is the marginal of token x", tolerance=1e-9)
def from_clean_is_marginal(process: ForwardProcess) -> Iterator[Gap]:
    """Check that row x of the kernel `from_clean(t)` is the marginal q_t(.|x) of token x.

    If the process has noise at t = 0, the row must include this noise. The kernel's `solve` must
    map q_t(.|x) back to token x, with an error relative to the condition number of the kernel.
    Tolerance 1e-9: float64 rounding of a matrix elimination.
    """
    t, x0 = product(
        times((0.0,), INNER),
        torch.arange(process.vocabulary.num_tokens),
    )
    row = torch.arange(len(x0))
    expected = likelihoods_by_row(process, t)[row, x0]
    kernel = process.from_clean(t)
    yield compare(
        kernel.row(x0),
        expected,
        {"x0": x0, "t": t},
    )
    # solve(q_t(.|x)) must be the one-hot distribution at x
    solved = kernel.solve(expected)
    clean = torch.nn.functional.one_hot(x0, process.vocabulary.num_states).double()
    condition = torch.linalg.cond(kernel.dense())
    solvable = condition < READABLE
    scale = (condition[solvable].unsqueeze(-1) / 10.0).clamp(min=1.0)
    labels = {"x0": x0[solvable], "t": t[solvable]}
    yield compare(solved[solvable], clean[solvable], labels, relative_to=scale)


@law("override = derived: stay_probability", tolerance=1e-9)
def stay_probability_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `stay_probability` is q_t(x|x), the probability that z_t is the clean token x.

    The expected value is computed from the marginal. Tolerance 1e-9: float64 rounding.
    """
    t, x0 = product(
        times(INNER, (0.0, 1.0)),
        torch.arange(process.vocabulary.num_tokens),
    )
    expected = ForwardProcess.stay_probability(process, x0, t)
    yield compare(
        process.stay_probability(x0, t),
        expected,
        {"x0": x0, "t": t},
    )


@law("kernels: solve inverts apply", tolerance=1e-9)
def solve_inverts(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `transition.solve` inverts `transition.apply`.

    For a transition matrix K and a row vector v, solve(v) must return the vector x with x K = v.
    The error is relative to a tenth of the condition number of K. Tolerance 1e-9: float64 rounding
    of a matrix elimination.
    """
    # steps are short, because the transition of a long step cannot be inverted
    s, t = times((0.31, 0.5), (0.5, 0.77), (0.02, 0.31), (0.5, 0.5)).reshape(-1, 2).T
    kernel = process.transition(s, t)
    vector = random_log_probs(process.vocabulary.num_states, len(s)).exp()
    scale = (torch.linalg.cond(kernel.dense()).unsqueeze(-1) / 10.0).clamp(min=1.0)
    yield compare(
        kernel.solve(kernel.apply(vector)),
        vector,
        {"s": s, "t": t},
        relative_to=scale,
    )


# ------------------------------------------------------------------ reverse rates


@law("reverse rates: probability flows balance", tolerance=1e-9)
def reverse_flows_balance(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the reverse flow from state z to y equals the forward flow from state y to z.

    As a formula: q_t(z) R[z,y] = q_t(y) Q_t[y,z]. Here q_t is the marginal under a predicted
    distribution, Q_t are the forward rates, and R are the reverse rates, which are computed from
    the distribution and from its score. The error is relative to the largest flow. Tolerance 1e-9:
    float64 rounding.
    """
    rows = ReachableRows(process, times(INNER))
    own_state = rows.zt.unsqueeze(-1)
    marginal = process.log_marginal(rows.log_p, rows.t).exp()
    rates_into = process.rates(rows.t).column(rows.zt).scatter(-1, own_state, 0.0)
    forward = marginal * rates_into
    scale = forward.amax(-1, keepdim=True).clamp(min=1.0)
    own = marginal.gather(-1, own_state)
    # distribution and score have the same reverse rates
    score = score_from_distribution(process, rows.log_p, rows.zt, rows.t)
    for prediction in (rows.dist, score):
        backward = own * process.reverse_rates(prediction, rows.zt, rows.t)
        yield compare(backward, forward, rows.labels, relative_to=scale)


@law("reverse rates: reproduce the density", tolerance=1e-9)
def reverse_rates_make_density(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `density`, the integrand of the bound, follows from the reverse rates.

    As a formula, the density is the sum over states y of R(y) - R*(y) + R*(y) ln (R*(y)/R(y)). R(y)
    is the reverse rate from state z to y under the prediction, and R*(y) is the reverse rate for
    the true clean token. The error is relative. Tolerance 1e-9: float64 rounding.
    """
    rows = ReachableRows(process, times(INNER))
    model = process.reverse_rates(rows.dist, rows.zt, rows.t)
    truth = process.reverse_rates(
        make_certain(process, rows.x0),
        rows.zt,
        rows.t,
    )
    cross = torch.where(
        truth > 0,
        truth * (truth.log() - model.log()),
        0.0,
    )
    density = process.density(rows.dist, *rows.args)
    scale = 1.0 + density + process.weight(*rows.args)
    yield compare(
        (model - truth + cross).sum(-1),
        density,
        rows.labels,
        relative_to=scale,
    )


@law("reverse rates: reproduce the posterior", tolerance=1e-6)
def reverse_rates_make_posterior(process: ForwardProcess) -> Iterator[Gap]:
    """Check that reverse rates, integrated from t to s, give the probabilities `reverse_log_probs`.

    The check uses a prediction that is the same in all states z, because only then the reverse
    rates and `reverse_log_probs` describe the same chain. Tolerance 1e-6: the 4th-order integrator
    has an error of 1e-8.
    """
    vocabulary = process.vocabulary
    num_states = vocabulary.num_states
    log_p = random_log_probs(vocabulary.num_tokens, 1, seed=3)
    possible = possible_states(process, 0.5)

    def generator(backward_time: Tensor) -> Tensor:
        """Return the generator [n,S,S] of the reverse chain at times t = 1 - backward_time [n].

        The rates out of states that cannot occur are 0.
        """
        count = len(backward_time)
        t, zt = product(1.0 - backward_time, possible)
        prediction = DenseDistribution(log_p.expand(len(t), -1), vocabulary)
        rates = process.reverse_rates(prediction, zt, t)
        matrix = torch.zeros(
            count,
            num_states,
            num_states,
            dtype=torch.float64,
        )
        matrix[:, possible] = rates.reshape(count, -1, num_states)
        return matrix - torch.diag_embed(matrix.sum(-1))

    s, t = times((0.31, 0.77), (0.1, 0.9)).reshape(-1, 2).T
    moved = propagate(generator, 1.0 - t, 1.0 - s, num_states, steps=150)[:, possible]
    pair, zt = product(torch.arange(len(s)), possible)
    expected = process.reverse_log_probs(log_p.expand(len(pair), -1), zt, t[pair], s[pair]).exp()
    labels = {"zt": zt, "s": s[pair], "t": t[pair]}
    yield compare(
        moved.reshape(len(pair), -1),
        expected,
        labels,
    )


@law("monotone: reverse transitions lead only to descendants", tolerance=0.0)
def monotone_moves_reveal(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the reverse rates of a monotone process lead only to states below the current one.

    A process is monotone if it declares `is_monotone`; the check applies only to such processes. A
    state is below another state if it is a descendant of that state in the tree. Tolerance 0: the
    rates to all other states must be exactly 0.
    """
    if not process.is_monotone:
        return
    vocabulary = process.vocabulary
    rows = ReachableRows(process, times(INNER))
    states = torch.arange(vocabulary.num_states)
    level = vocabulary.level_of(states)
    own_level = vocabulary.level_of(rows.zt).unsqueeze(-1)
    ancestor = vocabulary.ancestor(
        states.unsqueeze(0),
        torch.maximum(own_level, level),
    )
    # a state is not a descendant of itself
    below = (level < own_level) & (ancestor == rows.zt.unsqueeze(-1))
    rates = process.reverse_rates(rows.dist, rows.zt, rows.t)
    yield compare(rates.masked_fill(below, 0.0), 0.0, rows.labels)


# ------------------------------------------------------------------ forward steps and events


@law("forward_step: distributed as the transition", tolerance=5e-3)
def forward_step_follows_transition(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `forward_step` from s to t draws z_t from the transition P(z_t | z_s).

    If s = t, `forward_step` must return z_s. Tolerance 5e-3: 2048 Sobol points resolve a
    probability to 5e-3.
    """
    for s, t in ((0.31, 0.77), (0.02, 0.5), (0.5, 1.0), (0.0, 0.97)):
        yield _forward_step_gap(process, s, t)
    states = torch.arange(process.vocabulary.num_states)
    u = grid_of_uniforms(len(states), process.uniforms_per_forward_step)
    now = full_time(states, 0.5)
    stepped = process.forward_step(states, now, now, u)
    yield compare(stepped, states.double(), {"s = t = 0.5, zs": states})


def _forward_step_gap(
    process: ForwardProcess,
    s: float,
    t: float,
) -> Gap:
    def draw(row: Tensor, u: Tensor) -> Tensor:
        return process.forward_step(states[row], first[row], last[row], u)

    states = torch.arange(process.vocabulary.num_states)
    first = full_time(states, s)
    last = full_time(states, t)
    drawn = estimate_distribution(
        draw,
        len(states),
        process.uniforms_per_forward_step,
        len(states),
    )
    expected = process.transition(first, last).row(states)
    return compare(
        drawn,
        expected,
        {"zs": states, "s": s, "t": t},
    )


@law("events: occur at the reverse rates", tolerance=6e-3)
def events_follow_reverse_rates(process: ForwardProcess) -> Iterator[Gap]:
    """Check that events move a state z to a state y at the reverse rate from z to y.

    `event_time` draws the time s of the next candidate event, and candidates occur at a rate g(s).
    `event` turns a candidate into a move to y with some probability. This probability times g(s)
    must be the reverse rate. If `event_time` finds no event for its uniform u, the integral of the
    total reverse rate out of z must be at most -ln u. Errors are relative to g. Tolerance 6e-3:
    2048 Sobol points resolve a probability to 5e-3.
    """
    if not process.has_events:
        return
    log_p = random_log_probs(
        process.vocabulary.num_tokens,
        1,
        seed=3,
    )
    for t in (0.97, 0.5):
        zt, u = product(
            possible_states(process, t),
            times(UNIFORMS),
        )
        start = full_time(u, t)
        s = process.event_time(zt, start, u)
        labels = {"an event before t = ": t, "zt": zt, "u": u}
        yield compare((s < start).double(), 1.0, labels)
        none = s == 0
        yield _no_event_gap(process, log_p, zt[none], u[none], t)
        # the difference quotient is unreliable next to t = 0
        some = s > 1e-6
        yield _event_gap(
            process,
            log_p,
            zt[some],
            s[some],
            u[some],
            start[some],
        )


def _event_gap(
    process: ForwardProcess, log_p: Tensor, zt: Tensor, s: Tensor, u: Tensor, start: Tensor
) -> Gap:
    """Compare the rates at which `event` moves states with the reverse rates.

    Both rates are divided by the rate of candidate events, which `event_time` draws.

    Args:
        log_p: [1,V] predicted log-distribution.
        zt: [r] states.
        s: [r] times of the next event.
        u: [r] uniforms from which `event_time` drew s.
        start: [r] times from which `event_time` started.
    """

    def draw(row: Tensor, v: Tensor) -> Tensor:
        query = TableQuery(log_p.expand(len(row), -1), vocabulary)
        return process.event(query, zt[row], s[row], v)

    vocabulary = process.vocabulary
    # P(no event in (s, start]) = u, so g(s) = d ln u / ds
    later = process.event_time(zt, start, u * (1.0 + NEAR))
    earlier = process.event_time(zt, start, u * (1.0 - NEAR))
    candidate_rate = 2.0 * NEAR / (later - earlier)
    drawn = estimate_distribution(
        draw,
        len(zt),
        process.uniforms_per_event,
        vocabulary.num_states,
    )
    # a rejected candidate leaves the state unchanged and is not an event
    moved = drawn.scatter(-1, zt.unsqueeze(-1), 0.0)
    prediction = DenseDistribution(log_p.expand(len(zt), -1), vocabulary)
    rates = process.reverse_rates(prediction, zt, s)
    return compare(
        moved,
        rates / candidate_rate.unsqueeze(-1),
        {"zt": zt, "s": s},
    )


def _no_event_gap(
    process: ForwardProcess,
    log_p: Tensor,
    zt: Tensor,
    u: Tensor,
    t: float,
) -> Gap:
    """Check that the integral of the reverse rates is at most -ln u in rows without an event.

    In these rows, `event_time` found no event before the time t for the state zt and the uniform u.
    `log_p` [1,V] is the predicted log-distribution.
    """
    states, place = zt.unique(return_inverse=True)

    def leaving(time: Tensor) -> Tensor:
        t, z = product(time, states)
        prediction = DenseDistribution(
            log_p.expand(len(z), -1),
            process.vocabulary,
        )
        rates = process.reverse_rates(prediction, z, t)
        return rates.sum(-1).reshape(len(time), len(states))

    expected = integral(leaving, 1e-9, t)[place]
    excess = (expected + u.log()).clamp(min=0.0)
    return compare(
        excess,
        0.0,
        {"no event found before t = ": t, "zt": zt, "u": u},
    )


@law("events: one query at most, and only queried rows change", tolerance=0.0)
def events_query_once(process: ForwardProcess) -> Iterator[Gap]:
    """Check that `event` queries the network at most once, for all rows together.

    Rows that are not queried must keep their states. Tolerance 0: calls are counted.
    """
    if not process.has_events:
        return
    zt, point = product(
        possible_states(process, 0.5),
        torch.arange(32),
    )
    u = grid_of_uniforms(32, process.uniforms_per_event)[point]
    query = make_query(process, len(zt))
    zs = process.event(query, zt, full_time(zt, 0.5), u)
    extra_calls = torch.tensor(max(query.calls - 1, 0))
    yield compare(extra_calls, 0.0, {"extra calls of": "event"})
    yield compare_not_queried(query, zs, zt)
