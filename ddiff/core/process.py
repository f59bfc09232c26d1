"""Forward process: the interface of a process family, and all formulas derived from it.

A family implements the marginal, the rates and a way to sample. Everything else is derived in this
module by formulas that hold for any continuous-time Markov chain: the transition, the integrand of
the bound, the prior and the decoding term of the bound, the reverse step and the final decoding.
A family may override a derived method for speed or accuracy. The conformance kit then tests that
the override agrees with the derived method, which it calls through the base class:
`ForwardProcess.density(process, ...)`.

Notation:

- Q_t[y,z]: rate from state y to state z.
- q_t(z|x): marginal of z_t given the clean token x.
- q_t-bar(z) = sum_x p(x) q_t(z|x): marginal of z_t if x is drawn from the predicted distribution p.
- s(y) = q_t(y|x) / q_t(z|x): true ratio of state y to the current state z.
- s_theta(y) = q_t-bar(y) / q_t-bar(z): predicted ratio.

Shapes for r rows, V tokens and S states: x0, zt [r] long; t, s [r] float64; log_p [r,V].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from ddiff.core.description import format_settings
from ddiff.core.detour import Detour
from ddiff.core.information import InformationTime, uniform_reference
from ddiff.core.kernel import (
    MAX_DENSE,
    DenseKernel,
    Kernel,
    solve_nearest,
    solve_well_conditioned,
)
from ddiff.core.numerics import (
    FLOOR,
    LATEST,
    draw_index,
    find_rows,
    interior,
    log_normalize,
    may_be_true,
    multiply_by_weight,
    pick,
    safe_log,
    where_or_zero,
)
from ddiff.core.oracle import propagate
from ddiff.core.prediction import DenseDistribution, Prediction, Score, require_distribution
from ddiff.core.rng import CounterRng
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError

States = Literal["tokens", "vectors"]
"""States of the positions of a sample: tokens [B,n], or vectors of d numbers [B,n,d]."""

RowFunction = Callable[..., Any]
"""Function fn(prediction, *values) -> tensor or tuple of tensors, with one entry per row."""


class Query(Protocol):
    """Evaluate the network at some rows (positions) of one noisy state of the batch.

    The network may work in chunks of rows. For each chunk it calls `fn(prediction, *values)`. The
    query returns the results of `fn` in the order of `rows`.

    Args:
        rows: [k] indices of the rows in the flattened [B,L] positions.
        node: [k] node of the tree below which each row needs the predicted distribution.
        fn: function of the prediction of a chunk and of the entries of `per_row` for the chunk.
        per_row: tensors with one entry for each of the k rows.
    """

    def __call__(
        self,
        rows: Tensor,
        node: Tensor,
        fn: RowFunction,
        /,
        *per_row: Tensor,
    ) -> Any: ...


# Number of tokens over which the default of `information` averages. An inaccurate mean only
# increases the variance of the bound.
REFERENCE_TOKENS = 64

# Largest number of entries of marginals in memory at once while the information is computed.
REFERENCE_ENTRIES = 2**21


class TrainedPart(IntEnum):
    """Part of the predicted distribution that receives training signal at a row.

    NONE: no part. BELOW_NODE: only the conditional distribution of the tokens below the row's
    state, a node of the tree. ALL: the whole distribution.
    """

    NONE = 0
    BELOW_NODE = 1
    ALL = 2


class Prior:
    """Distribution of the states from which sampling starts, given by log_prob [S], float64."""

    def __init__(self, log_prob: Tensor) -> None:
        self.log_prob = log_prob.double()

    @classmethod
    def point(cls, state: int, num_states: int) -> Prior:
        """Return the prior with all probability on one state."""
        log_prob = torch.full((num_states,), -torch.inf)
        return cls(log_prob.index_fill(0, torch.tensor([state]), 0.0))

    def __repr__(self) -> str:
        likely = self.log_prob.isfinite().nonzero().flatten().tolist()
        where = f"state {likely[0]}" if len(likely) == 1 else f"{len(likely)} states"
        return f"Prior({where} of {len(self.log_prob)})"

    def draw(self, u: Tensor) -> Tensor:
        """Draw one state for each uniform u in [0,1). The result has the shape of u."""
        weights = self.log_prob.exp().to(u.device)
        # All draws share one cumulative sum, so that no tensor with S entries per draw is made.
        cdf = weights.cumsum(0)
        target = u.contiguous() * cdf[-1]
        drawn = torch.searchsorted(cdf, target, right=True)
        # For u near 1, rounding may lead past the last state with positive probability.
        last_possible = int(weights.nonzero().max())
        return drawn.clamp(max=last_possible)

    def draw_positions(self, rng: CounterRng, channel: str) -> Tensor:
        """Draw one state [B,L] for every position of a batch, from one channel of the generator."""
        return self.draw(rng.uniform(channel))


class ForwardProcess(ABC):
    """Continuous-time Markov chain on the states of one position, started at the clean token.

    Attributes:
        vocabulary: the states.
        prior: distribution of z_1 that sampling starts from.
        closes_at_clean: whether z_0 is the clean token: q_0(.|x) = delta_x.
        closes_at_prior: whether q_1(.|x) = prior for every x.
        exact_step: True if `step` draws from the reverse transition, False if the settings of the
            process replace it by a heuristic.
        uniforms_per_sample: number of uniforms per position that `sample` takes.
        uniforms_per_step: the same number for `step`.
        uniforms_per_decode: the same number for `decode`.
        uniforms_per_forward_step: the same number for `forward_step`.
        uniforms_per_event: the same number for `event`.
        has_events: whether `event_time` and `event` are implemented.
    """

    states: States = "tokens"
    vocabulary: Vocabulary
    prior: Prior
    closes_at_clean: bool = True
    closes_at_prior: bool = True
    exact_step: bool = True
    uniforms_per_sample: int = 1
    uniforms_per_step: int = 1
    uniforms_per_decode: int = 1
    uniforms_per_forward_step: int = 1
    uniforms_per_event: int = 1
    has_events: bool = False

    def __repr__(self) -> str:
        sizes = ""
        # A debugger may print a process whose __init__ has not finished.
        if "vocabulary" in vars(self):
            sizes = " < ".join(map(str, self.vocabulary.level_sizes))
        return f"{type(self).__name__}({sizes}; {', '.join(self._settings())})"

    def _settings(self) -> Iterable[str]:
        """Return the settings that repr shows."""
        return format_settings(self)

    # ------------------------------------------------------------------ implemented by a family

    @abstractmethod
    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        """Return the log-probabilities [r,S] of the states z_t if x0 is drawn from p.

        `log_p` [r,V] is the log of the distribution p of the token.
        """

    @abstractmethod
    def rates(self, t: Tensor) -> Kernel:
        """Return the generator Q_t at times t, which are clamped to [1e-12, 1 - 1e-12]."""

    @abstractmethod
    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw z_t [r] given x0 from uniforms u [r, uniforms_per_sample]."""

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        """Return instances with at most 8 tokens, on which the conformance checks can run."""
        return []

    # ------------------------------------------------------------------ forward, derived

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        """Return log q_t(z_t | x) [r,V] for every token x."""
        num_tokens = self.vocabulary.num_tokens
        num_rows = len(zt)
        identity = torch.eye(num_tokens, dtype=torch.float64, device=zt.device)
        certain = identity.log().repeat(num_rows, 1)
        marginal = self.log_marginal(certain, t.repeat_interleave(num_tokens))
        at_zt = marginal.gather(-1, zt.repeat_interleave(num_tokens).unsqueeze(-1))
        return at_zt.reshape(num_rows, num_tokens)

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        """Return the transition P(z_t | z_s), integrated from the rates."""
        return DenseKernel(propagate(self._dense_rates, s, t, self.vocabulary.num_states))

    def _dense_rates(self, t: Tensor) -> Tensor:
        return self.rates(t).dense()

    def from_clean(self, t: Tensor) -> Kernel:
        """Return the operator from the clean token to z_t: row x is q_t(.|x), for every token x.

        If z_0 is the clean token (`closes_at_clean`), the operator equals `transition(0, t)`. If
        there is already noise at t = 0, the operator also contains this noise, unlike
        `transition(0, t)`, which starts from z_0. Rows of states that are not tokens have no
        meaning; they make the operator square and invertible.
        """
        start = torch.zeros_like(t)
        kernel = self.transition(start, t)
        if self.closes_at_clean:
            return kernel
        num_tokens = self.vocabulary.num_tokens
        identity = torch.eye(num_tokens, dtype=torch.float64, device=t.device)
        certain = identity.log().repeat(len(t), 1)
        tokens = self.log_marginal(certain, t.repeat_interleave(num_tokens)).exp()
        beyond = kernel.dense()[:, num_tokens:]
        tokens = tokens.reshape(len(t), num_tokens, -1)
        return DenseKernel(torch.cat([tokens, beyond], 1))

    def keep_probability(self, t: Tensor) -> Tensor:
        """Return the probability [r] that a token has had no noise until time t.

        Unlike `stay_probability`, it excludes tokens that were redrawn and are the clean token by
        chance. Networks may read it as the noise level sigma = -ln(keep probability). Raises
        ArgumentError if the process does not define it.
        """
        raise ArgumentError(
            f"{type(self).__name__} defines no keep_probability, the probability that a token has "
            "had no noise until time t. Define the method, or use a network that reads t "
            '(backbone ddit: noise = "t").'
        )

    def stay_probability(self, x0: Tensor, t: Tensor) -> Tensor:
        """Return alpha_t = q_t(x | x) [r], the probability that z_t is the clean token x."""
        marginal = self.log_marginal(self._log_one_hot(x0), t)
        return pick(marginal, x0).exp()

    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw z_t given z_s from the forward transition, s <= t, without a network.

        u: [r, uniforms_per_forward_step] uniforms.
        """
        probabilities = self.transition(s, t).row(zs)
        return draw_index(probabilities, u[:, 0])

    # ------------------------------------------------------------------ scores

    def tweedie(self, score: Score, t: Tensor) -> Tensor:
        """Return the float64 log of the clean-token distribution p [r,V] that has the given score.

        p = s K^-1 on tokens. K is `from_clean(t)`, and s holds the ratios of the score, normalized
        over the states. True ratios never give a negative p, but predicted ratios may. Entries of p
        below 1e-14 times the entry of s are raised to this value, so that every probability is
        positive and its logarithm has a gradient. Then p is normalized. Rounding errors of s are
        multiplied by the condition number of K. Components of p that K shrinks to less than 1e-13
        cannot be recovered from s, and p is uniform in these components.
        """
        num_tokens = self.vocabulary.num_tokens
        s = score.log_ratio.double().softmax(-1)
        t = self.clamp_score_time(t)
        times, time_index = t.unique(return_inverse=True)
        kernel = self.from_clean(times)
        if kernel.num_states > MAX_DENSE:
            p = self.from_clean(t).solve(s)[:, :num_tokens]
        else:
            even = torch.full(
                (len(times), num_tokens),
                1.0 / num_tokens,
                dtype=s.dtype,
                device=s.device,
            )
            dense = kernel.dense()
            p = solve_nearest(dense[:, :num_tokens], even, s, time_index)
            p = solve_well_conditioned(dense, s, time_index, p)
        least = FLOOR * s[:, :num_tokens]
        return log_normalize(safe_log(torch.maximum(p, least)))

    def clamp_score_time(self, t: Tensor) -> Tensor:
        """Return `t`, with t = 1 replaced by 1 - 1e-12 if q_1 is the prior for every token.

        At t = 1 a score consists of ratios of the prior, which carry no information on the token.
        """
        return t.clamp(max=LATEST) if self.closes_at_prior else t

    # ------------------------------------------------------------------ the bound

    def density(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return the integrand [r] of the diffusion term of the bound, in nats per unit of t.

        The integrand is the score entropy (arXiv 2310.16834, eq. 5), which holds for any generator:

            density = sum_{y != z} Q[y,z] ( s_theta(y) - s(y) + s(y) ln(s(y)/s_theta(y)) ).

        Q[y,z] is the rate from state y to z = z_t, s(y) = q_t(y|x)/q_t(z|x) the true ratio for x =
        x0, and s_theta(y) the predicted ratio. The density is +inf if the prediction gives
        probability 0 to z_t or to a state from which z_t may have come. The density is 0 if x0 is
        the only token that can have become z_t.
        """
        t = interior(t)
        inward = self._inward_rates(zt, t)
        arrives = inward > 0
        log_s = self._true_log_ratio(x0, zt, t)
        # For states y with Q[y,z] = 0 the ratio may be infinite, with the gradient 0 * inf = NaN.
        log_s_theta = where_or_zero(arrives, self._log_ratio(prediction, zt, t))
        s = log_s.exp()
        cross = torch.where(s > 0, s * (log_s - log_s_theta), 0.0)
        terms = inward * (log_s_theta.exp() - s + cross)
        density = torch.where(arrives, terms, 0.0).sum(-1)
        undefined = density.isnan()
        if not may_be_true(undefined):
            return density
        certain = _is_only_possible_token(self.log_likelihood(zt, t), x0)
        return torch.where(undefined, torch.where(certain, 0.0, torch.inf), density)

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return the total true reverse rate per row [r], sum_{y != z} Q[y,z] s(y).

        Q[y,z] is the rate from state y to z = z_t, and s(y) = q_t(y|x)/q_t(z|x) for x = x0. The
        weight is the factor of the integrand of the bound (`density`) that does not depend on a
        prediction. All families return the same number for the same chain, so a loss that clamps
        weights does not depend on the family. The weight is 0 if the chain never jumps into z_t;
        the density is then 0 too. The weight is 1 if the chain can jump into z_t only from states
        that have probability 0 given x0.
        """
        inward = self._inward_rates(zt, t)
        log_s = self._true_log_ratio(x0, zt, interior(t))
        arrives = inward > 0
        weight = torch.where(arrives, inward * log_s.exp(), 0.0).sum(-1)
        something_arrives = arrives.any(-1)
        return torch.where(weight > 0, weight, something_arrives.to(weight))

    def divergence(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return density / weight [r], the factor of the density that depends on the prediction.

        The density is the integrand of the bound. The result is 0 if density and weight are both 0.
        """
        weight = self.weight(x0, zt, t)
        density = self.density(prediction, x0, zt, t)
        return density / torch.where(weight > 0, weight, 1.0)

    def _weighted_divergence(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return weight * divergence [r], the density of families whose `divergence` is exact."""
        # At weight 0 the divergence may be infinite, and 0 * inf is NaN.
        weight = self.weight(x0, zt, t)
        return multiply_by_weight(weight, self.divergence(prediction, x0, zt, t))

    def decode_nll(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return -ln P(x0 | z_t) per row [r], in nats.

        P(x | z) = p(x) q_t(z|x) / q_t-bar(z) includes the evidence of the row's own state z. Here p
        is the predicted distribution, and q_t-bar(z) the normalization. For a score, p is the
        result of `tweedie`. The value is +inf if the prediction gives x0 probability 0. If x0 is
        the only token that can have become z_t, the value is 0 for every prediction.
        """
        log_likelihood = self.log_likelihood(zt, t)
        log_joint = self._log_clean(prediction, t)
        log_joint = log_joint + log_likelihood.to(log_joint.dtype)
        certain = _is_only_possible_token(log_likelihood, x0)
        finite = pick(log_joint, x0).isfinite()
        # Rows whose result is dropped must not send an infinite gradient back.
        log_joint = where_or_zero((finite & ~certain).unsqueeze(-1), log_joint)
        nll = log_joint.logsumexp(-1) - pick(log_joint, x0)
        return torch.where(certain, 0.0, torch.where(finite, nll, torch.inf))

    def closing_kl(self, prediction: Prediction, x0: Tensor, t: Tensor) -> Tensor:
        """Return KL( q_t(.|x) || q_t-bar ) per row [r], in nats, for the prior term of the bound.

        q_t(.|x) is the true marginal for x = x0, and q_t-bar the marginal for the predicted
        distribution. For a score, q_t-bar is softmax(log_ratio).
        """
        log_q = self.log_marginal(self._log_one_hot(x0), t)
        if isinstance(prediction, Score):
            log_q_theta = prediction.log_ratio.log_softmax(-1)
        else:
            log_q_theta = self.log_marginal(prediction.log_mass(0), t)
        q = log_q.exp()
        terms = q * (log_q - where_or_zero(q > 0, log_q_theta))
        return torch.where(q > 0, terms, 0.0).sum(-1)

    @property
    def has_level_paths(self) -> bool:
        """True if the levels of a position can be reached in different proportions (`along`)."""
        return False

    def along(self, detour: Detour) -> Self:
        """Return the process of r rows whose occupancies leave the path of the level clock.

        The methods of the result take r rows, whose detours are those of `detour`. Only training
        uses them. Raises ArgumentError for a process without several levels above the tokens.
        """
        raise ArgumentError(
            f"{type(self).__name__}.along: occupancies can leave their path only in a tree of two "
            f"or more levels above the tokens; got {self}. Use a time rule without detours."
        )

    def active(self, zt: Tensor) -> Tensor:
        """Return for each row whether its state z_t can add to the bound, bool [r].

        In other states, the integrand of the bound (`density`) is 0.
        """
        return torch.ones_like(zt, dtype=torch.bool)

    def trained_part(self, zt: Tensor) -> Tensor:
        """Return the part of the prediction [r] that gets training signal, a `TrainedPart`."""
        return torch.full_like(zt, TrainedPart.ALL)

    def scope(self, zt: Tensor) -> Tensor:
        """Return for each row the node of the tree below which the prediction is needed.

        The default is the root, so that the whole distribution is predicted.
        """
        return torch.full_like(zt, self.vocabulary.root)

    def closing_scope(self, zt: Tensor) -> Tensor:
        """Return the query node [r] at which `closing_kl` needs the prediction: the root."""
        return torch.full_like(zt, self.vocabulary.root)

    def end_needs_network(self, t: Tensor) -> Tensor:
        """Return bool in the shape of t: whether the end terms at time t need a prediction.

        The end terms are `decode_nll` and `closing_kl`. By default, every position needs one.
        """
        return torch.ones_like(t, dtype=torch.bool)

    # ------------------------------------------------------------------ information

    def information(self, t: Tensor) -> Tensor:
        """Return I(X; Z_t) [n] in nats at times t [n], for X uniform over the tokens.

        The default is the mean over tokens x of KL( q_t(.|x) || q_t-bar ), where q_t-bar is the
        marginal for a uniform prediction. If there are more than 64 tokens, the mean is taken over
        64 evenly spaced tokens. An inaccurate value changes only the variance of estimates of the
        bound, never their mean.
        """
        return self._mean_over_tokens(self._kl_to_uniform, t)

    def _kl_to_uniform(self, x0: Tensor, t: Tensor) -> Tensor:
        """Return KL( q_t(.|x) || q_t-bar ) per row [r].

        q_t-bar is the marginal if the token is uniformly distributed.
        """
        log_p = uniform_reference(self.vocabulary.num_tokens).expand(len(x0), -1)
        return self.closing_kl(DenseDistribution(log_p, self.vocabulary), x0, t)

    def information_lost(self, t: Tensor) -> Tensor:
        """Return I(X; Z_0) - I(X; Z_t) [n] in nats at times t [n] (see `information`).

        A subclass may override this method to keep relative accuracy near t = 0.
        """
        return self.information(torch.zeros_like(t[:1])) - self.information(t)

    def change_probability(self, t: Tensor) -> Tensor:
        """Return P(Z_t != X) [n] at times t [n], for X uniform over the tokens.

        The default implementation computes a mean over at most 64 tokens.
        """
        return self._mean_over_tokens(self._change_probability_of, t)

    def _change_probability_of(self, x0: Tensor, t: Tensor) -> Tensor:
        marginal = self.log_marginal(self._log_one_hot(x0), t)
        # 1 - q_t(x|x), accurate if q_t(x|x) is near 1.
        return -torch.expm1(pick(marginal, x0))

    def _mean_over_tokens(self, values: Callable[[Tensor, Tensor], Tensor], t: Tensor) -> Tensor:
        """Return the mean of values(x, t) over the tokens x for each time, [n].

        If there are more than 64 tokens, the mean is taken over 64 evenly spaced tokens.
        """
        num_tokens = self.vocabulary.num_tokens
        count = min(num_tokens, REFERENCE_TOKENS)
        tokens = torch.linspace(0, num_tokens - 1, count).round().long()
        entries_per_time = len(tokens) * self.vocabulary.num_states
        times_per_chunk = max(1, REFERENCE_ENTRIES // entries_per_time)
        means = []
        for chunk in t.split(times_per_chunk):
            x0 = tokens.repeat(len(chunk))
            each = values(x0, chunk.repeat_interleave(len(tokens)))
            means.append(each.reshape(len(chunk), -1).mean(-1))
        return torch.cat(means)

    @cached_property
    def information_time(self) -> InformationTime:
        """Map from information time (the fraction of information that is lost) to time t."""
        return InformationTime(
            self.information,
            self.information_lost,
            self.change_probability,
        )

    # ------------------------------------------------------------------ reverse, derived

    @property
    def is_monotone(self) -> bool:
        """True if the reversed chain moves only to states below the current state in the tree."""
        return False

    def reverse_rates(self, prediction: Prediction, zt: Tensor, t: Tensor) -> Tensor:
        """Return the rates [r,S] of the reversed chain out of z_t, per unit of t.

        The rate into state y is Q_t[y,z_t] s_theta(y). Q_t[y,z_t] is the forward rate from y to
        z_t, and s_theta(y) the predicted probability of y relative to z_t. The entry at z_t itself
        is 0.
        """
        inward = self._inward_rates(zt, t)
        log_ratio = self._log_ratio(prediction, zt, interior(t))
        return torch.where(inward > 0, inward * log_ratio.exp(), 0.0)

    def reverse_log_probs(
        self,
        log_p: Tensor,
        zt: Tensor,
        t: Tensor,
        s: Tensor,
    ) -> Tensor:
        """Return log P(z_s | z_t) [r,S] if the clean token is drawn from p = exp(log_p).

        P(z_s = y | z_t) = q_s-bar(y) P(z_t | z_s = y) / q_t-bar(z_t), where q_s-bar and q_t-bar are
        the marginals at s and t for the token distribution p.
        """
        arrive = self.transition(s, t).column(zt).to(log_p.dtype)
        joint = self.log_marginal(log_p, s) + arrive.log()
        return joint.log_softmax(-1)

    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw for each row the latest time s < t at which z_t may change, from uniforms u [r].

        The time s is the solution of P(no event in (s,t]) = u. The result is 0 if z_t does not
        change. No network is evaluated.
        """
        raise ArgumentError(self._no_events_message("event_time"))

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw the state after a candidate event at time t; the new state may equal z_t.

        A candidate event is a time at which the state may change. The result [r] has one state per
        row, and u [r, uniforms_per_event] are uniforms. The network is queried at most once.
        """
        raise ArgumentError(self._no_events_message("event"))

    def _no_events_message(self, method: str) -> str:
        return (
            f"{type(self).__name__}.{method}: this process offers no events (has_events is False): "
            "its reverse rate has no bound that is independent of the network. Use a sampler with "
            "steps, such as ancestral or tau-leaping."
        )

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """Draw z_s given z_t from the exact reverse transition.

        u: [r, uniforms_per_step] uniforms. The network is queried at most once. The default queries
        every row with s < t and draws from the probabilities of the S states in float64. The
        overrides of process families first choose the rows that may jump and query the network only
        there.
        """
        return self._replace_rows(query, find_rows(s < t), self._draw_earlier_state, zt, t, s, u)

    def _replace_rows(
        self,
        query: Query,
        rows: Tensor,
        draw: Callable[..., Tensor],
        zt: Tensor,
        *per_row: Tensor,
    ) -> Tensor:
        """Replace z_t by draw(prediction, z_t, *per_row) in `rows`. Other rows are not queried.

        `rows` are indices into `zt` [r] and into the tensors `per_row` [r,...]. If there are none,
        the network is not run.
        """
        drawn = zt.clone()
        if len(rows):
            z = zt[rows]
            values = [value[rows] for value in per_row]
            drawn[rows] = query(rows, self.scope(z), draw, z, *values)
        return drawn

    def _draw_earlier_state(
        self,
        prediction: Prediction,
        zt: Tensor,
        t: Tensor,
        s: Tensor,
        u: Tensor,
    ) -> Tensor:
        dist = require_distribution(prediction, "ForwardProcess.step")
        log_probs = self.reverse_log_probs(dist.log_mass(0), zt, t, s)
        return draw_index(log_probs.exp(), u[:, 0])

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw the clean token x with probability p(x) q_t(z|x) / q_t-bar(z), where z = z_t.

        p is the predicted distribution and q_t-bar(z) the normalization. The evidence q_t(z|x) of
        the row's own state is included. u is [r, uniforms_per_decode].
        """
        if self.closes_at_clean and bool((t == 0.0).all()):
            return zt.clone()
        rows = torch.arange(len(zt), device=zt.device)
        return query(rows, self.scope(zt), self._draw_clean_token, zt, t, u)

    def _draw_clean_token(
        self,
        prediction: Prediction,
        zt: Tensor,
        t: Tensor,
        u: Tensor,
    ) -> Tensor:
        weights = self._log_decode_weights(prediction, zt, t).softmax(-1)
        return draw_index(weights, u[:, 0])

    # ------------------------------------------------------------------ parts of the formulas above

    def _log_one_hot(self, x0: Tensor) -> Tensor:
        """Return the log-probabilities [r,V] of the distribution with all probability on x0."""
        log_p = torch.full(
            (len(x0), self.vocabulary.num_tokens),
            -torch.inf,
            dtype=torch.float64,
            device=x0.device,
        )
        return log_p.scatter(-1, x0.unsqueeze(-1), 0.0)

    def _inward_rates(self, zt: Tensor, t: Tensor) -> Tensor:
        """Return the rates Q_t[y,z_t] [r,S] from each state y into z_t, and 0 at y = z_t."""
        column = self.rates(interior(t)).column(zt)
        return column.scatter(-1, zt.unsqueeze(-1), 0.0)

    def _true_log_ratio(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return the log of the true ratio s(y) = q_t(y|x) / q_t(z|x) of each state y [r,S]."""
        marginal = self.log_marginal(self._log_one_hot(x0), t)
        return _subtract_at(marginal, zt)

    def _log_ratio(self, prediction: Prediction, zt: Tensor, t: Tensor) -> Tensor:
        """Return the log of the predicted ratio s_theta(y) of each state y to z_t, [r,S]."""
        if isinstance(prediction, Score):
            return prediction.log_ratio
        marginal = self.log_marginal(prediction.log_mass(0), t)
        return _subtract_at(marginal, zt)

    def _log_decode_weights(
        self,
        prediction: Prediction,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return the unnormalized log-probabilities [r,V] from which `decode` draws tokens.

        The probability of token x is proportional to p(x) q_t(z_t|x), for the predicted
        distribution p.
        """
        log_p = self._log_clean(prediction, t)
        return log_p + self.log_likelihood(zt, t).to(log_p.dtype)

    def _log_clean(self, prediction: Prediction, t: Tensor) -> Tensor:
        """Return the log of the predicted distribution of the clean token [r,V]."""
        if isinstance(prediction, Score):
            return self.tweedie(prediction, t)
        return prediction.log_mass(0)


def _is_only_possible_token(log_likelihood: Tensor, x0: Tensor) -> Tensor:
    """Return for each row whether x0 is the only token with q_t(z_t|x) > 0, bool [r].

    `log_likelihood` [r,V] holds ln q_t(z_t|x) for every token x.
    """
    possible = log_likelihood > -torch.inf
    is_unique = possible.sum(-1) == 1
    return is_unique & pick(possible, x0)


def _subtract_at(log_values: Tensor, ids: Tensor) -> Tensor:
    """Subtract from each row i of `log_values` [r,S] the entry in the column `ids[i]`."""
    return log_values - log_values.gather(-1, ids.unsqueeze(-1))
