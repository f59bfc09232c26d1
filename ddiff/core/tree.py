"""Tree family: a position moves from its token to ever coarser nodes; the root is the mask.

One level above the tokens is masked diffusion (arXiv 2406.07524), two levels the hierarchical model
of arXiv 2510.08632. Any number of levels is possible. Parents may be stochastic: level l is entered
at the own parent with probability xi_l, and at each other of its n_l nodes with probability (1 -
xi_l)/(n_l - 1).

Notation: pi_l(t) is the probability of level l at time t, and F_l(t) = sum_{j>=l} pi_j(t)
(`ddiff.core.clock`). anc_j(y) is the ancestor of y at level j. kappa_ij(y,z) is the probability of
node z when a position moves from node y of level i to level j. kappa is the sum of a part A_ij at
the ancestor of y and a remainder r_ij that does not depend on y:

    kappa_ij(y,z) = A_ij 1[anc_j(y) = z] + r_ij(z)
    q_t(z|x)      = pi_j(t) kappa_0j(x,z)                     j the level of z
    density       = (F_l'/pi_l) KL( P(y | z,x) || P(y | z) )  y one level below z, l the level of z

P(y | z) is computed from the predicted distribution. For xi = 1 and a_l = anc_l(x) the density is

    (F_l'/pi_l) (-ln P(a_{l-1} | a_l)).

The density gives a true bound for xi < 1 too, unlike the published formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from ddiff.core.clock import CdfClock, LevelClock, LogTimeClock
from ddiff.core.information import uniform_reference
from ddiff.core.kernel import Kernel, require_invertible
from ddiff.core.numerics import (
    Constant,
    draw_index,
    evaluate_per_time,
    find_rows,
    interior,
    log_normalize,
    may_be_true,
    pick,
    safe_log,
    to_column,
    where_or_zero,
)
from ddiff.core.prediction import (
    CleanDistribution,
    DenseDistribution,
    Prediction,
    Score,
    require_distribution,
)
from ddiff.core.process import ForwardProcess, Prior, Query, TrainedPart
from ddiff.core.schedule import PowerSchedule
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.errors import ArgumentError, suggest

DECODING = ("bayes", "within", "between", "free")


class StochasticParents:
    """Probabilities kappa_ij of all pairs of levels, computed from the xi of each level.

    A level with a single node has xi = 1. `self.sure[i][j]` is the number A_ij.
    `self.stray[i][j]` is the vector r_ij over the nodes of level j in id order, or None if r_ij is
    zero. `self.is_deterministic` is true if all xi are 1.
    """

    def __init__(self, vocabulary: Vocabulary, xi: Sequence[float]) -> None:
        self.vocabulary = vocabulary
        upper_sizes = vocabulary.level_sizes[1:]
        # At a level with one node that node is the own parent.
        self.xi = tuple(1.0 if n == 1 else float(x) for x, n in zip(xi, upper_sizes))
        self.is_deterministic = all(x == 1.0 for x in self.xi)
        levels = range(vocabulary.num_levels + 1)
        self.sure = [[0.0] * len(levels) for _ in levels]
        self.stray: list[list[Tensor | None]] = [[None] * len(levels) for _ in levels]
        for i in levels:
            self.sure[i][i] = 1.0
            for j in range(i + 1, len(levels)):
                self._add_level(i, j)
        self._stray_constants: list[list[Constant | None]] = []
        for row in self.stray:
            constants = [None if stray is None else Constant(stray) for stray in row]
            self._stray_constants.append(constants)
        tables = [self._table_from_tokens(level) for level in levels]
        self._from_tokens = Constant(torch.cat(tables, 1))

    def _add_level(self, i: int, j: int) -> None:
        """Compute kappa_ij from kappa_i,j-1.

        A distribution p over level j-1 becomes a push(p) + b over the n nodes of level j, where
        push(p) moves the probability of each node to its own parent, b = (1 - xi)/(n - 1) and
        a = xi - b.
        """
        size = self.vocabulary.level_sizes[j]
        xi = self.xi[j - 1]
        b = 0.0 if xi == 1.0 else (1.0 - xi) / (size - 1)
        a = xi - b
        self.sure[i][j] = a * self.sure[i][j - 1]
        below = self.stray[i][j - 1]
        if below is None and b == 0.0:
            return
        pushed = torch.zeros(size, dtype=torch.float64)
        if below is not None:
            pushed.index_add_(0, self.vocabulary.parents[j - 1], below)
        # b is spread evenly over level j, and the remainder of level j-1 moves to the parents.
        self.stray[i][j] = a * pushed + b

    def _table_from_tokens(self, level: int) -> Tensor:
        """Return A_0l and r_0l(z) [2,n] for the n nodes z of a level."""
        stray = self.stray[0][level]
        if stray is None:
            stray = torch.zeros(self.vocabulary.level_sizes[level], dtype=torch.float64)
        sure = torch.full_like(stray, self.sure[0][level])
        return torch.stack([sure, stray])

    def from_tokens(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return A_0l and r_0l(z) per row, for ids z of any level l."""
        sure, stray = self._from_tokens.on(z.device)[:, z]
        return sure, stray

    def entry(
        self,
        i: int,
        j: int,
        y: Tensor,
        z: Tensor,
    ) -> Tensor:
        """Return kappa_ij(y,z) per row, for ids y of level i and z of level j."""
        is_ancestor = self.vocabulary.ancestor(y, j) == z
        sure = self.sure[i][j] * is_ancestor.double()
        return sure + self.stray_at(i, j, z)

    def stray_at(
        self,
        i: int,
        j: int,
        z: Tensor,
    ) -> Tensor:
        """Return r_ij(z) per row, for ids z of level j."""
        stray = self._stray_constants[i][j]
        if stray is None:
            return torch.zeros(z.shape, dtype=torch.float64, device=z.device)
        return stray.on(z.device)[z - self.vocabulary.offsets[j]]

    def log_spread(
        self,
        i: int,
        j: int,
        log_mass: Tensor,
    ) -> Tensor:
        """Return the log-probabilities [r,n_j] of the state after a move from level i to level j.

        `log_mass` [r,n_j] is the log-probability that node z of level j is the ancestor of the
        state at level i, for each of the n_j nodes z.
        """
        stray = self._stray_constants[i][j]
        if stray is None:
            return log_mass
        remainder = stray.on(log_mass.device).to(log_mass.dtype)
        return safe_log(self.sure[i][j] * log_mass.exp() + remainder)


