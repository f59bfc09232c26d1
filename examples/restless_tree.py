"""A process of one's own in closed form: a tree with uniform noise inside its levels.

    python examples/restless_tree.py            # holds two small instances to every law that a process must obey

A word climbs to its cluster, then to the mask, and until it has climbed to level `below` it is redrawn at random among
the words under its ancestor there: among its cluster for below = 1, among all words for below = 2 on a tree of two levels.
What is written here is a marginal (both ways), rates, transitions and a draw. Loss, bound, samplers and checks follow:

    ddiff.run(recipe, vocabulary=vocabulary, process=RestlessTree(vocabulary, clock, redrawing=0.5))
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
    """Words climb by `clock`, and their levels under `below` are redrawn at the rate redrawing / (1 - t).

    Under the node y that is shown stands a word; redrawn, it is any word under the same ancestor at level `below`, so that
    y becomes a relative z with the share of that ancestor's words which z has. With B_t = (1 - t)^redrawing

        q_t(z|x) = pi_l(t) ( B_t 1[a_l(x) = z] + (1 - B_t) share(z) 1[same ancestor] )    at levels l under `below`
                   pi_l(t) 1[a_l(x) = z]                                                  at the others

    and K(s,t) is the same with B_t/B_s and the clock's transition. redrawing = 0 is the plain tree; below = 1 on words and
    a mask is the gamma-hybrid of arXiv 2504.06416.
    """

    uniforms_per_sample = 3

    def __init__(
        self, vocabulary: Vocabulary, clock: LevelClock, redrawing: float, below: int = 1
    ) -> None:
        if not 0.0 <= redrawing <= 20.0 or not 1 <= below <= vocabulary.num_levels:
            raise ArgumentError(
                f"RestlessTree: redrawing must be a rate in [0, 20] and below a level in 1..{vocabulary.num_levels} of the "
                f"tree; got {redrawing} and {below}. below = 1 redraws a word among those of its own cluster."
            )
        self.vocabulary, self.clock, self.redrawing, self.below = (
            vocabulary,
            clock,
            redrawing,
            below,
        )
        self.prior = Prior.point(vocabulary.root, vocabulary.num_states)
        self.closes_at_clean, self.closes_at_prior = clock.closes_at_clean, clock.closes_at_prior
        self.parents = StochasticParents(vocabulary, (1.0,) * vocabulary.num_levels)

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        dist, states = DenseDistribution(log_p, self.vocabulary), self._states(t)
        mass = torch.cat(
            [dist.log_mass(level) for level in range(self.vocabulary.num_levels + 1)], -1
        )
        occupied = self.clock.pi(t).log()[:, self.vocabulary.level_of(states)]
        lost = self._lost(torch.zeros_like(t), t).unsqueeze(-1) * self.restless(states)
        redrawn = lost.log() + self.share(states).log() + mass[:, self.family(states)]
        stayed = torch.log1p(-lost) + mass
        never = stayed.isneginf() & redrawn.isneginf()  # the sum of two such has no gradient: 0/0
        either = stayed.masked_fill(never, 0.0).logaddexp(redrawn.masked_fill(never, 0.0))
        return (occupied + either.masked_fill(never, -torch.inf)).to(log_p.dtype)

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        """The marginal read the other way: the engine could derive it, word by word."""
        words, level = (
            torch.arange(self.vocabulary.num_tokens, device=zt.device),
            self.vocabulary.level_of(zt),
        )
        above = self.vocabulary.ancestor(words, level.unsqueeze(-1)) == zt.unsqueeze(-1)
        at_family = self.vocabulary.ancestor(words, level.clamp(min=self.below).unsqueeze(-1))
        related = at_family == self.family(zt).unsqueeze(-1)
        lost, occupied = self._lost(torch.zeros_like(t), t) * self.restless(zt), self.clock.pi(t)
        kept, redrawn = (part.unsqueeze(-1) for part in (1.0 - lost, lost * self.share(zt)))
        return (occupied.gather(-1, level.unsqueeze(-1)) * (kept * above + redrawn * related)).log()

    def rates(self, t: Tensor) -> Kernel:
        t = interior(t)
        nobody_climbs = torch.eye(self.vocabulary.num_levels + 1).to(t).expand(len(t), -1, -1)
        redrawn = (self.redrawing / (1.0 - t)) * Redrawing(nobody_climbs, self)
        return TreeKernel(self.clock.generator(t), self.parents) + redrawn

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        climbed = self.clock.transition(s, t)
        return TreeKernel(climbed, self.parents) + self._lost(s, t) * Redrawing(climbed, self)

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """The level, whether the word was redrawn, and which one it became."""
        level = (u[:, :1] < self.clock.climbed(t)).sum(-1)
        first, last = self.vocabulary.node_range(self.family(x0), 0)
        relative = self.vocabulary.order(0, x0.device)[first + (u[:, 2] * (last - first)).long()]
        redrawn = u[:, 1] < self._lost(torch.zeros_like(t), t)
        return self.vocabulary.ancestor(torch.where(redrawn, relative, x0), level)

    # ------------------------------------------------------------------ who is redrawn, and among whom

    def restless(self, states: Tensor) -> Tensor:
        """bool like states: those under level `below`."""
        return self.vocabulary.level_of(states) < self.below

    def family(self, states: Tensor) -> Tensor:
        """The node whose words a state is redrawn among."""
        return self.vocabulary.ancestor(
            states, self.vocabulary.level_of(states).clamp(min=self.below)
        )

    def share(self, states: Tensor) -> Tensor:
        """Of the words of its family, those under each state."""
        return self._num_words(states) / self._num_words(self.family(states))

    def _num_words(self, nodes: Tensor) -> Tensor:
        first, last = self.vocabulary.node_range(nodes, 0)
        return (last - first).double()

    def _lost(self, s: Tensor, t: Tensor) -> Tensor:
        """[r] 1 - B_t / B_s."""
        log_kept = torch.special.xlogy(self.redrawing, (1.0 - t) / (1.0 - s).clamp(min=1e-300))
        return torch.where(s < t, -torch.expm1(log_kept), 0.0)

    def _states(self, like: Tensor) -> Tensor:
        return torch.arange(self.vocabulary.num_states, device=like.device)

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        pair, three = (
            HierarchicalVocabulary([[0, 1, 0, 1, 0]]),
            HierarchicalVocabulary([[2, 0, 1, 0, 2], [1, 0, 1]]),
        )
        return [
            cls(pair, LogTimeClock((1.0, 1.0)), redrawing=0.7),
            cls(three, LogTimeClock((1.5, 1.0, 0.7)), redrawing=1.3, below=2),
        ]


class Redrawing(Kernel):
    """Climb by `levels` [r,L+1,L+1], then be redrawn, less climbing alone: K[y,z] = levels (share(z) 1[family] - 1[above]).

    With the identity it is the generator of redrawing; times 1 - B it is what redrawing adds to a transition of the tree.
    """

    def __init__(self, levels: Tensor, process: RestlessTree) -> None:
        self.levels, self.process, self.num_states = levels, process, process.vocabulary.num_states

    def row(self, ids: Tensor) -> Tensor:
        return self._entries(ids.unsqueeze(-1), torch.arange(self.num_states, device=ids.device))

    def column(self, ids: Tensor) -> Tensor:
        return self._entries(torch.arange(self.num_states, device=ids.device), ids.unsqueeze(-1))

    def apply(self, vector: Tensor) -> Tensor:
        states = torch.arange(self.num_states, device=vector.device)
        level, family = self.process.vocabulary.level_of(states), self.process.family(states)
        climbed = TreeKernel(self.levels, self.process.parents).apply(
            vector
        ) * self.process.restless(states)
        place = level * self.num_states + family  # a state is redrawn within its level
        together = vector.new_zeros(len(vector), int(place.max()) + 1).index_add(
            -1, place, climbed
        )[:, place]
        return together * self.process.share(states).to(vector.dtype) - climbed

    def _entries(self, y: Tensor, z: Tensor) -> Tensor:
        """K[y,z] for ids y and z that broadcast to [r,S]."""
        process, vocabulary = self.process, self.process.vocabulary
        row, to = (
            torch.arange(len(self.levels), device=z.device).unsqueeze(-1),
            vocabulary.level_of(z),
        )
        climbs = self.levels[row, vocabulary.level_of(y), to] * process.restless(z)
        related = process.family(y) == process.family(z)
        return climbs * (process.share(z) * related - (vocabulary.ancestor(y, to) == z).double())

    def _num_rows(self) -> int:
        return len(self.levels)


if __name__ == "__main__":
    for process in RestlessTree.examples():
        reports = check_process(process)
        assert_laws(reports)
        print(f"{process.vocabulary}: {len(reports)} laws hold")
