"""Laws of the chain run backwards and of what samplers build on it: reverse rates, events, climbing, scores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.oracle import propagate
from ddiff.core.prediction import DenseDistribution, Score
from ddiff.core.process import ForwardProcess, RowFunction
from ddiff.testing.draws import estimate_distribution
from ddiff.testing.probes import (
    INNER,
    ReachableRows,
    TableQuery,
    certain_log_probs,
    grid_of_uniforms,
    integral,
    likelihoods,
    product,
    random_log_probs,
    times,
)
from ddiff.testing.report import Gap, compare, law

SHARES = (0.9, 0.5, 0.05)  # the uniforms whose events are looked at
NEAR = 1e-5  # and how near to each the rate of events is taken


def score_from_distribution(process: ForwardProcess, log_p: Tensor, zt: Tensor, t: Tensor) -> Score:
    """The score that says the same as a law."""
    log_marginal = process.log_marginal(log_p, t)
    return Score(log_marginal - log_marginal.gather(-1, zt.unsqueeze(-1)))


@law("decode: a score is drawn from as it is charged", tolerance=5e-3)
def scores_are_decoded(process: ForwardProcess) -> Iterator[Gap]:
    """The last draw under a score has the law that decode_nll charges for. 2048 even points resolve a probability to
    5e-3."""
    words = torch.arange(process.vocabulary.num_tokens)
    log_p = random_log_probs(len(words), 1, seed=3)
    for t in (0.02, 0.5, 0.97):
        zt = (likelihoods(process, times((t,)))[0].sum(0) > 1e-9).nonzero().squeeze(-1)
        now = torch.full((len(zt),), t, dtype=torch.float64)

        def draw(row: Tensor, u: Tensor, zt: Tensor = zt, now: Tensor = now) -> Tensor:
            def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Tensor:
                asked = row[rows]
                score = score_from_distribution(
                    process, log_p.expand(len(asked), -1), zt[asked], now[asked]
                )
                drawn: Tensor = fn(score, *per_row)
                return drawn

            return process.decode(query, zt[row], now[row], u)

        drawn = estimate_distribution(draw, len(zt), process.uniforms_per_decode, len(words))
        state, x0 = product(zt, words)
        then = torch.full(x0.shape, t, dtype=torch.float64)
        charged = process.decode_nll(
            score_from_distribution(process, log_p.expand(len(x0), -1), state, then),
            x0,
            state,
            then,
        )
        yield compare(drawn, charged.neg().exp().reshape(drawn.shape), {"zt": zt, "t": t})


@law("a perfect score decodes to the posterior", tolerance=1e-12)
def scores_decode_to_posterior(process: ForwardProcess) -> Iterator[Gap]:
    """Tweedie's formula: the distribution of the clean token is s K^-1, K = `from_clean(t)`, so that the last draw is that
    of the distribution which the score comes from, p(x) q_t(z|x) / q_t-bar(z), for every z from t = 1e-6 on.

    Rounding of s is multiplied by `hiding`. Where that is above 1e10 the score says nothing any more; what is decoded then
    is still a distribution.
    """
    inner = times((1e-6, 1e-3), INNER, (0.999, 1.0 - 1e-6, 1.0 - 1e-12, 1.0))
    hidden = condition_number(process, process.clamp_score_time(inner))
    rows = ReachableRows(process, inner, _distributions(process.vocabulary.num_tokens))
    now = process.clamp_score_time(rows.t)
    seen = (
        process.log_marginal(rows.log_p, now)
        .gather(-1, rows.zt.unsqueeze(-1))
        .squeeze(-1)
        .isfinite()
    )
    rows = rows.take(seen)  # no score is relative to a state that cannot be
    place = torch.searchsorted(inner, rows.t)
    score = score_from_distribution(process, rows.log_p, rows.zt, now[seen])
    decoded = process.tweedie(score, rows.t)
    evidence = process.log_likelihood(rows.zt, rows.t)
    got = (decoded + evidence).softmax(-1)
    expected = (rows.log_p + evidence).softmax(-1)
    yield compare(decoded.exp().sum(-1), 1.0, rows.labels)
    readable = hidden[place] < READABLE
    labels = {name: label[readable] for name, label in rows.labels.items()}
    scale = (hidden[place[readable]] / 100.0).clamp(min=1.0).unsqueeze(-1)
    yield compare(got[readable], expected[readable], labels, scale)


def _distributions(num_tokens: int) -> Tensor:
    """Log-distributions of tokens, one of them with impossible tokens."""
    few = torch.zeros(1, num_tokens, dtype=torch.float64)
    few[0, : max(1, num_tokens // 2)] = torch.arange(1, max(1, num_tokens // 2) + 1)
    return torch.cat([random_log_probs(num_tokens), (few / few.sum()).log()])


READABLE = 1e10


def condition_number(process: ForwardProcess, t: Tensor) -> Tensor:
    """[n] by how much the noise of t [n] hides the clean token: the condition number of q_t(z|x) [V,S] for reading p off
    its marginal, columns counting alike."""
    forward = likelihoods(process, t)
    mean = forward.mean(1, keepdim=True)
    scaled = torch.where(mean > 0, forward / torch.where(mean > 0, mean, 1.0), 0.0)
    singular = torch.linalg.svdvals(scaled)
    return singular[:, 0] / singular[:, -1].clamp(min=1e-300)


@law("from clean: row x is the marginal of x", tolerance=1e-9)
def from_clean_is_marginal(process: ForwardProcess) -> Iterator[Gap]:
    """The operator from the clean token to t holds q_t(.|x), with the noise that a process may have at t = 0; it can be
    solved for every distribution of the clean token. Rounding of an elimination, as of transitions."""
    t, x0 = product(times((0.0,), INNER), torch.arange(process.vocabulary.num_tokens))
    distinct, place = t.unique(return_inverse=True)
    expected = likelihoods(process, distinct)[place, x0]
    kernel = process.from_clean(t)
    yield compare(kernel.row(x0), expected, {"x0": x0, "t": t})
    solved = kernel.solve(expected)
    clean = torch.nn.functional.one_hot(x0, process.vocabulary.num_states).double()
    conditioning = torch.linalg.cond(kernel.dense()).unsqueeze(-1)
    solvable = conditioning.squeeze(-1) < READABLE
    scale = (conditioning / 10.0).clamp(min=1.0)
    yield compare(
        solved[solvable], clean[solvable], {"x0": x0[solvable], "t": t[solvable]}, scale[solvable]
    )


@law("override = derived: stay_probability", tolerance=1e-9)
def stay_probability_is_derived(process: ForwardProcess) -> Iterator[Gap]:
    """The probability that z_t is the clean token is that of the marginal. Rounding."""
    t, x0 = product(times(INNER, (0.0, 1.0)), torch.arange(process.vocabulary.num_tokens))
    expected = ForwardProcess.stay_probability(process, x0, t)
    yield compare(process.stay_probability(x0, t), expected, {"x0": x0, "t": t})


@law("reverse rates: flows balance", tolerance=1e-9)
def reverse_flows_balance(process: ForwardProcess) -> Iterator[Gap]:
    """What flows from z to y backwards is what flows from y to z forwards: q_t-bar(z) R[z,y] = q_t-bar(y) Q_t[y,z], under
    a law and under the score that says the same. Relative to the largest flow: rounding."""
    rows = ReachableRows(process, times(INNER))
    marginal = process.log_marginal(rows.log_p, rows.t).exp()
    forward = marginal * process.rates(rows.t).column(rows.zt).scatter(
        -1, rows.zt.unsqueeze(-1), 0.0
    )
    scale = forward.amax(-1, keepdim=True).clamp(min=1.0)
    own = marginal.gather(-1, rows.zt.unsqueeze(-1))
    for prediction in (rows.dist, score_from_distribution(process, rows.log_p, rows.zt, rows.t)):
        yield compare(
            own * process.reverse_rates(prediction, rows.zt, rows.t), forward, rows.labels, scale
        )


@law("reverse rates: they make the density", tolerance=1e-9)
def density_is_of_reverse_rates(process: ForwardProcess) -> Iterator[Gap]:
    """The bound charges sum_y R(y) - R*(y) + R*(y) ln (R*(y)/R(y)), R the law's rates out of z and R* those of the clean
    token. Relative rounding."""
    rows = ReachableRows(process, times(INNER))
    sure = DenseDistribution(
        certain_log_probs(process.vocabulary.num_tokens)[rows.x0], process.vocabulary
    )
    model, truth = (
        process.reverse_rates(prediction, rows.zt, rows.t) for prediction in (rows.dist, sure)
    )
    cross = torch.where(truth > 0, truth * (truth.log() - model.log()), 0.0)
    density = process.density(rows.dist, rows.x0, rows.zt, rows.t)
    scale = 1.0 + density + process.weight(rows.x0, rows.zt, rows.t)
    yield compare((model - truth + cross).sum(-1), density, rows.labels, scale)


@law("reverse rates: they make the posterior", tolerance=1e-6)
def reverse_rates_make_posterior(process: ForwardProcess) -> Iterator[Gap]:
    """For a law that does not depend on z, the chain with these rates, run from t to s, is reverse_log_probs. The 4th-order
    integrator leaves 1e-8."""
    vocabulary = process.vocabulary
    states = torch.arange(vocabulary.num_states)
    log_p = random_log_probs(vocabulary.num_tokens, 1, seed=3)
    possible = likelihoods(process, times((0.5,)))[0].sum(0) > 0

    def backwards(left: Tensor) -> Tensor:
        t, zt = product(1.0 - left, states[possible])
        prediction = DenseDistribution(log_p.expand(len(t), -1), vocabulary)
        matrix = torch.zeros(len(left), len(states), len(states), dtype=torch.float64)
        matrix[:, possible] = process.reverse_rates(prediction, zt, t).reshape(
            len(left), -1, len(states)
        )
        return matrix - torch.diag_embed(matrix.sum(-1))

    s, t = times((0.31, 0.77), (0.1, 0.9)).reshape(-1, 2).T
    moved = propagate(backwards, 1.0 - t, 1.0 - s, len(states), steps=150)[:, possible]
    pair, zt = product(torch.arange(len(s)), states[possible])
    expected = process.reverse_log_probs(log_p.expand(len(pair), -1), zt, t[pair], s[pair]).exp()
    yield compare(moved.reshape(len(pair), -1), expected, {"zt": zt, "s": s[pair], "t": t[pair]})


@law("climb: its law = transition", tolerance=5e-3)
def forward_step_follows_transition(process: ForwardProcess) -> Iterator[Gap]:
    """z_t drawn from z_s has the law P(z_t | z_s), the whole interval included, and is z_s where s = t. 2048 even points
    resolve a probability to 5e-3."""
    states = torch.arange(process.vocabulary.num_states)
    for s, t in ((0.31, 0.77), (0.02, 0.5), (0.5, 1.0), (0.0, 0.97)):
        first, last = (torch.full(states.shape, end, dtype=torch.float64) for end in (s, t))
        draw = lambda row, u: process.forward_step(states[row], first[row], last[row], u)  # noqa: B023, E731
        drawn = estimate_distribution(
            draw, len(states), process.uniforms_per_forward_step, len(states)
        )
        yield compare(
            drawn, process.transition(first, last).row(states), {"zs": states, "s": s, "t": t}
        )
    u = grid_of_uniforms(len(states), process.uniforms_per_forward_step)
    now = torch.full(states.shape, 0.5, dtype=torch.float64)
    yield compare(
        process.forward_step(states, now, now, u), states.double(), {"s = t = 0.5, zs": states}
    )


@law("events: what they do comes at the reverse rates", tolerance=6e-3)
def events_follow_reverse_rates(process: ForwardProcess) -> Iterator[Gap]:
    """Candidates come at a rate g(s), read off event_time; each is taken to y with a probability, and the product is the
    reverse rate to y. As shares of g; 2048 even points resolve a probability to 5e-3.

    Where no event is foreseen, the integral of the rates is at most -ln u.
    """
    if not process.has_events:
        return
    log_p, vocabulary = (
        random_log_probs(process.vocabulary.num_tokens, 1, seed=3),
        process.vocabulary,
    )
    for t in (0.97, 0.5):
        possible = (likelihoods(process, times((t,)))[0].sum(0) > 0).nonzero().squeeze(-1)
        zt, u = product(possible, times(SHARES))
        start = torch.full(u.shape, t, dtype=torch.float64)
        s = process.event_time(zt, start, u)
        yield compare((s < start).double(), 1.0, {"an event before t = ": t, "zt": zt, "u": u})
        yield from _unforeseen(process, log_p, zt[s == 0], u[s == 0], t)
        zt, u, start, s = (values[s > 1e-6] for values in (zt, u, start, s))
        later, sooner = (
            process.event_time(zt, start, u * (1.0 + sign * NEAR)) for sign in (1.0, -1.0)
        )
        candidates = 2.0 * NEAR / (later - sooner)

        def draw(row: Tensor, v: Tensor, zt: Tensor = zt, s: Tensor = s) -> Tensor:
            return process.event(
                TableQuery(log_p.expand(len(row), -1), vocabulary), zt[row], s[row], v
            )

        drawn = estimate_distribution(
            draw, len(zt), process.uniforms_per_event, vocabulary.num_states
        )
        moved = drawn.scatter(-1, zt.unsqueeze(-1), 0.0)
        rates = process.reverse_rates(
            DenseDistribution(log_p.expand(len(zt), -1), vocabulary), zt, s
        )
        yield compare(moved, rates / candidates.unsqueeze(-1), {"zt": zt, "s": s})


def _unforeseen(
    process: ForwardProcess, log_p: Tensor, zt: Tensor, u: Tensor, t: float
) -> Iterator[Gap]:
    """How much more happens between 0 and t than -ln u, where no event is foreseen."""
    states, place = zt.unique(return_inverse=True)

    def leaving(times_: Tensor) -> Tensor:
        time, z = product(times_, states)
        prediction = DenseDistribution(log_p.expand(len(z), -1), process.vocabulary)
        return process.reverse_rates(prediction, z, time).sum(-1).reshape(len(times_), len(states))

    expected = integral(leaving, 1e-9, t)[place]
    yield compare(
        (expected + u.log()).clamp(min=0.0),
        0.0,
        {"nothing foreseen before t = ": t, "zt": zt, "u": u},
    )


@law("events: asked at most once, and only what is shown moves", tolerance=0.0)
def events_query_once(process: ForwardProcess) -> Iterator[Gap]:
    """One network call serves the events of all rows; rows that are not shown to it stay. Counts and states: exactly."""
    if not process.has_events:
        return
    possible = (likelihoods(process, times((0.5,)))[0].sum(0) > 0).nonzero().squeeze(-1)
    zt, point = product(possible, torch.arange(32))
    query = TableQuery(
        random_log_probs(process.vocabulary.num_tokens, 1, seed=3).expand(len(zt), -1),
        process.vocabulary,
    )
    t = torch.full(zt.shape, 0.5, dtype=torch.float64)
    zs = process.event(query, zt, t, grid_of_uniforms(32, process.uniforms_per_event)[point])
    yield compare(torch.tensor(max(query.calls - 1, 0)), 0.0, {"extra calls of": "event"})
    unasked = torch.ones(len(zt), dtype=torch.bool).index_fill(0, query.asked, False)
    yield compare(zs[unasked], zt[unasked].double(), {"a row that was not asked, zt": zt[unasked]})


@law("monotone: reverse moves only reveal", tolerance=0.0)
def monotone_moves_reveal(process: ForwardProcess) -> Iterator[Gap]:
    """Where a process declares it, no reverse rate leads out of a state but to states below it in the tree. Exactly."""
    if not process.is_monotone:
        return
    vocabulary, rows = process.vocabulary, ReachableRows(process, times(INNER))
    states = torch.arange(vocabulary.num_states)
    level, own = vocabulary.level_of(states), vocabulary.level_of(rows.zt).unsqueeze(-1)
    above = vocabulary.ancestor(states.unsqueeze(0), torch.maximum(own, level))
    below = (level < own) & (above == rows.zt.unsqueeze(-1))
    yield compare(
        process.reverse_rates(rows.dist, rows.zt, rows.t).masked_fill(below, 0.0), 0.0, rows.labels
    )


@law("kernels: solve inverts apply", tolerance=1e-9)
def solve_inverts(process: ForwardProcess) -> Iterator[Gap]:
    """x K = v is solved by `transition.solve`. Rounding of an elimination, ten times more for every ten of K's condition
    number above the first."""
    s, t = times((0.31, 0.5), (0.5, 0.77), (0.02, 0.31), (0.5, 0.5)).reshape(-1, 2).T
    kernel = process.transition(s, t)
    vector = random_log_probs(process.vocabulary.num_states, len(s)).exp()
    conditioning = torch.linalg.cond(kernel.dense()).unsqueeze(-1)
    yield compare(
        kernel.solve(kernel.apply(vector)),
        vector,
        {"s": s, "t": t},
        (conditioning / 10.0).clamp(min=1.0),
    )


@law("a score at the ends", tolerance=1e-9)
def scores_at_ends(process: ForwardProcess) -> Iterator[Gap]:
    """A score decodes and closes as the distribution that it comes from, and its weight * divergence is its density.

    Relative rounding. Where the noise of t hides the token, rounding reaches the decoding term multiplied by `hiding`.
    """
    rows = ReachableRows(process, times(INNER))
    score = score_from_distribution(process, rows.log_p, rows.zt, rows.t)
    distinct, place = rows.t.unique(return_inverse=True)
    evidence = likelihoods(process, distinct)[place, :, rows.zt]
    posterior = (rows.log_p + evidence.log()).log_softmax(-1)
    expected = -posterior.gather(-1, rows.x0.unsqueeze(-1)).squeeze(-1)
    nll = process.decode_nll(score, rows.x0, rows.zt, rows.t)
    # a small probability has a large logarithm, and so a large error of it
    hidden = condition_number(process, distinct)[place] * expected.exp()
    readable = hidden < READABLE
    labels = {name: label[readable] for name, label in rows.labels.items()}
    scale = 1.0 + expected + 1e-4 * hidden
    yield compare(nll[readable], expected[readable], labels, scale[readable])
    closing = process.closing_kl(rows.dist, rows.x0, rows.t)
    yield compare(process.closing_kl(score, rows.x0, rows.t), closing, rows.labels)
    density = process.density(score, rows.x0, rows.zt, rows.t)
    weight = process.weight(rows.x0, rows.zt, rows.t)
    divergence = process.divergence(score, rows.x0, rows.zt, rows.t)
    yield compare(weight * divergence, density, rows.labels, 1.0 + density.abs())
