"""Tree family: a position moves from its token to ever coarser nodes; the root is the mask.

One level above the tokens is masked diffusion (arXiv 2406.07524), two levels the hierarchical model
of arXiv 2510.08632. Any number L of levels is possible. Parents may be stochastic: a position that
moves up to level l gets to the parent of its node with probability xi_l. It gets to each of the
other n_l - 1 nodes of level l with probability (1 - xi_l)/(n_l - 1).

Notation:

- pi_l(t): probability of being at level l at time t (`ddiff.core.clock`).
- F_l(t) = sum_{j>=l} pi_j(t): probability of having reached level l.
- anc_j(y): ancestor of node y at level j.
- kappa_ij(y,z): probability of node z if a position moves from node y of level i to level j. It is
  the sum of a part A_ij at the ancestor of y and a remainder r_ij that does not depend on y.
- density: integrand of the bound per unit of time.

Let l be the level of the state z, and y a state one level below z. Then

    kappa_ij(y,z) = A_ij 1[anc_j(y) = z] + r_ij(z)
    q_t(z|x)      = pi_l(t) kappa_0l(x,z)
    density       = (F_l'/pi_l) KL( P(y | z,x) || P(y | z) )

P(y | z,x) is the distribution of y given z and the clean token x. P(y | z) is computed from the
predicted distribution. For xi = 1 the density is (F_l'/pi_l) (-ln P(a_{l-1} | a_l)), where a_l =
anc_l(x). For xi < 1 the density gives a true bound too, unlike the formula of arXiv 2510.08632.

The module holds the process. `ddiff.core.tree_parents` has kappa, `tree_kernel` the rates and
transitions, `tree_divergence` the KL divergence, and `tree_decoding` the draws of P(y | z).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from ddiff.core.clock import CdfClock, LevelClock, LogTimeClock
from ddiff.core.detour import Detour, DetourClock
from ddiff.core.information import uniform_reference
from ddiff.core.kernel import Kernel
from ddiff.core.numerics import (
    draw_index,
    find_rows,
    interior,
    log_normalize,
    pick,
    to_column,
    where_or_zero,
)
from ddiff.core.prediction import DenseDistribution, Prediction, Score, require_distribution
from ddiff.core.process import ForwardProcess, Prior, Query, TrainedPart
from ddiff.core.schedule import PowerSchedule
from ddiff.core.tree_decoding import DECODING, draw_below
from ddiff.core.tree_divergence import kl_below, token_nll
from ddiff.core.tree_kernel import TreeKernel
from ddiff.core.tree_parents import StochasticParents, check_xi
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.errors import ArgumentError, suggest


class TreeProcess(ForwardProcess):
    """Process that moves each position from its token up a vocabulary tree.

    A level clock determines the times of the moves. If xi < 1, a position may move to another node
    than its parent.

    Args:
        vocabulary: at least one level above the tokens.
        clock: distribution of the times at which a position moves up, with as many levels as the
            vocabulary.
        xi: probability that a position moves to its parent in the tree, one number in (0,1] for
            every level with several nodes, or one number per level 1..L.
        decoding: rule by which a step draws states at lower levels if xi < 1: `bayes`, `within`,
            `between` or `free` (see `ddiff.core.tree_decoding`). `bayes` is the exact posterior.
    """

    has_events = True

    def __init__(
        self,
        vocabulary: Vocabulary,
        clock: LevelClock,
        xi: float | Sequence[float] = 1.0,
        decoding: str = "bayes",
    ) -> None:
        self._check_arguments(vocabulary, clock, decoding)
        self.vocabulary = vocabulary
        self.clock = clock
        self.decoding = decoding
        self.parents = StochasticParents(vocabulary, check_xi(xi, vocabulary.num_levels))
        self.prior = Prior.point(vocabulary.root, vocabulary.num_states)
        self.closes_at_clean = clock.closes_at_clean
        self.closes_at_prior = clock.closes_at_prior
        self.uniforms_per_sample = 1 if self.parents.is_deterministic else 2
        self.uniforms_per_forward_step = self.uniforms_per_sample
        self.uniforms_per_step = 2
        self.exact_step = self.parents.is_deterministic or decoding == "bayes"

    def with_clock(self, clock: LevelClock) -> Self:
        """Return the same process with another level clock of as many levels."""
        self._check_arguments(self.vocabulary, clock, self.decoding)
        other = copy(self)
        other.clock = clock
        other.closes_at_clean = clock.closes_at_clean
        other.closes_at_prior = clock.closes_at_prior
        # The copy must not share the information time of the first clock.
        other.__dict__.pop("information_time", None)
        return other

    def keep_probability(self, t: Tensor) -> Tensor:
        return self.clock.pi(t)[:, 0]

    @property
    def has_level_paths(self) -> bool:
        return self.clock.num_levels > 1

    def along(self, detour: Detour) -> Self:
        if not self.has_level_paths:
            return super().along(detour)
        return self.with_clock(DetourClock(self.clock, detour))

    def _settings(self) -> Iterable[str]:
        xi = self.parents.xi
        return [
            f"clock={self.clock!r}",
            f"xi={xi[0] if len(set(xi)) == 1 else xi}",
            f"decoding={self.decoding!r}",
        ]

    @staticmethod
    def _check_arguments(vocabulary: Vocabulary, clock: LevelClock, decoding: str) -> None:
        name = TreeProcess.__name__
        num_levels = vocabulary.num_levels
        if num_levels == 0:
            raise ArgumentError(
                f"{name}: vocabulary must have a mask or more levels; {vocabulary} has tokens "
                "only. Use FlatVocabulary(num_tokens, mask=True)."
            )
        if clock.num_levels != num_levels:
            raise ArgumentError(
                f"{name}: clock must have {num_levels} levels, one per level of {vocabulary} above "
                f"the tokens; got a clock with {clock.num_levels} levels. Make the clock from "
                f"{num_levels} rates or schedules."
            )
        if decoding not in DECODING:
            raise ArgumentError(
                f"{name}: decoding must be one of {', '.join(DECODING)}; got {decoding!r}."
                + suggest(decoding, DECODING)
            )

    # ------------------------------------------------------------------ forward

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        dist = DenseDistribution(log_p, self.vocabulary)
        log_pi = self.clock.pi(t).log()
        levels = []
        for level in range(self.vocabulary.num_levels + 1):
            spread = self.parents.log_spread(0, level, dist.log_mass(level))
            levels.append(to_column(log_pi[:, level], log_p) + spread)
        return torch.cat(levels, -1)

    def rates(self, t: Tensor) -> Kernel:
        return TreeKernel(self.clock.generator(interior(t)), self.parents)

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        return TreeKernel(self.clock.transition(s, t), self.parents)

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw z_t given x0, with uniforms u: first the level, then the node at this level.

        The level is at least l with probability F_l(t) (`LevelClock.cdf`).
        """
        return self.sample_at(x0, self.clock.per_time(self.clock.cdf, t), u)

    def sample_at(self, x0: Tensor, occupancy: Tensor, u: Tensor) -> Tensor:
        """Draw a state per row with given occupancies in place of those of the clock.

        Args:
            x0: [r] clean tokens.
            occupancy: [r,L] probability F_l that the row has reached level l, falling with l.
            u: [r,uniforms_per_sample] uniforms, as for `sample`.
        """
        # F_l falls with l: the number of levels with u < F_l is the level.
        level = (u[:, :1] < occupancy).sum(-1)
        return self.parents.draw(x0, level, u)

    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw z_t given z_s: first the level, then the node at this level.

        From level i, level j is drawn with the probability K_ij(s,t) of `LevelClock.transition`.
        """
        own = self.vocabulary.level_of(zs)
        rows = torch.arange(len(zs), device=zs.device)
        level_weights = self.clock.transition(s, t)[rows, own]
        return self.parents.draw(zs, draw_index(level_weights, u[:, 0]), u)

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        level = self.vocabulary.level_of(zt)
        tokens = torch.arange(self.vocabulary.num_tokens, device=zt.device)
        ancestors = self.vocabulary.ancestor(tokens.unsqueeze(0), level.unsqueeze(-1))
        is_ancestor = ancestors == zt.unsqueeze(-1)
        sure, stray = self.parents.from_tokens(zt)
        kappa = torch.where(is_ancestor, sure.unsqueeze(-1), 0.0)
        kappa = kappa + stray.unsqueeze(-1)
        pi = self._level_probability(zt, t).unsqueeze(-1)
        return (pi * kappa).log()

    def from_clean(self, t: Tensor) -> Kernel:
        """Return the operator from the clean token to z_t.

        Tokens move to level l with probability pi_l(t) (`LevelClock.pi`). The rows of the operator
        for all other states are those of `transition(0, t)`.
        """
        # The clock may keep or share its tensor, so the code writes to a copy.
        levels = self.clock.transition(torch.zeros_like(t), t).clone()
        levels[:, 0] = self.clock.pi(t)
        return TreeKernel(levels, self.parents)

    def stay_probability(self, x0: Tensor, t: Tensor) -> Tensor:
        """Return pi_0(t) [r], the probability of being at level 0, the level of the token."""
        return self._level_probability(x0, t)

    def tweedie(self, score: Score, t: Tensor) -> Tensor:
        """Return the log of the score, normalized over the tokens [r,V].

        Only a position with token x can be at state x. The marginal at tokens is therefore pi_0(t)
        p(x), where pi_0 is the probability of level 0 and p the predicted distribution, and the
        score at tokens is proportional to p.
        """
        at_tokens = score.log_ratio[:, : self.vocabulary.num_tokens]
        return log_normalize(at_tokens.double())

    def _level_probability(self, zt: Tensor, t: Tensor) -> Tensor:
        """Return pi_l(t) [r], the probability of being at level l, where l is the level of z_t."""
        pi = self.clock.per_time(self.clock.pi, t)
        return pick(pi, self.vocabulary.level_of(zt))

    # ------------------------------------------------------------------ the bound

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return the total true reverse rate out of z_t [r], which is 0 at tokens.

        Let l be the level of z_t, pi_l(t) the probability of being at level l, and F_l(t) the
        probability of having reached level l. The rate is F_l'(t) / pi_l(t). The integral of pi_l
        times this rate over t is F_l(1) - F_l(0), which is 1 if all positions are at tokens at
        t = 0 and at the root at t = 1.
        """
        level = self.vocabulary.level_of(zt)
        t = interior(t)
        inflows = self.clock.per_time(self.clock.inflow, t)
        # Column l - 1 holds the flow into level l.
        inflow = pick(inflows, (level - 1).clamp(min=0))
        rate = inflow / self._level_probability(zt, t)
        return torch.where(level > 0, rate, 0.0)

    def divergence(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return KL( P(y | z,x) || P(y | z) ) per row [r]; 0 at tokens.

        y is the state one level below z = z_t from which the position came. P(y | z,x) is the
        distribution of y given the token x = x0. P(y | z) is the distribution of y if the token has
        the predicted distribution.
        """
        if isinstance(prediction, Score):
            return super().divergence(prediction, x0, zt, t)
        return kl_below(self.parents, prediction, x0, zt)

    def density(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        if isinstance(prediction, Score):
            return super().density(prediction, x0, zt, t)
        return self._weighted_divergence(prediction, x0, zt, t)

    def decode_nll(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        if isinstance(prediction, Score):
            return super().decode_nll(prediction, x0, zt, t)
        if self.parents.is_deterministic:
            return -prediction.log_child(zt, x0)
        return token_nll(self.parents, prediction, x0, zt)

    def closing_kl(self, prediction: Prediction, x0: Tensor, t: Tensor) -> Tensor:
        """Return KL( q_t(.|x0) || q_t-bar ) [r]; q_t-bar is the marginal for the prediction.

        If parents are not stochastic, the KL is the sum over levels l of -pi_l(t) ln P(anc_l(x0)).
        pi_l is the probability of level l, and P(anc_l(x0)) the predicted probability of the
        ancestor of x0 at level l.
        """
        if isinstance(prediction, Score) or not self.parents.is_deterministic:
            return super().closing_kl(prediction, x0, t)
        pi = self.clock.pi(t)
        total = torch.zeros_like(t)
        for level in range(self.vocabulary.num_levels):
            share = pi[:, level]
            log_p = prediction.log_prob(self.vocabulary.ancestor(x0, level))
            total = total - share * where_or_zero(share > 0, log_p)
        return total

    def active(self, zt: Tensor) -> Tensor:
        return self.vocabulary.level_of(zt) > 0

    def trained_part(self, zt: Tensor) -> Tensor:
        if self.parents.is_deterministic:
            below_root = TrainedPart.BELOW_NODE
        else:
            below_root = TrainedPart.ALL
        is_root = zt == self.vocabulary.root
        part = torch.where(is_root, int(TrainedPart.ALL), int(below_root))
        return torch.where(self.active(zt), part, int(TrainedPart.NONE))

    def scope(self, zt: Tensor) -> Tensor:
        if not self.parents.is_deterministic:
            return torch.full_like(zt, self.vocabulary.root)
        # At tokens nothing is predicted. If q_0 is not the clean token, the decoding term queries
        # the rows of tokens too, below their parents.
        return torch.where(self.active(zt), zt, self.vocabulary.parent(zt))

    # ------------------------------------------------------------------ information

    def information(self, t: Tensor) -> Tensor:
        """Return I(X; Z_t) [n] in nats, as the sum over levels l of pi_l(t) I(X; node at level l).

        pi_l is the probability of level l, and the node is the state of a position that is at level
        l. The level itself carries no information on the token X.
        """
        return self.clock.pi(t) @ self._level_information

    def information_lost(self, t: Tensor) -> Tensor:
        """Return I(X; Z_0) - I(X; Z_t) [n] in nats, without cancellation near t = 0.

        The result is the sum over levels l of (pi_l(t) - pi_l(0)) (I(X; X) - I(X; node at level
        l)), where pi_l is the probability of level l. If all positions are at tokens at t = 0, no
        term is negative.
        """
        levels = self._level_information
        start = torch.zeros_like(t)
        gained = self.clock.pi(t) - self.clock.pi(start)
        return gained @ (levels[0] - levels)

    def change_probability(self, t: Tensor) -> Tensor:
        return self.clock.cdf(t)[:, 0]

    @cached_property
    def _level_information(self) -> Tensor:
        """I(X; node at level l) in nats for l = 0..L, for X uniform over the tokens.

        The node is the state to which a position at token X moves when it moves to level l.
        """
        reference = uniform_reference(self.vocabulary.num_tokens)
        dist = DenseDistribution(reference, self.vocabulary)
        values = []
        for level in range(self.vocabulary.num_levels + 1):
            mass = dist.log_mass(level)[0].exp()
            values.append(self.parents.node_information(level, mass))
        return torch.stack(values)

    # ------------------------------------------------------------------ reverse

    @property
    def is_monotone(self) -> bool:
        return self.parents.is_deterministic

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """Draw z_s given z_t: first the level, without the network, then the node.

        At time s, the level is i with probability pi_i(s) K_ij(s,t) / pi_j(t), where j is the level
        of z_t, K the clock's transition, and pi_i the probability of level i.
        """
        level = self.vocabulary.level_of(zt)
        num_levels = self.clock.num_levels + 1
        index = level[:, None, None].expand(-1, num_levels, 1)
        arrive = self.clock.transition(s, t).gather(-1, index).squeeze(-1)
        # The level of z_t is certain, so its posterior at s needs no prediction.
        target = draw_index(self.clock.pi(s) * arrive, u[:, 0])
        return self._draw_at_level(query, zt, target, u[:, 1])

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        target = torch.zeros_like(zt)
        return self._descend(
            query,
            zt,
            target,
            self._draw_token_below,
            target,
            t,
            u[:, 0],
        )

    def _draw_token_below(
        self,
        prediction: Prediction,
        zt: Tensor,
        target: Tensor,
        t: Tensor,
        u: Tensor,
    ) -> Tensor:
        if isinstance(prediction, Score):
            weights = self._log_decode_weights(prediction, zt, t).softmax(-1)
            return draw_index(weights, u)
        return draw_below(self.parents, self.decoding, prediction, zt, target, u)

    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw the time at which each row entered its level, without a network.

        An event of the reversed chain moves a row one level down. The rate of events depends only
        on the level clock (`LevelClock.entry_time`).
        """
        level = self.vocabulary.level_of(zt)
        s = torch.zeros_like(t)
        above = find_rows(level > 0)
        if len(above):
            s[above] = self.clock.entry_time(level[above], t[above], u[above])
        return s

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        target = (self.vocabulary.level_of(zt) - 1).clamp(min=0)
        return self._draw_at_level(query, zt, target, u[:, 0])

    def _draw_at_level(
        self,
        query: Query,
        zt: Tensor,
        target: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Draw the state at level `target` [r] given z_t, with the uniforms u [r].

        Rows whose target level is not below the level of z_t keep z_t.
        """
        return self._descend(query, zt, target, self._draw_step_below, target, u)

    def _draw_step_below(
        self,
        prediction: Prediction,
        zt: Tensor,
        target: Tensor,
        u: Tensor,
    ) -> Tensor:
        dist = require_distribution(prediction, "TreeProcess.step")
        return draw_below(self.parents, self.decoding, dist, zt, target, u)

    def _descend(
        self,
        query: Query,
        zt: Tensor,
        target: Tensor,
        draw: Callable[..., Tensor],
        *per_row: Tensor,
    ) -> Tensor:
        """Replace z_t by draw(prediction, z_t, *per_row) in rows that move to a lower level.

        `target` [r] holds the level to which each row moves. Other rows keep their states and are
        not queried.
        """
        moving = find_rows(target < self.vocabulary.level_of(zt))
        return self._replace_rows(query, moving, draw, zt, *per_row)

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        pair = HierarchicalVocabulary([[0, 1, 0, 1, 1]])
        three = HierarchicalVocabulary([[2, 0, 1, 0, 1, 2], [1, 0, 1]])
        powers = CdfClock([PowerSchedule(0.8), PowerSchedule(1.5), PowerSchedule(3.0)])
        return [
            cls(FlatVocabulary(4), LogTimeClock((1.0,))),
            cls(pair, LogTimeClock((0.5, 1.0))),
            cls(pair, LogTimeClock((1.0, 1.0)), xi=0.8),
            cls(three, LogTimeClock((1.0, 1.0001, 0.7)), xi=(0.8, 0.9, 1.0)),
            cls(three, powers, xi=(0.85, 1.0, 1.0)),
        ]
