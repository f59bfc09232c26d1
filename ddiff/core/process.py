"""The forward process: what a family writes, and everything that follows from it.

A family gives the marginal, the rates and a way to sample; transition, bound density, reverse step, end terms and the
last draw are derived here by formulas that hold for any chain. A derived method may be overridden for speed or accuracy,
and then "override = derived" is a law of the conformance kit (`ForwardProcess.density(process, ...)` is the derived one).

Shapes: x0, zt [r] long; t, s [r] float64; log_p [r,V]; states run over S.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ddiff.core.description import format_settings
from ddiff.core.information import InformationTime, uniform_reference
from ddiff.core.kernel import MAX_DENSE, DenseKernel, Kernel, solve_nearest
from ddiff.core.numerics import (
    FLOOR,
    LATEST,
    draw_index,
    interior,
    log_normalize,
    may_be_true,
    safe_log,
    where_or_zero,
)
from ddiff.core.oracle import propagate
from ddiff.core.prediction import DenseDistribution, Prediction, Score, require_distribution
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError

RowFunction = Callable[..., Any]
"""fn(prediction, *values): a result, or a tuple of results, with one entry per row of the prediction."""


class Query(Protocol):
    """Evaluate the network at some rows of one noisy state.

    `rows` [k] are flat row numbers, `node` [k] the node below which each row needs the predicted
    distribution. The network may answer in chunks: for each chunk it calls `fn(prediction, *values)`,
    `values` being the entries of `per_row` (tensors with k entries each) that belong to the chunk. The
    results come back in the order of `rows`.
    """

    def __call__(self, rows: Tensor, node: Tensor, fn: RowFunction, /, *per_row: Tensor) -> Any: ...


WELL_CONDITIONED = (
    1e4  # condition numbers of an operator that elimination inverts to the last digits
)


REFERENCE_TOKENS = 64  # of which the derived information is the mean: enough for a time change
REFERENCE_ENTRIES = 2**21  # of marginals that are held at once while it is computed


class TrainedPart(IntEnum):
    """What of the law the bound trains at a row in a given state."""

    NONE = 0
    BELOW_NODE = 1
    ALL = 2


class Prior:
    """The law that sampling starts from: log_prob [S] float64."""

    def __init__(self, log_prob: Tensor) -> None:
        self.log_prob = log_prob.double()

    @classmethod
    def point(cls, state: int, num_states: int) -> Prior:
        return cls(torch.full((num_states,), -torch.inf).index_fill(0, torch.tensor([state]), 0.0))

    def __repr__(self) -> str:
        likely = self.log_prob.isfinite().nonzero().flatten().tolist()
        where = f"state {likely[0]}" if len(likely) == 1 else f"{len(likely)} states"
        return f"Prior({where} of {len(self.log_prob)})"

    def draw(self, u: Tensor) -> Tensor:
        """Uniforms of any shape -> states of that shape."""
        weights = self.log_prob.exp().to(u.device)
        cdf = weights.cumsum(
            0
        )  # one for all rows: nothing is as large as u and the states together
        drawn = torch.searchsorted(cdf, u.contiguous() * cdf[-1], right=True)
        return drawn.clamp(max=int(weights.nonzero().max()))


class ForwardProcess(ABC):
    """A continuous-time Markov chain on the states of one position, started at the clean token.

    `closes_at_clean` declares q_0(.|x) = delta_x, `closes_at_prior` declares q_1(.|x) = prior for every x.
    `uniforms_per_sample`, `_step`, `_decode`, `_climb`, `_event` say how many uniforms per position each draw takes;
    `exact_step` is False where a process was asked to step by a heuristic instead of its own reverse transition;
    `has_events` says that `event_time` and `event` are offered.
    """

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
        sizes = (
            " < ".join(map(str, self.vocabulary.level_sizes)) if hasattr(self, "vocabulary") else ""
        )
        return f"{type(self).__name__}({sizes}; {', '.join(self._settings())})"

    def _settings(self) -> Iterable[str]:
        """The settings that the text form shows."""
        return format_settings(self)

    # ------------------------------------------------------------------ what a family writes

    @abstractmethod
    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        """[r,S] log of the law of z_t when x0 ~ p."""

    @abstractmethod
    def rates(self, t: Tensor) -> Kernel:
        """The generator Q_t, read at interior times."""

    @abstractmethod
    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """[r] a draw of z_t given x0 from uniforms u [r, uniforms_per_sample]."""

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        """Small instances on which the conformance kit can run (V <= 8)."""
        return []

    # ------------------------------------------------------------------ derived

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        """[r,V] log q_t(z_t | x) for every x."""
        num_tokens, rows = self.vocabulary.num_tokens, len(zt)
        certain = torch.eye(num_tokens, dtype=torch.float64, device=zt.device).log().repeat(rows, 1)
        marginal = self.log_marginal(certain, t.repeat_interleave(num_tokens))
        return marginal.gather(-1, zt.repeat_interleave(num_tokens).unsqueeze(-1)).reshape(
            rows, num_tokens
        )

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        """P(z_t | z_s), from the rates by the oracle."""
        generator = lambda time: self.rates(time).dense()  # noqa: E731
        return DenseKernel(propagate(generator, s, t, self.vocabulary.num_states))

    def from_clean(self, t: Tensor) -> Kernel:
        """The operator from the clean token to z_t: row x is q_t(.|x), for every token x.

        Equal to `transition(0, t)` where the process closes at the clean end. Where noise does not start at 0,
        `transition(0, t)` goes from z_0, and this operator has the noise of t = 0 in it, too. Rows of states that are not
        tokens only keep the operator invertible.
        """
        kernel = self.transition(torch.zeros_like(t), t)
        if self.closes_at_clean:
            return kernel
        num_tokens = self.vocabulary.num_tokens
        certain = (
            torch.eye(num_tokens, dtype=torch.float64, device=t.device).log().repeat(len(t), 1)
        )
        tokens = self.log_marginal(certain, t.repeat_interleave(num_tokens)).exp()
        beyond = kernel.dense()[:, num_tokens:]
        return DenseKernel(torch.cat([tokens.reshape(len(t), num_tokens, -1), beyond], 1))

    def stay_probability(self, x0: Tensor, t: Tensor) -> Tensor:
        """[r] alpha_t = q_t(x | x), the probability that z_t is the clean token x."""
        return (
            self.log_marginal(self._certain(x0), t).gather(-1, x0.unsqueeze(-1)).squeeze(-1).exp()
        )

    def tweedie(self, score: Score, t: Tensor) -> Tensor:
        """[r,V] float64 log of the distribution p of the clean token whose score this is: p = s K^-1 on tokens.

        K is `from_clean(t)`. What comes out negative, which no true ratio does, is raised to 1e-14 of the token's share
        of s, so that every probability is positive and its logarithm has a gradient; then p is normalised. Rounding of s
        reaches p multiplied by the condition number of K. Directions of p that K has shrunk below 1e-13 cannot be read
        off s: p is even along them.
        """
        num_tokens = self.vocabulary.num_tokens
        s = score.log_ratio.double().softmax(-1)
        t = self.clamp_score_time(t)
        distinct, place = t.unique(return_inverse=True)
        kernel = self.from_clean(distinct)
        if kernel.num_states > MAX_DENSE:
            p = self.from_clean(t).solve(s)[:, :num_tokens]
        else:
            even = torch.full(
                (len(distinct), num_tokens), 1.0 / num_tokens, dtype=s.dtype, device=s.device
            )
            p = solve_nearest(kernel.dense()[:, :num_tokens], even, s, place)
            p = _eliminated(kernel.dense(), s, place, p)
        least = FLOOR * s[:, :num_tokens]
        return log_normalize(safe_log(torch.maximum(p, least)))

    def clamp_score_time(self, t: Tensor) -> Tensor:
        """The times at which scores of t are read: 1 - 1e-12 at t = 1 where the process closes, since the ratios of the
        prior say nothing of the token."""
        return t.clamp(max=LATEST) if self.closes_at_prior else t

    def density(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] nats per unit of the row's own t that the bound charges at (z_t, t).

        l = sum_{y != z} Q[y,z] ( s_theta(y) - s(y) + s(y) ln(s(y)/s_theta(y)) ), with s(y) = q_t(y|x)/q_t(z|x) and
        s_theta(y) the same ratio under x ~ law. Score entropy (arXiv 2310.16834, eq. 5) for any generator. +inf where the
        prediction rules out z_t, or a state that z_t may have come from; 0 where z_t can only have been x0.
        """
        t = interior(t)
        inward = self._inward(zt, t)
        arrives = inward > 0
        log_s = self._true_log_ratio(x0, zt, t)
        # read only where something arrives: elsewhere an infinite ratio has a gradient of 0 * inf
        log_s_theta = where_or_zero(arrives, self._log_ratio(prediction, zt, t))
        s = log_s.exp()
        cross = torch.where(s > 0, s * (log_s - log_s_theta), 0.0)
        density = torch.where(arrives, inward * (log_s_theta.exp() - s + cross), 0.0).sum(-1)
        undefined = density.isnan()
        if not may_be_true(undefined):
            return density
        return torch.where(
            undefined,
            torch.where(_is_only_possible_token(self.log_likelihood(zt, t), x0), 0.0, torch.inf),
            density,
        )

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] the total true reverse rate, sum_{y != z} Q[y,z] s(y): the part of the density that no network enters.

        The same number for the same chain, whatever family it is written in, so that a loss that holds weights in a range
        is the same function. 0 where nothing arrives in z_t and the density is 0; 1 where something may arrive, but for
        this x never does.
        """
        inward = self._inward(zt, t)
        log_s = self._true_log_ratio(x0, zt, interior(t))
        weight = torch.where(inward > 0, inward * log_s.exp(), 0.0).sum(-1)
        return torch.where(weight > 0, weight, (inward > 0).any(-1).to(weight))

    def divergence(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] density / weight, 0 where both are."""
        weight = self.weight(x0, zt, t)
        return self.density(prediction, x0, zt, t) / torch.where(weight > 0, weight, 1.0)

    def reverse_rates(self, prediction: Prediction, zt: Tensor, t: Tensor) -> Tensor:
        """[r,S] the rates out of z_t of the chain run backwards, Q_t[y,z_t] s_theta(y), per unit of t; 0 at z_t itself."""
        inward, log_ratio = self._inward(zt, t), self._log_ratio(prediction, zt, interior(t))
        return torch.where(inward > 0, inward * log_ratio.exp(), 0.0)

    def reverse_log_probs(self, log_p: Tensor, zt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """[r,S] log P(z_s | z_t) when x0 ~ p given the rest: q_s-bar(y) P(z_t | z_s = y) / q_t-bar(z_t)."""
        joint = self.log_marginal(log_p, s) + self.transition(s, t).column(zt).to(log_p.dtype).log()
        return joint.log_softmax(-1)

    def decode_nll(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] -ln P(x0 | z_t) in nats, own evidence included: -ln [ p(x) q_t(z|x) / q_t-bar(z) ]; p of a score is
        `tweedie`.

        +inf where the prediction rules x0 out; 0 where z_t can only have been x0, whatever the prediction.
        """
        log_likelihood = self.log_likelihood(zt, t)
        log_joint = self._log_clean(prediction, t)
        log_joint = log_joint + log_likelihood.to(log_joint.dtype)
        pick = x0.unsqueeze(-1)
        sure = _is_only_possible_token(log_likelihood, x0)
        finite = log_joint.gather(-1, pick).squeeze(-1).isfinite()
        log_joint = where_or_zero((finite & ~sure).unsqueeze(-1), log_joint)
        nll = log_joint.logsumexp(-1) - log_joint.gather(-1, pick).squeeze(-1)
        return torch.where(sure, 0.0, torch.where(finite, nll, torch.inf))

    def closing_kl(self, prediction: Prediction, x0: Tensor, t: Tensor) -> Tensor:
        """[r] KL( q_t(.|x) || law of z_t under x ~ law ) in nats; a score's law of z_t is softmax(log_ratio)."""
        log_q = self.log_marginal(self._certain(x0), t)
        if isinstance(prediction, Score):
            log_q_theta = prediction.log_ratio.log_softmax(-1)
        else:
            log_q_theta = self.log_marginal(prediction.log_mass(0), t)
        q = log_q.exp()
        return torch.where(q > 0, q * (log_q - where_or_zero(q > 0, log_q_theta)), 0.0).sum(-1)

    def information(self, t: Tensor) -> Tensor:
        """[n] I(X; Z_t) in nats for X uniform over the tokens, t [n].

        Derived: the mean of KL( q_t(.|x) || q_t-bar ) over the tokens x, over 64 of them spread evenly if there are
        more. Only the variance of estimates depends on its accuracy, never their mean.
        """
        reference = uniform_reference(self.vocabulary.num_tokens)

        def about(x0: Tensor, t: Tensor) -> Tensor:
            return self.closing_kl(
                DenseDistribution(reference.expand(len(x0), -1), self.vocabulary), x0, t
            )

        return self._over_tokens(about, t)

    def change_probability(self, t: Tensor) -> Tensor:
        """[n] P(Z_t != X) for X uniform over the tokens, t [n]; derived from marginals as `information` is."""

        def away(x0: Tensor, t: Tensor) -> Tensor:
            return -torch.expm1(
                self.log_marginal(self._certain(x0), t).gather(-1, x0.unsqueeze(-1)).squeeze(-1)
            )

        return self._over_tokens(away, t)

    def _over_tokens(self, values: Callable[[Tensor, Tensor], Tensor], t: Tensor) -> Tensor:
        """[n] the mean of values(x, t) over the tokens x, or over 64 of them spread evenly."""
        num_tokens = self.vocabulary.num_tokens
        tokens = torch.linspace(0, num_tokens - 1, min(num_tokens, REFERENCE_TOKENS)).round().long()
        together = max(1, REFERENCE_ENTRIES // (len(tokens) * self.vocabulary.num_states))
        means = []
        for part in t.split(together):
            each = values(tokens.repeat(len(part)), part.repeat_interleave(len(tokens)))
            means.append(each.reshape(len(part), -1).mean(-1))
        return torch.cat(means)

    def information_lost(self, t: Tensor) -> Tensor:
        """[n] I(X; Z_0) - I(X; Z_t) in nats. May be overridden to stay accurate near t = 0."""
        return self.information(torch.zeros_like(t[:1])) - self.information(t)

    @cached_property
    def information_time(self) -> InformationTime:
        """t as a function of the share of the information that is lost: the clock that time rules draw by."""
        return InformationTime(self.information, self.information_lost, self.change_probability)

    def active(self, zt: Tensor) -> Tensor:
        """bool [r]: whether the density can be non-zero in this state."""
        return torch.ones_like(zt, dtype=torch.bool)

    def trained_part(self, zt: Tensor) -> Tensor:
        """[r] `TrainedPart` codes: what of the law the bound trains in this state."""
        return torch.full_like(zt, TrainedPart.ALL)

    def scope(self, zt: Tensor) -> Tensor:
        """[r] the node below which a row's formulas read the law; the root unless a family needs less."""
        return torch.full_like(zt, self.vocabulary.root)

    @property
    def is_monotone(self) -> bool:
        """Whether reverse moves only reveal: out of a state the chain run backwards goes to states below it alone."""
        return False

    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """[r] a draw of z_t given z_s by the forward transition, s <= t; u [r, uniforms_per_forward_step]. No network."""
        return draw_index(self.transition(s, t).row(zs), u[:, 0])

    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """[r] the latest time before t at which something may happen to z_t, 0 where nothing will; u [r]. No network.

        P(none in (s,t]) = u at the s that is returned.
        """
        raise ArgumentError(self._without_events("event_time"))

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """[r] the state after the candidate event at t, maybe z_t; u [r, uniforms_per_event]; visits at most once."""
        raise ArgumentError(self._without_events("event"))

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """[r] z_s given z_t by the exact reverse transition; u [r, uniforms_per_step]; visits at most once.

        Derived: every row with s < t reads its law and one float64 draw over S decides. Families decide first, then visit.
        """
        zs, moving = zt.clone(), (s < t).nonzero().squeeze(-1)
        if len(moving) == 0:
            return zs

        def draw(prediction: Prediction, z: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
            dist = require_distribution(prediction, "ForwardProcess.step")
            log_probs = self.reverse_log_probs(dist.log_mass(0), z, t, s)
            return draw_index(log_probs.exp(), u[:, 0])

        z = zt[moving]
        zs[moving] = query(moving, self.scope(z), draw, z, t[moving], s[moving], u[moving])
        return zs

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """[r] the last draw, x ~ p(x) q_t(z|x) / q_t-bar(z), own evidence included; u [r, uniforms_per_decode]."""

        if self.closes_at_clean and bool((t == 0.0).all()):
            return zt.clone()

        def draw(prediction: Prediction, z: Tensor, t: Tensor, u: Tensor) -> Tensor:
            return draw_index(self._decoding(prediction, z, t).softmax(-1), u[:, 0])

        rows = torch.arange(len(zt), device=zt.device)
        return query(rows, self.scope(zt), draw, zt, t, u)

    # ------------------------------------------------------------------ parts of the formulas above

    def _certain(self, x0: Tensor) -> Tensor:
        """[r,V] log of the law that is sure of x0."""
        log_p = torch.full(
            (len(x0), self.vocabulary.num_tokens), -torch.inf, dtype=torch.float64, device=x0.device
        )
        return log_p.scatter(-1, x0.unsqueeze(-1), 0.0)

    def _inward(self, zt: Tensor, t: Tensor) -> Tensor:
        """[r,S] Q_t[y, z_t] for y != z_t, 0 at z_t."""
        return self.rates(interior(t)).column(zt).scatter(-1, zt.unsqueeze(-1), 0.0)

    def _true_log_ratio(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r,S] log q_t(y|x)/q_t(z|x)."""
        return _relative_to(self.log_marginal(self._certain(x0), t), zt)

    def _log_ratio(self, prediction: Prediction, zt: Tensor, t: Tensor) -> Tensor:
        """[r,S] log s_theta(y), the answer's ratio of the probability of y to that of z_t."""
        if isinstance(prediction, Score):
            return prediction.log_ratio
        return _relative_to(self.log_marginal(prediction.log_mass(0), t), zt)

    def _decoding(self, prediction: Prediction, zt: Tensor, t: Tensor) -> Tensor:
        """[r,V] log of the weights of the last draw, not normalised."""
        log_p = self._log_clean(prediction, t)
        return log_p + self.log_likelihood(zt, t).to(log_p.dtype)

    def _log_clean(self, prediction: Prediction, t: Tensor) -> Tensor:
        """[r,V] log of the predicted distribution of the clean token."""
        return (
            self.tweedie(prediction, t) if isinstance(prediction, Score) else prediction.log_mass(0)
        )

    def _without_events(self, method: str) -> str:
        return (
            f"{type(self).__name__}.{method}: this process offers no events (has_events is False): its reverse rate has no "
            "bound that is free of the network. Use a sampler with steps, such as ancestral or tau-leaping."
        )


def _eliminated(square: Tensor, s: Tensor, place: Tensor, p: Tensor) -> Tensor:
    """[r,V] p, but by elimination where square [n,S,S] is well conditioned.

    Early in time tokens are read off tokens first, and a small probability keeps its relative accuracy, which evidence of
    1/t multiplies.
    """
    well = (torch.linalg.cond(square) < WELL_CONDITIONED).nonzero().squeeze(-1)
    for k in well.tolist():
        rows = (place == k).nonzero().squeeze(-1)
        solved = torch.linalg.solve(square[k].T, s[rows].T).T
        p = p.index_copy(0, rows, solved[:, : p.shape[1]])
    return p


def _is_only_possible_token(log_likelihood: Tensor, x0: Tensor) -> Tensor:
    """bool [r]: only x0 can have become the state whose log q_t(z|x) [r,V] these are."""
    possible = log_likelihood > -torch.inf
    return (possible.sum(-1) == 1) & possible.gather(-1, x0.unsqueeze(-1)).squeeze(-1)


def _relative_to(log_values: Tensor, ids: Tensor) -> Tensor:
    return log_values - log_values.gather(-1, ids.unsqueeze(-1))
