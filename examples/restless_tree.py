"""A process in closed form: a tree with uniform noise inside its levels.

    python examples/restless_tree.py        # test two small instances against every law

A token becomes its cluster, then the mask. At levels under `below`, it is also redrawn uniformly
among the tokens that have the same ancestor at level `below`:

- below = 1: among the tokens of its cluster;
- below = 2, on a tree with levels token, cluster, mask: among all tokens.

The class defines the marginal q_t(z|x) as a function of z and as a function of x, rates,
transitions and draws. ddiff derives loss, bound, samplers and checks:

    process = RestlessTree(vocabulary, clock, redrawing=0.5)
    ddiff.run(recipe, vocabulary=vocabulary, process=process)

Symbols: a_l(x) is the ancestor of token x at level l, pi_l(t) the probability of level l at time t,
B_t = (1 - t)^redrawing the probability that a token was never redrawn by t. The family of a state
is its ancestor at level `below`, and share(z) the share of the family's tokens that are under z.
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
    """Tree process whose levels under `below` are redrawn at the rate redrawing / (1 - t).

    q_t(z|x) for a state z of level l is

        l < below    pi_l(t) ( B_t 1[a_l(x) = z] + (1 - B_t) share(z) 1[x is in the family of z] )
        l >= below   pi_l(t) 1[a_l(x) = z]

    and the transition from s to t is the same with B_t/B_s and the clock's transition.
    redrawing = 0 is the plain tree; below = 1 on tokens and a mask is the gamma-hybrid of
    arXiv 2504.06416.
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
        """Return log q_t(z_t | x) for every x; the engine could also derive it token by token."""
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
        """Draw the level, whether the token was redrawn, and the token; u [r,3] in this order."""
        level = (u[:, :1] < self.clock.cdf(t)).sum(-1)
        first, last = self.vocabulary.node_range(self.family(x0), 0)
        # Tokens in tree order: those of a family are a contiguous range.
        place = first + (u[:, 2] * (last - first)).long()
        other = self.vocabulary.order(0, x0.device)[place]
        redrawn = u[:, 1] < self._lost(torch.zeros_like(t), t)
        return self.vocabulary.ancestor(torch.where(redrawn, other, x0), level)

    # ------------------------------------------------------------------ families

    def is_restless(self, states: Tensor) -> Tensor:
        """Return whether each state is below level `below`."""
        return self.vocabulary.level_of(states) < self.below

    def family(self, states: Tensor) -> Tensor:
        """Return the ancestor at level `below`, among whose tokens a state is redrawn.

        For states at level `below` or higher this is the state itself.
        """
        level = self.vocabulary.level_of(states).clamp(min=self.below)
        return self.vocabulary.ancestor(states, level)

    def share(self, states: Tensor) -> Tensor:
        """Return the fraction of the family's tokens that are under each state."""
        return self._num_tokens(states) / self._num_tokens(self.family(states))

    def _num_tokens(self, nodes: Tensor) -> Tensor:
        first, last = self.vocabulary.node_range(nodes, 0)
        return (last - first).double()

    def _lost(self, s: Tensor, t: Tensor) -> Tensor:
        """Return 1 - B_t/B_s [r], the probability of a redraw between s and t."""
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
    """Change of the transition of the tree if tokens are redrawn.

    levels [r,L+1,L+1] holds transition probabilities between levels. For states y and z,

        K[y,z] = levels[level of y, level of z] (share(z) 1[same family] - 1[z is an ancestor of y])

    if z is below level `below`, and 0 otherwise. If `levels` is the identity, K is the generator of
    redrawing. The transition of the process is that of the tree plus (1 - B_t/B_s) K.
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
        """Return K[y,z] for ids y and z that broadcast to [r,S]."""
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