@final
class TreeKernel(Kernel):
    """Kernel on a tree: `levels` [r,L+1,L+1] between levels, `parents` between nodes of two levels.

    The kernel is block upper triangular, since a position only moves to higher levels.
    """

    def __init__(self, levels: Tensor, parents: StochasticParents) -> None:
        self.levels = levels
        self.parents = parents
        self.num_states = parents.vocabulary.num_states

    def row(self, ids: Tensor) -> Tensor:
        values = self._zeros(ids)
        for i, j in self._level_pairs():
            rows, nodes, y, z = self._block(ids, i, j)
            entries = self.parents.entry(i, j, y, z)
            self._write_block(
                values,
                rows,
                nodes,
                i,
                j,
                entries,
            )
        return values

    def column(self, ids: Tensor) -> Tensor:
        values = self._zeros(ids)
        for i, j in self._level_pairs():
            rows, nodes, z, y = self._block(ids, j, i)
            entries = self.parents.entry(i, j, y, z)
            self._write_block(
                values,
                rows,
                nodes,
                i,
                j,
                entries,
            )
        return values

    def _write_block(
        self,
        values: Tensor,
        rows: Tensor,
        nodes: Tensor,
        i: int,
        j: int,
        entries: Tensor,
    ) -> None:
        """Write K_ij times `entries` into `values`, at the given rows and nodes.

        `entries` holds the pairs (row, node) of `_block` in flat order.
        """
        block = entries.reshape(len(rows), len(nodes))
        weight = self.levels[rows, i, j].unsqueeze(-1)
        values[rows.unsqueeze(-1), nodes] = weight * block

    def _zeros(self, ids: Tensor) -> Tensor:
        return torch.zeros(
            len(ids),
            self.num_states,
            dtype=self.levels.dtype,
            device=ids.device,
        )

    def _level_pairs(self) -> list[tuple[int, int]]:
        """Return all pairs of a level i and a level j >= i."""
        count = self.parents.vocabulary.num_levels + 1
        return [(i, j) for i in range(count) for j in range(i, count)]

    def _block(
        self,
        ids: Tensor,
        own_level: int,
        other_level: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the rows whose id is at `own_level` and all nodes of `other_level`.

        Also returns every pair of these as two flat tensors: the ids of the rows, and the nodes.
        """
        vocabulary = self.parents.vocabulary
        rows = find_rows(vocabulary.level_of(ids) == own_level)
        nodes = _level_ids(vocabulary, other_level, ids.device)
        own = ids[rows].repeat_interleave(len(nodes))
        return rows, nodes, own, nodes.repeat(len(rows))

    def apply(self, vector: Tensor) -> Tensor:
        vocabulary = self.parents.vocabulary
        levels = []
        for j in range(vocabulary.num_levels + 1):
            total = vector.new_zeros(len(vector), vocabulary.level_sizes[j])
            for i in range(j + 1):
                weight = to_column(self.levels[:, i, j], vector)
                total = total + weight * self._push(vector, i, j)
            levels.append(total)
        return torch.cat(levels, -1)

    def solve(self, vector: Tensor) -> Tensor:
        """Solve x K = v level by level, from the tokens up.

        x_j = (v_j - sum_{i<j} K_ij push(x_i)) / K_jj.
        """
        vocabulary = self.parents.vocabulary
        diagonal = self.levels.diagonal(dim1=-2, dim2=-1)
        require_invertible((diagonal == 0).any(-1), type(self).__name__)
        # Block back substitution: `solved` is complete below level j.
        solved = torch.zeros_like(vector)
        for j in range(vocabulary.num_levels + 1):
            ids = _level_slice(vocabulary, j)
            rest = vector[:, ids]
            for i in range(j):
                weight = to_column(self.levels[:, i, j], vector)
                rest = rest - weight * self._push(solved, i, j)
            solved[:, ids] = rest / to_column(diagonal[:, j], vector)
        return solved

    def _push(
        self,
        vector: Tensor,
        i: int,
        j: int,
    ) -> Tensor:
        """Return the part of `vector` at level i, moved to level j by kappa_ij, [r,n_j]."""
        vocabulary = self.parents.vocabulary
        block = vector[:, _level_slice(vocabulary, i)]
        ids = _level_ids(vocabulary, i, vector.device)
        index = vocabulary.ancestor(ids, j) - vocabulary.offsets[j]
        pushed = vector.new_zeros(len(vector), vocabulary.level_sizes[j])
        pushed.index_add_(-1, index, self.parents.sure[i][j] * block)
        stray = self.parents.stray[i][j]
        if stray is None:
            return pushed
        return pushed + block.sum(-1, keepdim=True) * stray.to(vector)

    def _num_rows(self) -> int:
        return len(self.levels)


class TreeProcess(ForwardProcess):
    """Process that moves tokens up a vocabulary tree by a level clock.

    Parents are stochastic if xi < 1.

    Args:
        vocabulary: at least one level above the tokens.
        clock: distribution of the times at which a position moves up, with as many levels as the
            vocabulary.
        xi: probability of the own parent, one number in (0,1] for every level with several nodes,
            or one number per level 1..L.
        decoding: rule by which a step draws below a node if xi < 1. `bayes` is the exact posterior.
            `within` draws only tokens below the node. `between` gives the tokens below the node
            the probability xi and all other tokens 1 - xi, each in proportion to the predicted
            distribution. `free` ignores the node.
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
        self.parents = StochasticParents(vocabulary, _check_xi(xi, vocabulary.num_levels))
        self.prior = Prior.point(vocabulary.root, vocabulary.num_states)
        self.closes_at_clean = clock.closes_at_clean
        self.closes_at_prior = clock.closes_at_prior
        self.uniforms_per_sample = 1 if self.parents.is_deterministic else 2
        self.uniforms_per_forward_step = self.uniforms_per_sample
        self.uniforms_per_step = 2
        self.exact_step = self.parents.is_deterministic or decoding == "bayes"

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

    def sample(
        self,
        x0: Tensor,
        t: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Draw z_t given x0: first the level from the probabilities F_l(t), then the node."""
        cdf = evaluate_per_time(self.clock.cdf, t)
        # F_l falls with l: the number of levels with u < F_l is the level.
        level = (u[:, :1] < cdf).sum(-1)
        return self._draw_ancestor(x0, level, u)

    def forward_step(
        self,
        zs: Tensor,
        s: Tensor,
        t: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Draw z_t given z_s: first the level j from K_ij(s,t), with i the level of z_s.

        The node at level j is drawn afterwards.
        """
        own = self.vocabulary.level_of(zs)
        rows = torch.arange(len(zs), device=zs.device)
        level_weights = self.clock.transition(s, t)[rows, own]
        return self._draw_ancestor(zs, draw_index(level_weights, u[:, 0]), u)

    def _draw_ancestor(
        self,
        ids: Tensor,
        level: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Draw a node of the given levels [r] from kappa_ij(ids, .), with uniforms u[:,1]."""
        ancestor = self.vocabulary.ancestor(ids, level)
        if self.parents.is_deterministic:
            return ancestor
        # One pair of levels at a time, since the vectors r_ij have different lengths.
        drawn = ancestor.clone()
        own = self.vocabulary.level_of(ids)
        for i in range(self.vocabulary.num_levels):
            for j in range(i + 1, self.vocabulary.num_levels + 1):
                rows = find_rows((own == i) & (level == j))
                if self.parents.stray[i][j] is not None and len(rows):
                    stray = self._draw_stray(ancestor[rows], i, j, u[rows, 1])
                    drawn[rows] = stray
        return drawn

    def _draw_stray(
        self,
        ancestor: Tensor,
        i: int,
        j: int,
        u: Tensor,
    ) -> Tensor:
        """Draw a node z of level j with probability A_ij 1[z = ancestor] + r_ij(z).

        A_ij can be negative if xi < 1/n for a level with n nodes.
        """
        stray = self.parents.stray[i][j]
        assert stray is not None
        remainder = stray.to(u.device).repeat(len(ancestor), 1)
        place = (ancestor - self.vocabulary.offsets[j]).unsqueeze(-1)
        sure = remainder.new_full(place.shape, self.parents.sure[i][j])
        weights = remainder.scatter_add(-1, place, sure)
        return self.vocabulary.offsets[j] + draw_index(weights, u)

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

        Tokens move to level l with probability pi_l(t). Rows of other states are those of
        `transition(0, t)`.
        """
        # The clock may keep or share its tensor, so the code writes to a copy.
        levels = self.clock.transition(torch.zeros_like(t), t).clone()
        levels[:, 0] = self.clock.pi(t)
        return TreeKernel(levels, self.parents)

    def stay_probability(self, x0: Tensor, t: Tensor) -> Tensor:
        """Return pi_0(t) per row [r]."""
        return self._level_probability(x0, t)

    def tweedie(self, score: Score, t: Tensor) -> Tensor:
        """Return the log of the score normalized over the tokens.

        No other token can become x, so q_t-bar(x) = pi_0 p(x).
        """
        at_tokens = score.log_ratio[:, : self.vocabulary.num_tokens]
        return log_normalize(at_tokens.double())

    def _level_probability(self, zt: Tensor, t: Tensor) -> Tensor:
        """Return pi_l(t) per row, with l the level of z_t."""
        pi = evaluate_per_time(self.clock.pi, t)
        return pick(pi, self.vocabulary.level_of(zt))

    # ------------------------------------------------------------------ the bound

    def weight(
        self,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return F_l'/pi_l, the total true reverse rate; 0 at tokens.

        If the clock closes, the expected integral of the weight over the times at level l is 1.
        """
        level = self.vocabulary.level_of(zt)
        t = interior(t)
        inflows = evaluate_per_time(self.clock.inflow, t)
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
        """Return KL( P(y | z,x) || P(y | z) ), with y the state one level below z; 0 at tokens."""
        if isinstance(prediction, Score):
            return super().divergence(prediction, x0, zt, t)
        return self._kl_below(prediction, x0, zt, self.vocabulary.level_of(zt))

    def density(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        if isinstance(prediction, Score):
            return super().density(prediction, x0, zt, t)
        weight = self.weight(x0, zt, t)
        # At weight 0 the divergence may be infinite, and 0 * inf is NaN.
        is_weighted = weight > 0
        divergence = where_or_zero(is_weighted, self.divergence(prediction, x0, zt, t))
        return torch.where(is_weighted, weight * divergence, 0.0)

    def _kl_below(
        self,
        dist: CleanDistribution,
        x0: Tensor,
        zt: Tensor,
        level: Tensor,
    ) -> Tensor:
        """Return KL( P(y | z,x) || P(y | z) ), with y the state one level below z; 0 at tokens."""
        # For xi = 1, x determines y, and the divergence is -ln P(y | z).
        if self.parents.is_deterministic:
            child = self.vocabulary.ancestor(x0, (level - 1).clamp(min=0))
            return -dist.log_step(zt, child)
        value: Tensor | None = None
        for l in range(1, self.vocabulary.num_levels + 1):
            here = level == l
            if not may_be_true(here):
                continue
            # Rows of other levels are evaluated at an ancestor of x0, where every value is finite.
            # Their results are dropped.
            z = torch.where(here, zt, self.vocabulary.ancestor(x0, l))
            if l == 1:
                kl = self._token_nll(dist, x0, z)
            else:
                kl = self._kl_at_level(dist, x0, z, l)
            others = torch.zeros_like(kl) if value is None else value
            value = torch.where(here, kl, others)
        if value is None:
            return torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
        return value

    def _kl_at_level(
        self,
        dist: CleanDistribution,
        x0: Tensor,
        zt: Tensor,
        level: int,
    ) -> Tensor:
        """Return the divergence of rows at one level >= 2, for stochastic parents.

        At these levels x does not determine the state y one level below: y has the distribution
        P(y | z,x).
        """
        below = level - 1
        log_mass = dist.log_mass(below)
        nodes = _level_ids(self.vocabulary, below, zt.device)
        kappa = self._kappa_to(below, level, nodes, zt)
        onward = kappa.to(log_mass.dtype).log()
        is_ancestor = self.vocabulary.ancestor(x0, below).unsqueeze(-1) == nodes
        truth = is_ancestor.double() * self.parents.sure[0][below]
        truth = truth + self.parents.stray_at(0, below, nodes)
        log_truth = truth.to(log_mass.dtype).log() + onward
        log_truth = log_truth.log_softmax(-1)
        log_model = self.parents.log_spread(0, below, log_mass) + onward
        # If the prediction gives z_t probability 0, the divergence is infinite.
        possible = (log_model > -torch.inf).any(-1, keepdim=True)
        log_model = where_or_zero(possible, log_model).log_softmax(-1)
        has_mass = log_truth.isfinite()
        terms = log_truth.exp() * (log_truth - where_or_zero(has_mass, log_model))
        divergence = torch.where(has_mass, terms, 0.0).sum(-1)
        return torch.where(possible.squeeze(-1), divergence, torch.inf)

    def _kappa_to(
        self,
        i: int,
        j: int,
        nodes: Tensor,
        zt: Tensor,
    ) -> Tensor:
        """Return kappa_ij(y, z_t) [r,n_i] for all n_i nodes y of level i."""
        is_ancestor = self.vocabulary.ancestor(nodes, j) == zt.unsqueeze(-1)
        stray = self.parents.stray_at(i, j, zt).unsqueeze(-1)
        return self.parents.sure[i][j] * is_ancestor.double() + stray

    def _token_nll(
        self,
        dist: CleanDistribution,
        x0: Tensor,
        zt: Tensor,
    ) -> Tensor:
        """Return -ln P(x0 | z_t) per row for xi < 1; 0 at tokens.

        The value is ln( A P(z) + r(z) ) - ln( (A 1[anc(x0) = z] + r(z)) p(x0) ), with A = A_0l and
        r = r_0l at the level l of z, anc(x0) the ancestor of x0 at this level, and P(z) the
        predicted probability of the tokens below z.
        """
        level = self.vocabulary.level_of(zt)
        is_token = level == 0
        sure, stray = self.parents.from_tokens(zt)
        is_ancestor = self.vocabulary.ancestor(x0, level) == zt
        log_evidence = (sure * is_ancestor + stray).log()
        # If r(z) is 0, the mass of a node may underflow, and ln 0 would make the bound -inf.
        log_mass = dist.log_prob(zt)
        has_strays = stray > 0
        spread = torch.where(has_strays, sure * log_mass.exp() + stray, 1.0)
        log_expected = torch.where(has_strays, spread.log(), sure.log() + log_mass)
        log_p = dist.log_prob(x0)
        # If the prediction gives the token probability 0, the value is +inf, even if its node has
        # probability 0 too.
        possible = log_p.isfinite()
        is_finite = ~is_token & possible
        nll = where_or_zero(is_finite, log_expected)
        nll = nll - where_or_zero(is_finite, log_evidence + log_p)
        return torch.where(is_token, 0.0, torch.where(possible, nll, torch.inf))

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
        return self._token_nll(prediction, x0, zt)

    def closing_kl(
        self,
        prediction: Prediction,
        x0: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return sum_l pi_l(t) (-ln P(anc_l(x0))) over the levels below the root, for xi = 1."""
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
        # the rows of tokens too, and their query node is the parent.
        return torch.where(self.active(zt), zt, self.vocabulary.parent(zt))

    # ------------------------------------------------------------------ information

    def information(self, t: Tensor) -> Tensor:
        """Return sum_l pi_l(t) I(X; node at level l).

        The level itself carries no information on the token.
        """
        return self.clock.pi(t) @ self._level_information

    def information_lost(self, t: Tensor) -> Tensor:
        """Return sum_l (pi_l(t) - pi_l(0)) (I(X; X) - I(X; node at level l)).

        All terms are positive, so the sum has no cancellation.
        """
        levels = self._level_information
        start = torch.zeros_like(t)
        gained = self.clock.pi(t) - self.clock.pi(start)
        return gained @ (levels[0] - levels)

    def change_probability(self, t: Tensor) -> Tensor:
        return self.clock.cdf(t)[:, 0]

    @cached_property
    def _level_information(self) -> Tensor:
        """Return I(X; node at level l) for l = 0..L in nats.

        X is uniform over the tokens, and the node is drawn from kappa_0l(X, .).
        """
        reference = uniform_reference(self.vocabulary.num_tokens)
        dist = DenseDistribution(reference, self.vocabulary)
        values = []
        for level in range(self.vocabulary.num_levels + 1):
            mass = dist.log_mass(level)[0].exp()
            values.append(self._information_at(level, mass))
        return torch.stack(values)

    def _information_at(self, level: int, mass: Tensor) -> Tensor:
        """Return H(node) - H(node | X) in nats.

        `mass` [n] is the probability of each node to be the ancestor of the token X.
        """
        stray = self.parents.stray[0][level]
        if stray is None:
            return -torch.special.xlogy(mass, mass).sum()
        sure = self.parents.sure[0][level]
        spread = sure * mass + stray
        # Given X, each node z has the probability r(z), and the ancestor of X has A in addition.
        at_ancestor = torch.special.xlogy(sure + stray, sure + stray)
        at_ancestor = at_ancestor - torch.special.xlogy(stray, stray)
        conditional = torch.special.xlogy(stray, stray).sum()
        conditional = conditional + (mass * at_ancestor).sum()
        return conditional - torch.special.xlogy(spread, spread).sum()

    # ------------------------------------------------------------------ reverse

    @property
    def is_monotone(self) -> bool:
        return self.parents.is_deterministic

    def step(
        self,
        query: Query,
        zt: Tensor,
        t: Tensor,
        s: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Draw z_s given z_t: first the level, without the network, then the node.

        The level is i at time s with probability P(i | j) = pi_i(s) K_ij(s,t) / pi_j(t), where j is
        the level of z_t.
        """
        level = self.vocabulary.level_of(zt)
        num_levels = self.clock.num_levels + 1
        index = level[:, None, None].expand(-1, num_levels, 1)
        arrive = self.clock.transition(s, t).gather(-1, index).squeeze(-1)
        # The level of z_t is certain, so its posterior at s needs no prediction.
        target = draw_index(self.clock.pi(s) * arrive, u[:, 0])
        return self._draw_at_level(query, zt, target, u[:, 1])

    def decode(
        self,
        query: Query,
        zt: Tensor,
        t: Tensor,
        u: Tensor,
    ) -> Tensor:
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
        return self._draw_below(prediction, zt, target, u)

    def event_time(
        self,
        zt: Tensor,
        t: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Draw the time at which the row entered its level, without a network.

        An event moves a row one level down, at the rate F_l'/pi_l, which does not depend on the
        network.
        """
        level = self.vocabulary.level_of(zt)
        s = torch.zeros_like(t)
        above = find_rows(level > 0)
        if len(above):
            s[above] = self.clock.entry_time(
                level[above],
                t[above],
                u[above],
            )
        return s

    def event(
        self,
        query: Query,
        zt: Tensor,
        t: Tensor,
        u: Tensor,
    ) -> Tensor:
        target = (self.vocabulary.level_of(zt) - 1).clamp(min=0)
        return self._draw_at_level(query, zt, target, u[:, 0])

    def _draw_at_level(
        self,
        query: Query,
        zt: Tensor,
        target: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Draw the state at level `target` [r] given z_t."""
        return self._descend(
            query,
            zt,
            target,
            self._draw_step_below,
            target,
            u,
        )

    def _draw_step_below(
        self,
        prediction: Prediction,
        zt: Tensor,
        target: Tensor,
        u: Tensor,
    ) -> Tensor:
        dist = require_distribution(prediction, "TreeProcess.step")
        return self._draw_below(dist, zt, target, u)

    def _descend(
        self,
        query: Query,
        zt: Tensor,
        target: Tensor,
        draw: Callable[..., Tensor],
        *per_row: Tensor,
    ) -> Tensor:
        """Replace z_t by draw(prediction, z_t, *per_row) if the target level is below its level.

        Rows that keep their level are not queried.
        """
        moving = find_rows(target < self.vocabulary.level_of(zt))
        zs = zt.clone()
        # If no row moves, the network is not run.
        if len(moving):
            z = zt[moving]
            values = [value[moving] for value in per_row]
            zs[moving] = query(
                moving,
                self.scope(z),
                draw,
                z,
                *values,
            )
        return zs

    def _draw_below(
        self,
        dist: CleanDistribution,
        zt: Tensor,
        target: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Draw the state at level `target` [r] below z_t by the decoding rule."""
        if self.parents.is_deterministic or self.decoding == "within":
            return dist.draw(zt, target, u)
        if self.decoding == "free":
            return dist.draw(torch.full_like(zt, self.vocabulary.root), target, u)
        drawn = zt.clone()
        level = self.vocabulary.level_of(zt)
        for i in range(self.vocabulary.num_levels):
            for j in range(i + 1, self.vocabulary.num_levels + 1):
                rows = find_rows((target == i) & (level == j))
                if len(rows):
                    log_mass = dist.log_mass(i)[rows]
                    weights = self._weights_below(log_mass, zt[rows], i, j)
                    index = draw_index(weights, u[rows])
                    drawn[rows] = self.vocabulary.offsets[i] + index
        return drawn

    def _weights_below(
        self,
        log_mass: Tensor,
        zt: Tensor,
        i: int,
        j: int,
    ) -> Tensor:
        """Return unnormalized probabilities [r,n_i] of the nodes at level i.

        The state z_t at level j moves down to one of these nodes.
        """
        nodes = _level_ids(self.vocabulary, i, zt.device)
        if self.decoding == "bayes":
            kappa = self._kappa_to(i, j, nodes, zt)
            log_spread = self.parents.log_spread(0, i, log_mass)
            return (log_spread + kappa.log()).softmax(-1)
        is_inside = self.vocabulary.ancestor(nodes, j) == zt.unsqueeze(-1)
        own = log_mass.masked_fill(~is_inside, -torch.inf).softmax(-1)
        if bool(is_inside.all()):
            return own
        # The quotient is NaN in rows in which no node is elsewhere; its weights are then 0.
        others = log_mass.masked_fill(is_inside, -torch.inf).softmax(-1)
        others = others.nan_to_num(0.0)
        stray = self.parents.stray_at(i, j, zt).unsqueeze(-1)
        right = self.parents.sure[i][j] + stray
        return right * own + (1.0 - right) * others

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


def _level_slice(vocabulary: Vocabulary, level: int) -> slice:
    """Return the ids of a level as a slice."""
    offset = vocabulary.offsets[level]
    return slice(offset, offset + vocabulary.level_sizes[level])


def _level_ids(vocabulary: Vocabulary, level: int, device: torch.device) -> Tensor:
    """Return the ids of a level as a tensor [n]."""
    return vocabulary.offsets[level] + torch.arange(vocabulary.level_sizes[level], device=device)


def _check_xi(xi: float | Sequence[float], num_levels: int) -> tuple[float, ...]:
    """Return one xi per level, with 1 for a root that is not listed.

    Raises ArgumentError if the number of values or their range does not fit.
    """
    if isinstance(xi, (int, float)):
        values = (float(xi),) * num_levels
    else:
        values = tuple(float(x) for x in xi)
    if len(values) == num_levels - 1:
        values = (*values, 1.0)
    if len(values) != num_levels or not all(0.0 < x <= 1.0 for x in values):
        raise ArgumentError(
            f"TreeProcess: xi must be one number in (0, 1], or one for each of the {num_levels} "
            f"levels above the tokens; got {xi}. xi is the probability that a position moves to "
            "its own parent; 1 makes parents deterministic."
        )
    return values
