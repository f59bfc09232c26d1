"""The tree family: a position climbs from its word to ever coarser nodes, the root being the mask.

One level is masked diffusion (arXiv 2406.07524), two levels the hierarchical model of arXiv 2510.08632, any number of
levels works. Parents may be stochastic: level l is entered at the right parent with probability xi_l and at any other
with (1 - xi_l)/(n_l - 1). Writing A_ij for the probability "surely right" and r_ij for the state-independent remainder,

    kappa_ij(y, z) = A_ij 1[anc_j(y) = z] + r_ij(z)              y at level i, z at level j
    q_t(z | x)     = pi_j(t) kappa_0j(x, z)                       j the level of z
    density        = (F_l'/pi_l) KL( state one level down | z, x  ||  the same | z, law )        l the level of z

which for xi = 1 is (F_l'/pi_l) (-ln P(a_{l-1} | a_l)), and is a true bound for xi < 1, unlike the published one.
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
    interior,
    log_normalize,
    may_be_true,
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
    """kappa_ij for all pairs of levels, from xi_l per level (1 where a level has one node).

    `sure[i][j]` is the number A_ij; `stray[i][j]` the vector r_ij [n_j] in the level's id order (None where it is zero).
    """

    def __init__(self, vocabulary: Vocabulary, xi: Sequence[float]) -> None:
        self.vocabulary = vocabulary
        self.xi = tuple(
            1.0 if size == 1 else float(x) for x, size in zip(xi, vocabulary.level_sizes[1:])
        )
        self.certain = all(x == 1.0 for x in self.xi)
        levels = range(vocabulary.num_levels + 1)
        self.sure = [[0.0] * len(levels) for _ in levels]
        self.stray: list[list[Tensor | None]] = [[None] * len(levels) for _ in levels]
        for i in levels:
            self.sure[i][i] = 1.0
            for j in range(i + 1, len(levels)):
                self._climb(i, j)
        self._stray = [
            [None if stray is None else Constant(stray) for stray in row] for row in self.stray
        ]
        self._of_words = Constant(torch.cat([self._shares(level) for level in levels], 1))

    def _climb(self, i: int, j: int) -> None:
        """From level j-1 to j: p -> a push(p) + b with a = xi - b, b = (1 - xi)/(n - 1)."""
        size, xi = self.vocabulary.level_sizes[j], self.xi[j - 1]
        each = 0.0 if xi == 1.0 else (1.0 - xi) / (size - 1)
        keep = xi - each
        self.sure[i][j] = keep * self.sure[i][j - 1]
        below = self.stray[i][j - 1]
        if below is None and each == 0.0:
            return
        pushed = torch.zeros(size, dtype=torch.float64)
        if below is not None:
            pushed.index_add_(0, self.vocabulary.parents[j - 1], below)
        # what "surely right" loses on the way is spread evenly; the rest follows its own parents
        self.stray[i][j] = keep * pushed + each

    def _shares(self, level: int) -> Tensor:
        """[2,n] A_0l and r_0l(z) for the nodes z of a level."""
        stray, size = self.stray[0][level], self.vocabulary.level_sizes[level]
        strays = torch.zeros(size, dtype=torch.float64) if stray is None else stray
        return torch.stack([torch.full_like(strays, self.sure[0][level]), strays])

    def of_words(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """[r], [r] A_0l and r_0l(z) for ids z of any level l."""
        sure, stray = self._of_words.on(z.device)[:, z]
        return sure, stray

    def entry(self, i: int, j: int, y: Tensor, z: Tensor) -> Tensor:
        """[r] kappa_ij(y, z) for ids y of level i and z of level j."""
        right = self.vocabulary.ancestor(y, j) == z
        return self.sure[i][j] * right.double() + self.stray_at(i, j, z)

    def stray_at(self, i: int, j: int, z: Tensor) -> Tensor:
        """[r] r_ij(z) for ids z of level j."""
        stray = self._stray[i][j]
        if stray is None:
            return torch.zeros(z.shape, dtype=torch.float64, device=z.device)
        return stray.on(z.device)[z - self.vocabulary.offsets[j]]

    def log_spread(self, i: int, j: int, log_mass: Tensor) -> Tensor:
        """[r,n_j] log of the law at level j when the right ancestors at level j have log_mass and y is at level i."""
        stray = self._stray[i][j]
        if stray is None:
            return log_mass
        return safe_log(
            self.sure[i][j] * log_mass.exp() + stray.on(log_mass.device).to(log_mass.dtype)
        )


@final
class TreeKernel(Kernel):
    """Block upper triangular: levels [r,L+1,L+1] between levels, `parents` between the nodes of two levels."""

    def __init__(self, levels: Tensor, parents: StochasticParents) -> None:
        self.levels, self.parents = levels, parents
        self.num_states = parents.vocabulary.num_states

    def row(self, ids: Tensor) -> Tensor:
        return self._entries(ids, outward=True)

    def column(self, ids: Tensor) -> Tensor:
        return self._entries(ids, outward=False)

    def _entries(self, ids: Tensor, outward: bool) -> Tensor:
        vocabulary = self.parents.vocabulary
        states = torch.arange(self.num_states, device=ids.device)
        values = torch.zeros(len(ids), self.num_states, dtype=self.levels.dtype, device=ids.device)
        own, other = vocabulary.level_of(ids), vocabulary.level_of(states)
        for i in range(vocabulary.num_levels + 1):
            for j in range(i, vocabulary.num_levels + 1):
                rows = (own == (i if outward else j)).nonzero().squeeze(-1)
                far = states[other == (j if outward else i)]
                here = ids[rows].repeat_interleave(len(far))
                there = far.repeat(len(rows))
                y, z = (here, there) if outward else (there, here)
                block = self.parents.entry(i, j, y, z).reshape(len(rows), len(far))
                values[rows.unsqueeze(-1), far] = self.levels[rows, i, j].unsqueeze(-1) * block
        return values

    def apply(self, vector: Tensor) -> Tensor:
        vocabulary, parts = self.parents.vocabulary, []
        for j in range(vocabulary.num_levels + 1):
            total = vector.new_zeros(len(vector), vocabulary.level_sizes[j])
            for i in range(j + 1):
                total = total + to_column(self.levels[:, i, j], vector) * self._push(vector, i, j)
            parts.append(total)
        return torch.cat(parts, -1)

    def solve(self, vector: Tensor) -> Tensor:
        """Level by level from the words up: x_j = (v_j - sum_{i<j} K_ij push(x_i)) / K_jj."""
        vocabulary = self.parents.vocabulary
        diagonal = self.levels.diagonal(dim1=-2, dim2=-1)
        require_invertible((diagonal == 0).any(-1), type(self).__name__)
        solved = torch.zeros_like(vector)
        for j, (offset, size) in enumerate(zip(vocabulary.offsets, vocabulary.level_sizes)):
            here = vector[:, offset : offset + size]
            for i in range(j):
                here = here - to_column(self.levels[:, i, j], vector) * self._push(solved, i, j)
            solved[:, offset : offset + size] = here / to_column(diagonal[:, j], vector)
        return solved

    def _push(self, vector: Tensor, i: int, j: int) -> Tensor:
        vocabulary = self.parents.vocabulary
        block = vector[:, vocabulary.offsets[i] : vocabulary.offsets[i] + vocabulary.level_sizes[i]]
        ids = vocabulary.offsets[i] + torch.arange(vocabulary.level_sizes[i], device=vector.device)
        pushed = vector.new_zeros(len(vector), vocabulary.level_sizes[j])
        pushed.index_add_(
            -1, vocabulary.ancestor(ids, j) - vocabulary.offsets[j], self.parents.sure[i][j] * block
        )
        stray = self.parents.stray[i][j]
        return pushed if stray is None else pushed + block.sum(-1, keepdim=True) * stray.to(vector)

    def _num_rows(self) -> int:
        return len(self.levels)


class TreeProcess(ForwardProcess):
    """Words climb a vocabulary tree by a level clock, with stochastic parents where xi < 1.

    `xi`: one number in (0,1] for every level with several nodes, or one per level 1..L. `decoding` names how a step
    draws below a node when xi < 1: `bayes` is the exact posterior; `within` keeps to the node's own words; `between`
    gives the node's words the mass xi and the others 1 - xi, each in proportion to the law; `free` ignores the node.
    """

    has_events = True

    def __init__(
        self,
        vocabulary: Vocabulary,
        clock: LevelClock,
        xi: float | Sequence[float] = 1.0,
        decoding: str = "bayes",
    ) -> None:
        self._check(vocabulary, clock, decoding)
        self.vocabulary, self.clock, self.decoding = vocabulary, clock, decoding
        self.parents = StochasticParents(vocabulary, _checked_xi(xi, vocabulary.num_levels))
        self.prior = Prior.point(vocabulary.root, vocabulary.num_states)
        self.closes_at_clean, self.closes_at_prior = clock.closes_at_clean, clock.closes_at_prior
        self.uniforms_per_sample = 1 if self.parents.certain else 2
        self.uniforms_per_forward_step = self.uniforms_per_sample
        self.uniforms_per_step = 2
        self.exact_step = self.parents.certain or decoding == "bayes"

    def _settings(self) -> Iterable[str]:
        xi = self.parents.xi
        return [
            f"clock={self.clock!r}",
            f"xi={xi[0] if len(set(xi)) == 1 else xi}",
            f"decoding={self.decoding!r}",
        ]

    @staticmethod
    def _check(vocabulary: Vocabulary, clock: LevelClock, decoding: str) -> None:
        if vocabulary.num_levels == 0:
            raise ArgumentError(
                f"{TreeProcess.__name__}: vocabulary must have a mask or more levels; {vocabulary} has words only. "
                "Use FlatVocabulary(num_tokens, mask=True)."
            )
        if clock.num_levels != vocabulary.num_levels:
            raise ArgumentError(
                f"{TreeProcess.__name__}: clock must have one level per level above the words, {vocabulary.num_levels} "
                f"for {vocabulary}; got a clock of {clock.num_levels}. Give it {vocabulary.num_levels} rates or schedules."
            )
        if decoding not in DECODING:
            raise ArgumentError(
                f"{TreeProcess.__name__}: decoding must be one of {', '.join(DECODING)}; got {decoding!r}."
                + suggest(decoding, DECODING)
            )

    # ------------------------------------------------------------------ forward

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        dist, log_pi = DenseDistribution(log_p, self.vocabulary), self.clock.pi(t).log()
        levels = [
            to_column(log_pi[:, level], log_p)
            + self.parents.log_spread(0, level, dist.log_mass(level))
            for level in range(self.vocabulary.num_levels + 1)
        ]
        return torch.cat(levels, -1)

    def rates(self, t: Tensor) -> Kernel:
        return TreeKernel(self.clock.generator(interior(t)), self.parents)

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        return TreeKernel(self.clock.transition(s, t), self.parents)

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        level = (u[:, :1] < evaluate_per_time(self.clock.cdf, t)).sum(-1)
        return self._at_level(x0, level, u)

    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """The level at t is drawn first, K_ij(s,t) from level i, then the node."""
        own = self.vocabulary.level_of(zs)
        levels = self.clock.transition(s, t)[torch.arange(len(zs), device=zs.device), own]
        return self._at_level(zs, draw_index(levels, u[:, 0]), u)

    def _at_level(self, ids: Tensor, level: Tensor, u: Tensor) -> Tensor:
        """Climb from ids to the level given, straying with u[:,1]: a draw from kappa_ij(ids, .)."""
        right = self.vocabulary.ancestor(ids, level)
        if self.parents.certain:
            return right
        drawn, own = right.clone(), self.vocabulary.level_of(ids)
        for i in range(self.vocabulary.num_levels):
            for j in range(i + 1, self.vocabulary.num_levels + 1):
                rows = ((own == i) & (level == j)).nonzero().squeeze(-1)
                if self.parents.stray[i][j] is not None and len(rows):
                    drawn[rows] = self._stray(right[rows], i, j, u[rows, 1])
        return drawn

    def _stray(self, right: Tensor, i: int, j: int, u: Tensor) -> Tensor:
        """A draw from A_ij 1[. = right ancestor] + r_ij, where A_ij < 0 when xi < 1/n."""
        stray, sure = self.parents.stray[i][j], self.parents.sure[i][j]
        assert stray is not None
        spread = stray.to(u.device).repeat(len(right), 1)
        place = (right - self.vocabulary.offsets[j]).unsqueeze(-1)
        weights = spread.scatter_add(-1, place, spread.new_full(place.shape, sure))
        return self.vocabulary.offsets[j] + draw_index(weights, u)

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        vocabulary, level = self.vocabulary, self.vocabulary.level_of(zt)
        words = torch.arange(vocabulary.num_tokens, device=zt.device)
        above = vocabulary.ancestor(words.unsqueeze(0), level.unsqueeze(-1))
        sure, stray = (share.unsqueeze(-1) for share in self.parents.of_words(zt))
        spread = torch.where(above == zt.unsqueeze(-1), sure, 0.0) + stray
        return (self._occupation(zt, t).unsqueeze(-1) * spread).log()

    def from_clean(self, t: Tensor) -> Kernel:
        """As `transition(0, t)`, with pi(t) for the levels that a token is at."""
        levels = self.clock.transition(torch.zeros_like(t), t).clone()
        levels[:, 0] = self.clock.pi(t)
        return TreeKernel(levels, self.parents)

    def stay_probability(self, x0: Tensor, t: Tensor) -> Tensor:
        """[r] pi_0(t)."""
        return self._occupation(x0, t)

    def tweedie(self, score: Score, t: Tensor) -> Tensor:
        """Nothing strays into a token, so that the marginal of tokens is pi_0 p: p are the shares of s among tokens."""
        return log_normalize(score.log_ratio[:, : self.vocabulary.num_tokens].double())

    # ------------------------------------------------------------------ the bound

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """F_l'/pi_l, the total true reverse rate; 0 at tokens.

        E[weight 1{level l}] = 1 per level where the clock closes.
        """
        level = self.vocabulary.level_of(zt)
        t = interior(t)
        inflow = (
            evaluate_per_time(self.clock.inflow, t)
            .gather(-1, (level - 1).clamp(min=0).unsqueeze(-1))
            .squeeze(-1)
        )
        return torch.where(level > 0, inflow / self._occupation(zt, t), 0.0)

    def divergence(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """KL( y | z, x || y | z, law ), y the state one level down; 0 at words."""
        if isinstance(prediction, Score):
            return super().divergence(prediction, x0, zt, t)
        return self._surprise_below(prediction, x0, zt, self.vocabulary.level_of(zt))

    def density(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        if isinstance(prediction, Score):
            return super().density(prediction, x0, zt, t)
        weight = self.weight(x0, zt, t)
        read = weight > 0
        return torch.where(
            read, weight * where_or_zero(read, self.divergence(prediction, x0, zt, t)), 0.0
        )

    def _surprise_below(
        self, dist: CleanDistribution, x0: Tensor, zt: Tensor, level: Tensor
    ) -> Tensor:
        """[r] KL( y | z, x || y | z, law ), y the state one level down; 0 at words."""
        if self.parents.certain:
            return -dist.log_step(zt, self.vocabulary.ancestor(x0, (level - 1).clamp(min=0)))
        value: Tensor | None = None
        for l in range(1, self.vocabulary.num_levels + 1):
            here = level == l
            if not may_be_true(here):
                continue
            # rows of other levels are evaluated at an ancestor of x0, a harmless stand-in, and dropped
            z = torch.where(here, zt, self.vocabulary.ancestor(x0, l))
            surprise = (
                self._decode_surprise(dist, x0, z)
                if l == 1
                else self._parent_surprise(dist, x0, z, l)
            )
            value = torch.where(
                here, surprise, torch.zeros_like(surprise) if value is None else value
            )
        return (
            torch.zeros(x0.shape, dtype=torch.float64, device=x0.device) if value is None else value
        )

    def _parent_surprise(
        self, dist: CleanDistribution, x0: Tensor, zt: Tensor, level: int
    ) -> Tensor:
        """The same at one level >= 2: the state below is known only up to its kernel."""
        vocabulary, below = self.vocabulary, level - 1
        log_mass = dist.log_mass(below)
        nodes = vocabulary.offsets[below] + torch.arange(
            vocabulary.level_sizes[below], device=zt.device
        )
        onward = self._matrix(below, level, nodes, zt).to(log_mass.dtype).log()
        right = vocabulary.ancestor(x0, below).unsqueeze(-1) == nodes
        truth = right.double() * self.parents.sure[0][below] + self.parents.stray_at(
            0, below, nodes
        )
        log_truth = (truth.to(log_mass.dtype).log() + onward).log_softmax(-1)
        log_model = self.parents.log_spread(0, below, log_mass) + onward
        # a prediction that rules z_t out has no state below it: the divergence is infinite
        possible = (log_model > -torch.inf).any(-1, keepdim=True)
        log_model = where_or_zero(possible, log_model).log_softmax(-1)
        read = log_truth.isfinite()
        divergence = torch.where(
            read, log_truth.exp() * (log_truth - where_or_zero(read, log_model)), 0.0
        ).sum(-1)
        return torch.where(possible.squeeze(-1), divergence, torch.inf)

    def _matrix(self, i: int, j: int, nodes: Tensor, zt: Tensor) -> Tensor:
        """[r,n_i] kappa_ij(y, z_t) for all nodes y of level i."""
        right = self.vocabulary.ancestor(nodes, j) == zt.unsqueeze(-1)
        return self.parents.sure[i][j] * right.double() + self.parents.stray_at(i, j, zt).unsqueeze(
            -1
        )

    def _decode_surprise(self, dist: CleanDistribution, x0: Tensor, zt: Tensor) -> Tensor:
        """-ln P(x0 | z_t) for xi < 1: words are certain, a node divides by what the law expects of it."""
        level = self.vocabulary.level_of(zt)
        (sure, stray), word = self.parents.of_words(zt), level == 0
        right = self.vocabulary.ancestor(x0, level) == zt
        log_evidence = (sure * right + stray).log()
        # where nothing strays the mass of a node may underflow, and a bound that reads ln 0 there would be -inf
        log_mass, strays = dist.log_prob(zt), stray > 0
        spread = torch.where(strays, sure * log_mass.exp() + stray, 1.0)
        log_expected = torch.where(strays, spread.log(), sure.log() + log_mass)
        log_p = dist.log_prob(x0)
        # a token that the prediction rules out costs infinity, also where it rules out its node
        read = ~word & log_p.isfinite()
        surprise = where_or_zero(read, log_expected) - where_or_zero(read, log_evidence + log_p)
        return torch.where(word, 0.0, torch.where(log_p.isfinite(), surprise, torch.inf))

    def decode_nll(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        if isinstance(prediction, Score):
            return super().decode_nll(prediction, x0, zt, t)
        return (
            -prediction.log_child(zt, x0)
            if self.parents.certain
            else self._decode_surprise(prediction, x0, zt)
        )

    def closing_kl(self, prediction: Prediction, x0: Tensor, t: Tensor) -> Tensor:
        if isinstance(prediction, Score) or not self.parents.certain:
            return super().closing_kl(prediction, x0, t)
        pi, total = self.clock.pi(t), torch.zeros_like(t)
        for level in range(self.vocabulary.num_levels):
            share = pi[:, level]
            log_p = where_or_zero(
                share > 0, prediction.log_prob(self.vocabulary.ancestor(x0, level))
            )
            total = total - share * log_p
        return total

    def information(self, t: Tensor) -> Tensor:
        """sum_l pi_l(t) I(X; node at level l): the level itself says nothing of the token."""
        return self.clock.pi(t) @ self._level_information

    def information_lost(self, t: Tensor) -> Tensor:
        """sum_l (pi_l(t) - pi_l(0)) (I(X; X) - I(X; node at level l)): no term cancels another."""
        levels = self._level_information
        gained = self.clock.pi(t) - self.clock.pi(torch.zeros_like(t))
        return gained @ (levels[0] - levels)

    def change_probability(self, t: Tensor) -> Tensor:
        return self.clock.cdf(t)[:, 0]

    @cached_property
    def _level_information(self) -> Tensor:
        """[L+1] I(X; node at level l) in nats for X uniform over the tokens, the node drawn from kappa_0l(X, .)."""
        reference = uniform_reference(self.vocabulary.num_tokens)
        dist = DenseDistribution(reference, self.vocabulary)
        levels = range(self.vocabulary.num_levels + 1)
        return torch.stack(
            [self._information_at(level, dist.log_mass(level)[0].exp()) for level in levels]
        )

    def _information_at(self, level: int, mass: Tensor) -> Tensor:
        """H(node) - H(node | X), where `mass` [n] is the probability of each node as the right ancestor."""
        stray = self.parents.stray[0][level]
        if stray is None:
            return -torch.special.xlogy(mass, mass).sum()
        sure = self.parents.sure[0][level]
        spread = sure * mass + stray
        # given X all nodes have their stray share, and the right ancestor has `sure` in addition
        at_right = torch.special.xlogy(sure + stray, sure + stray) - torch.special.xlogy(
            stray, stray
        )
        given = torch.special.xlogy(stray, stray).sum() + (mass * at_right).sum()
        return given - torch.special.xlogy(spread, spread).sum()

    def active(self, zt: Tensor) -> Tensor:
        return self.vocabulary.level_of(zt) > 0

    def trained_part(self, zt: Tensor) -> Tensor:
        trained = TrainedPart.BELOW_NODE if self.parents.certain else TrainedPart.ALL
        whole = torch.where(zt == self.vocabulary.root, int(TrainedPart.ALL), int(trained))
        return torch.where(self.active(zt), whole, int(TrainedPart.NONE))

    def scope(self, zt: Tensor) -> Tensor:
        if not self.parents.certain:
            return torch.full_like(zt, self.vocabulary.root)
        # nothing is open below a word; where one is read at all (a clock that does not close), its parent can be asked
        return torch.where(self.active(zt), zt, self.vocabulary.parent(zt))

    @property
    def is_monotone(self) -> bool:
        return self.parents.certain

    # ------------------------------------------------------------------ reverse

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """The level at s is drawn first, without the network: P(i | j) = pi_i(s) K_ij(s,t) / pi_j(t); then the node."""
        level = self.vocabulary.level_of(zt)
        pick = level.unsqueeze(-1)
        arrive = self.clock.transition(s, t).gather(
            -1, pick.unsqueeze(1).expand(-1, self.clock.num_levels + 1, 1)
        )
        target = draw_index(self.clock.pi(s) * arrive.squeeze(-1), u[:, 0])
        return self._down_to(query, zt, target, u[:, 1])

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        target = torch.zeros_like(zt)

        def draw(prediction: Prediction, z: Tensor, target: Tensor, t: Tensor, u: Tensor) -> Tensor:
            if isinstance(prediction, Score):
                return draw_index(self._log_decode_weights(prediction, z, t).softmax(-1), u)
            return self._draw_below(prediction, z, target, u)

        return self._descend(query, zt, target, draw, target, t, u[:, 0])

    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """When the row entered its level: an event goes one level down, at the rate F_l'/pi_l, free of the network."""
        level, s = self.vocabulary.level_of(zt), torch.zeros_like(t)
        above = (level > 0).nonzero().squeeze(-1)
        if len(above):
            s[above] = self.clock.entry_time(level[above], t[above], u[above])
        return s

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self._down_to(query, zt, (self.vocabulary.level_of(zt) - 1).clamp(min=0), u[:, 0])

    def _down_to(self, query: Query, zt: Tensor, target: Tensor, u: Tensor) -> Tensor:
        """Draw the state at level `target` given z_t."""

        def draw(prediction: Prediction, z: Tensor, target: Tensor, u: Tensor) -> Tensor:
            return self._draw_below(
                require_distribution(prediction, "TreeProcess.step"), z, target, u
            )

        return self._descend(query, zt, target, draw, target, u)

    def _descend(
        self,
        query: Query,
        zt: Tensor,
        target: Tensor,
        draw: Callable[..., Tensor],
        *per_row: Tensor,
    ) -> Tensor:
        """Replace z_t by draw(prediction, z_t, *per_row) if the target level is below it; query no other row."""
        moving = (target < self.vocabulary.level_of(zt)).nonzero().squeeze(-1)
        zs = zt.clone()
        if len(moving):
            z = zt[moving]
            values = [value[moving] for value in per_row]
            zs[moving] = query(moving, self.scope(z), draw, z, *values)
        return zs

    def _draw_below(self, dist: CleanDistribution, zt: Tensor, target: Tensor, u: Tensor) -> Tensor:
        if self.parents.certain or self.decoding == "within":
            return dist.draw(zt, target, u)
        if self.decoding == "free":
            return dist.draw(torch.full_like(zt, self.vocabulary.root), target, u)
        drawn, level = zt.clone(), self.vocabulary.level_of(zt)
        for i in range(self.vocabulary.num_levels):
            for j in range(i + 1, self.vocabulary.num_levels + 1):
                rows = ((target == i) & (level == j)).nonzero().squeeze(-1)
                if len(rows):
                    weights = self._weights_below(dist.log_mass(i)[rows], zt[rows], i, j)
                    drawn[rows] = self.vocabulary.offsets[i] + draw_index(weights, u[rows])
        return drawn

    def _weights_below(self, log_mass: Tensor, zt: Tensor, i: int, j: int) -> Tensor:
        """[r,n_i] unnormalised law of the state at level i below z_t at level j, by the decoding rule."""
        nodes = self.vocabulary.offsets[i] + torch.arange(log_mass.shape[1], device=zt.device)
        kappa = self._matrix(i, j, nodes, zt)
        if self.decoding == "bayes":
            return (self.parents.log_spread(0, i, log_mass) + kappa.log()).softmax(-1)
        inside = self.vocabulary.ancestor(nodes, j) == zt.unsqueeze(-1)
        own = log_mass.masked_fill(~inside, -torch.inf).softmax(-1)
        if bool(inside.all()):
            return own
        others = log_mass.masked_fill(inside, -torch.inf).softmax(-1).nan_to_num(0.0)
        right = self.parents.sure[i][j] + self.parents.stray_at(i, j, zt).unsqueeze(-1)
        return right * own + (1.0 - right) * others

    # ------------------------------------------------------------------ parts

    def _occupation(self, zt: Tensor, t: Tensor) -> Tensor:
        """[r] pi_l(t), l the level of z_t."""
        return (
            evaluate_per_time(self.clock.pi, t)
            .gather(-1, self.vocabulary.level_of(zt).unsqueeze(-1))
            .squeeze(-1)
        )

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


def _checked_xi(xi: float | Sequence[float], num_levels: int) -> tuple[float, ...]:
    values = (
        (float(xi),) * num_levels if isinstance(xi, (int, float)) else tuple(float(x) for x in xi)
    )
    if len(values) == num_levels - 1:
        values = (*values, 1.0)
    if len(values) != num_levels or not all(0.0 < x <= 1.0 for x in values):
        raise ArgumentError(
            f"TreeProcess: xi must be one number in (0, 1], or one for each of the {num_levels} levels above the words; "
            f"got {xi}. xi is the probability that a position climbs to its own parent; 1 is the plain tree."
        )
    return values
