"""A process in closed form: a tree with uniform noise inside its levels.

    python examples/restless_tree.py        # run the conformance checks on two small trees

A token (level 0) becomes its cluster (level 1), then the mask (level 2). On larger trees there are
more levels of clusters. As long as the state is lower than the level `below`, its token is also
redrawn uniformly among the tokens that have the same ancestor at the level `below`:

- below = 1: among the tokens of its cluster;
- below = 2, on a tree with levels token, cluster, mask: among all tokens.

The class `RestlessTree` defines the marginal q_t(z|x), the rates, the transitions and a way to
sample. ddiff derives loss, bound, samplers and checks:

    process = RestlessTree(vocabulary, clock, redrawing=0.5)
    ddiff.run(recipe, vocabulary=vocabulary, process=process)

Symbols:

    a_l(x)      ancestor of token x at level l
    pi_l(t)     probability that a position is at level l at time t
    B_t         (1 - t)^redrawing, the probability that a token was never redrawn until time t
    family(z)   ancestor of state z at the level `below`, or z itself if it is at that level or
                higher; a token is redrawn among the tokens of its family
    share(z)    number of tokens under z, divided by the number of tokens under family(z)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    DenseDistribution,
    ForwardProcess,
    HierarchicalVocabulary,
    Kernel,
    LevelClock,
    LogTimeClock,
    Prior,
    StochasticParents,
    TreeKernel,
    Vocabulary,
    interior,
)
from ddiff.testing import assert_laws, check_process


class RestlessTree(ForwardProcess):
    """Tree process in which tokens are also redrawn, at the rate redrawing / (1 - t).

    In the symbols of the docstring of this module, the marginal q_t(z|x) of a state z at level l is

        l < below    pi_l(t) ( B_t 1[a_l(x) = z] + (1 - B_t) share(z) 1[x is under family(z)] )
        l >= below   pi_l(t) 1[a_l(x) = z]

    Here pi_l(t) is the probability of level l, a_l(x) the ancestor of x at level l, and B_t the
    probability that a token was never redrawn until time t. A transition from time s to time t has
    the same form, with B_t/B_s in place of B_t and the transition probabilities between levels in
    place of pi_l(t).

    With redrawing = 0 nothing is redrawn. With below = 1 on a tree of tokens and a mask, the
    process is the gamma-hybrid of arXiv 2504.06416.

    Args:
        clock: defines when positions move from level to level.
        redrawing: factor of the rate at which tokens are redrawn.
        below: states at levels lower than this are redrawn.
    """

    uniforms_per_sample = 3

    def __init__(
        self, vocabulary: Vocabulary, clock: LevelClock, redrawing: float, below: int = 1
    ) -> None:
        if not 0.0 <= redrawing <= 20.0 or not 1 <= below <= vocabulary.num_levels:
            raise ArgumentError(
                "RestlessTree: redrawing must be a rate in [0, 20] and below a level in "
                f"1..{vocabulary.num_levels} of the tree; got {redrawing} and {below}. "
                "below = 1 redraws a token among those of its cluster."
            )
        self.vocabulary = vocabulary
        self.clock = clock
        self.redrawing = redrawing
        self.below = below
        self.prior = Prior.point(vocabulary.root, vocabulary.num_states)
        self.closes_at_clean = clock.closes_at_clean
        self.closes_at_prior = clock.closes_at_prior
        self.parents = StochasticParents(vocabulary, (1.0,) * vocabulary.num_levels)

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        dist = DenseDistribution(log_p, self.vocabulary)
        levels = range(self.vocabulary.num_levels + 1)
        mass = torch.cat([dist.log_mass(level) for level in levels], -1)
        states = self._states(t)
        log_level = self.clock.pi(t).log()[:, self.vocabulary.level_of(states)]
        lost = self._lost(torch.zeros_like(t), t).unsqueeze(-1) * self.is_restless(states)
        redrawn = lost.log() + self.share(states).log() + mass[:, self.family(states)]
        kept = torch.log1p(-lost) + mass
        # Where both terms are -inf, the gradient of logaddexp would be 0/0.
        never = kept.isneginf() & redrawn.isneginf()
        either = kept.masked_fill(never, 0.0).logaddexp(redrawn.masked_fill(never, 0.0))
        return (log_level + either.masked_fill(never, -torch.inf)).to(log_p.dtype)

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        """Return log q_t(z_t | x) [r,V] for every token x.

        This method is optional: ddiff could derive it from `log_marginal`, but more slowly.
        """
        tokens = torch.arange(self.vocabulary.num_tokens, device=zt.device)
        level = self.vocabulary.level_of(zt).unsqueeze(-1)
        is_under = self.vocabulary.ancestor(tokens, level) == zt.unsqueeze(-1)
        family = self.vocabulary.ancestor(tokens, level.clamp(min=self.below))
        in_family = family == self.family(zt).unsqueeze(-1)
        lost = self._lost(torch.zeros_like(t), t) * self.is_restless(zt)
        kept = (1.0 - lost).unsqueeze(-1)
        redrawn = (lost * self.share(zt)).unsqueeze(-1)
        level_probability = self.clock.pi(t).gather(-1, level)
        return (level_probability * (kept * is_under + redrawn * in_family)).log()

    def rates(self, t: Tensor) -> Kernel:
        t = interior(t)
        no_moves = torch.eye(self.vocabulary.num_levels + 1).to(t).expand(len(t), -1, -1)
        redrawn = (self.redrawing / (1.0 - t)) * Redrawing(no_moves, self)
        return TreeKernel(self.clock.generator(t), self.parents) + redrawn

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        levels = self.clock.transition(s, t)
        return TreeKernel(levels, self.parents) + self._lost(s, t) * Redrawing(levels, self)

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw the states z_t [r] given the clean tokens x0 [r].

        u [r,3] are uniforms: u[:,0] selects the level, u[:,1] decides whether the token was
        redrawn, and u[:,2] selects the new token.
        """
        level = (u[:, :1] < self.clock.cdf(t)).sum(-1)
        first, last = self.vocabulary.node_range(self.family(x0), 0)
        # Tokens in tree order: those of a family are a contiguous range.
        place = first + (u[:, 2] * (last - first)).long()
        other = self.vocabulary.order(0, x0.device)[place]
        redrawn = u[:, 1] < self._lost(torch.zeros_like(t), t)
        return self.vocabulary.ancestor(torch.where(redrawn, other, x0), level)

    # ------------------------------------------------------------------ families

    def is_restless(self, states: Tensor) -> Tensor:
        """Return True for each state at a level lower than `below`; these states are redrawn."""
        return self.vocabulary.level_of(states) < self.below

    def family(self, states: Tensor) -> Tensor:
        """Return the ancestor of each state at the level `below`.

        A token is redrawn among the tokens under this ancestor. For states at the level `below` or
        higher the result is the state itself.
        """
        level = self.vocabulary.level_of(states).clamp(min=self.below)
        return self.vocabulary.ancestor(states, level)

    def share(self, states: Tensor) -> Tensor:
        """Return share(z) for each state z, as defined in the docstring of the module."""
        return self._num_tokens(states) / self._num_tokens(self.family(states))

    def _num_tokens(self, nodes: Tensor) -> Tensor:
        first, last = self.vocabulary.node_range(nodes, 0)
        return (last - first).double()

    def _lost(self, s: Tensor, t: Tensor) -> Tensor:
        """Return 1 - B_t/B_s [r], the probability that a token is redrawn between s and t."""
        log_kept = torch.special.xlogy(self.redrawing, (1.0 - t) / (1.0 - s).clamp(min=1e-300))
        return torch.where(s < t, -torch.expm1(log_kept), 0.0)

    def _states(self, like: Tensor) -> Tensor:
        return torch.arange(self.vocabulary.num_states, device=like.device)

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        two = HierarchicalVocabulary([[0, 1, 0, 1, 0]])
        three = HierarchicalVocabulary([[2, 0, 1, 0, 2], [1, 0, 1]])
        return [
            cls(two, LogTimeClock((1.0, 1.0)), redrawing=0.7),
            cls(three, LogTimeClock((1.5, 1.0, 0.7)), redrawing=1.3, below=2),
        ]


class Redrawing(Kernel):
    """Kernel K that redrawing adds to the transition of a tree process.

    The transition of the process from time s to time t is that of the tree process without
    redrawing, plus (1 - B_t/B_s) K. If z is lower than the level `below`, the entry of K from state
    y to state z is

        K[y,z] = levels[level of y, level of z] ( share(z) 1[family(y) = family(z)]
                                                  - 1[z is y or an ancestor of y] )

    Otherwise it is 0. `levels` [r,L+1,L+1] are transition probabilities between levels. If `levels`
    is the identity, K is the generator of redrawing. The docstring of this module defines B_t,
    share and family.
    """

    def __init__(self, levels: Tensor, process: RestlessTree) -> None:
        self.levels = levels
        self.process = process
        self.num_states = process.vocabulary.num_states

    def row(self, ids: Tensor) -> Tensor:
        return self._entries(ids.unsqueeze(-1), torch.arange(self.num_states, device=ids.device))

    def column(self, ids: Tensor) -> Tensor:
        return self._entries(torch.arange(self.num_states, device=ids.device), ids.unsqueeze(-1))

    def apply(self, vector: Tensor) -> Tensor:
        process = self.process
        states = torch.arange(self.num_states, device=vector.device)
        moved = TreeKernel(self.levels, process.parents).apply(vector)
        moved = moved * process.is_restless(states)
        # A redraw keeps the level: sum over the states of one level and one family.
        group = process.vocabulary.level_of(states) * self.num_states + process.family(states)
        sums = vector.new_zeros(len(vector), int(group.max()) + 1).index_add(-1, group, moved)
        return sums[:, group] * process.share(states).to(vector.dtype) - moved

    def _entries(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the entries K[y,z] of this kernel K, for broadcastable ids of states y and z.

        The result has the shape [r,S].
        """
        process = self.process
        vocabulary = process.vocabulary
        row = torch.arange(len(self.levels), device=z.device).unsqueeze(-1)
        level = vocabulary.level_of(z)
        moves = self.levels[row, vocabulary.level_of(y), level] * process.is_restless(z)
        same_family = process.family(y) == process.family(z)
        is_ancestor = (vocabulary.ancestor(y, level) == z).double()
        return moves * (process.share(z) * same_family - is_ancestor)

    def _num_rows(self) -> int:
        return len(self.levels)


if __name__ == "__main__":
    for process in RestlessTree.examples():
        reports = check_process(process)
        assert_laws(reports)
        print(f"{process.vocabulary}: {len(reports)} laws hold")
