"""Forward processes for tests of the conformance laws, in addition to the shipped processes."""

from __future__ import annotations

import torch
from torch import Tensor

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.components import (
    ComponentProcess,
    MixtureProcess,
    mask_distribution,
    token_distribution,
)
from ddiff.core.dense import DenseProcess
from ddiff.core.interpolating import InterpolatingProcess
from ddiff.core.kernel import DenseKernel, Kernel
from ddiff.core.numerics import draw_index, interior
from ddiff.core.process import ForwardProcess, Prior
from ddiff.core.schedule import CosineSchedule, LinearSchedule, PowerSchedule
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary

# four leaf tokens under two nodes, unbalanced, not in tree order
PAIR = HierarchicalVocabulary([[0, 1, 0, 0]])
THREE = HierarchicalVocabulary([[2, 0, 1, 0, 1], [1, 0, 1]])
FOUR = HierarchicalVocabulary([[2, 0, 1, 0], [0, 0, 1], [0, 1]])
# a level of one node below the root
SINGLE = HierarchicalVocabulary([[0, 0, 0], [0]])


class HumpedNoise(InterpolatingProcess):
    """Process with mask noise and uniform noise, in which uniform noise is largest at t = 1/2.

    q_t(. | x) = [(1-t) x + t mask + c u] / (1 + c), where u is the uniform distribution of tokens
    and c is proportional to sqrt(t(1-t)). `share` is c/(1 + c) at t = 1/2.
    """

    def __init__(self, share: float = 0.2) -> None:
        self.vocabulary = FlatVocabulary(3)
        self.height = 2.0 * share / (1.0 - share)
        self.prior = Prior.point(3, 4)

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - t) / (1.0 + self._hump(t))

    def noise(self, t: Tensor) -> Tensor:
        hump = self._hump(t).unsqueeze(-1)
        parts = torch.cat([hump / 3.0 * torch.ones(3, dtype=t.dtype), t.unsqueeze(-1)], -1)
        return parts / (1.0 + hump)

    def _hump(self, t: Tensor) -> Tensor:
        return self.height * (t * (1.0 - t)).sqrt()


class HumpedComponents(ComponentProcess):
    """`HumpedNoise` with a power gamma, as a process of two components: mask and uniform token.

    This is the process of arXiv 2503.04482 (GIDD).
    """

    def __init__(self, vocabulary: FlatVocabulary, share: float = 0.2, gamma: float = 1.0) -> None:
        self.height = 2.0**gamma * share / (1.0 - share)
        self.gamma = gamma
        super().__init__(
            vocabulary, [mask_distribution(vocabulary), token_distribution(vocabulary)]
        )

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - t) / (1.0 + self._hump(t))

    def coefficients(self, t: Tensor) -> Tensor:
        hump = self._hump(t)
        return torch.stack([t, hump], -1) / (1.0 + hump).unsqueeze(-1)

    def _hump(self, t: Tensor) -> Tensor:
        return self.height * (t * (1.0 - t)) ** (self.gamma / 2.0)


class CorruptedThenMasked(ComponentProcess):
    """Process whose tokens are replaced at t = 0 and masked later.

    q_t(. | x) = (1-t) [(1-e) x + e noise] + t mask, where e is the argument `share`. The state at
    t = 0 is therefore not always the clean token.
    """

    def __init__(
        self, vocabulary: FlatVocabulary, share: float, noise: Tensor | None = None
    ) -> None:
        self.share = share
        super().__init__(
            vocabulary,
            [
                mask_distribution(vocabulary),
                token_distribution(vocabulary) if noise is None else noise,
            ],
        )

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - self.share) * (1.0 - t)

    def coefficients(self, t: Tensor) -> Tensor:
        return torch.stack([t, self.share * (1.0 - t)], -1)


class ShuffledThenMasked(ForwardProcess):
    """Process whose tokens are redrawn at one rate and masked at another rate; masks are final.

    The marginals are those of an interpolating process. The generator differs, since no token
    leaves the mask.
    """

    num_tokens = 3
    redraw = 0.6
    mask = 1.0

    def __init__(self) -> None:
        self.vocabulary = FlatVocabulary(self.num_tokens)
        self.prior = Prior.point(self.num_tokens, self.num_tokens + 1)

    def _finite(self, left: Tensor) -> Tensor:
        """Return transitions [r,S,S] from s to t, where `left` [r] is (1 - t)/(1 - s)."""
        size = self.num_tokens
        kept = (left**self.redraw)[:, None, None]
        unmasked = (left**self.mask)[:, None, None]
        tokens = kept * torch.eye(size).double() + (1.0 - kept) / size
        top = torch.cat([unmasked * tokens, (1.0 - unmasked).expand(-1, size, 1)], -1)
        bottom = torch.eye(size + 1, dtype=torch.float64)[-1].expand(len(left), 1, -1)
        return torch.cat([top, bottom], 1)

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        return (
            (log_p.exp().unsqueeze(1) @ self._finite(1.0 - t)[:, : self.num_tokens])
            .squeeze(1)
            .log()
        )

    def rates(self, t: Tensor) -> Kernel:
        size = self.num_tokens
        matrix = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        matrix[:size, :size] = self.redraw / size
        matrix[:size, size] = self.mask
        matrix -= matrix.sum(-1).diag()
        return DenseKernel(matrix / (1.0 - interior(t))[:, None, None])

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        return DenseKernel(self._finite(torch.where(s < t, (1.0 - t) / (1.0 - s), 1.0)))

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return draw_index(DenseKernel(self._finite(1.0 - t)).row(x0), u[:, 0])


def kimura(ts: float = 2.0, tv: float = 1.0) -> DenseProcess:
    """Build the nucleotide substitution process of Kimura (1980) on the states A, G, C, T.

    ts: rate of transitions (A-G, C-T). tv: rate of transversions.
    """
    matrix = torch.full((4, 4), tv, dtype=torch.float64)
    for a, b in ((0, 1), (2, 3)):
        matrix[a, b] = matrix[b, a] = ts
    matrix.fill_diagonal_(0.0)
    return DenseProcess(
        FlatVocabulary(4, mask=False), matrix - matrix.sum(-1).diag(), LinearSchedule()
    )


def uniform(num_tokens: int = 3, floor: float = 0.0) -> MixtureProcess:
    return MixtureProcess(
        FlatVocabulary(num_tokens, mask=False),
        LinearSchedule(floor),
        torch.full((num_tokens,), 1.0 / num_tokens),
    )


def masked(schedule: CosineSchedule | LinearSchedule | PowerSchedule) -> MixtureProcess:
    return MixtureProcess(FlatVocabulary(4), schedule, torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))


def trees() -> dict[str, TreeProcess]:
    """Build tree processes of one to four levels, with every kind of clock.

    xi, the probability that a node moves to its true parent, is 1 in some trees and below 1 in
    others.
    """
    log_time, three_powers = LogTimeClock, (0.8, 1.5, 3.0)
    powers = lambda *p: CdfClock([PowerSchedule(power) for power in p])  # noqa: E731
    made = {
        f"gamma {gamma}, xi {xi}": TreeProcess(PAIR, log_time((gamma, 1.0)), xi)
        for gamma in (0.5, 1.0, 2.0)
        for xi in (1.0, 0.9, 0.8)
    }
    for name, schedule in (
        ("linear", LinearSchedule()),
        ("cosine", CosineSchedule()),
        ("power", PowerSchedule(2.5)),
    ):
        made[f"one level, {name}"] = TreeProcess(FlatVocabulary(4), CdfClock([schedule]))
    return made | {
        "one level, log-time 0.5": TreeProcess(FlatVocabulary(4), log_time((0.5,))),
        "two levels, powers": TreeProcess(PAIR, powers(1.0, 2.0), 0.9),
        "two levels, never at the root": TreeProcess(
            PAIR, CdfClock([LinearSchedule(0.05), LinearSchedule(0.3)]), 0.9
        ),
        "two levels, xi below 1/n": TreeProcess(PAIR, log_time((1.0, 1.0)), 0.3),
        "one node below the root": TreeProcess(SINGLE, log_time((1.0, 2.0)), 0.8),
        "three levels, equal rates": TreeProcess(THREE, log_time((1.0, 1.0, 1.0))),
        "three levels, (1,2,1)": TreeProcess(THREE, log_time((1.0, 2.0, 1.0)), (0.8, 1.0)),
        "three levels, nearly equal": TreeProcess(THREE, log_time((1.0, 1.0001, 0.7)), (0.8, 0.9)),
        "three levels, powers": TreeProcess(THREE, powers(*three_powers)),
        "three levels, powers, xi": TreeProcess(THREE, powers(*three_powers), (0.85, 1.0)),
        "four levels": TreeProcess(FOUR, log_time((1.5, 1.0, 0.7, 1.0)), (0.9, 0.8, 1.0)),
    }


def others() -> dict[str, ForwardProcess]:
    """Build all processes whose vocabulary is not a tree."""
    examples = DenseProcess.examples()
    return {
        "mixture: mask, cosine": masked(CosineSchedule()),
        "mixture: mask, power": masked(PowerSchedule(0.5)),
        "mixture: uniform": uniform(),
        "mixture: uniform, never quite": uniform(floor=0.01),
        "mixture: uneven with a mask": MixtureProcess(
            FlatVocabulary(3), LinearSchedule(), torch.tensor([0.1, 0.2, 0.0, 0.7])
        ),
        "humped noise": HumpedNoise(),
        "components: humped": HumpedComponents(FlatVocabulary(3)),
        "components: humped, gamma 2": HumpedComponents(FlatVocabulary(3), 0.3, 2.0),
        "components: corrupted, then masked": CorruptedThenMasked(FlatVocabulary(3), 0.2),
        "components: corrupted unevenly": CorruptedThenMasked(
            FlatVocabulary(3), 0.3, torch.tensor([0.2, 0.5, 0.3, 0.0])
        ),
        "shuffled, then masked": ShuffledThenMasked(),
        "kimura": kimura(),
        "dense, one direction": examples[0],
        "dense, not commuting": examples[1],
    }


EVERY: dict[str, ForwardProcess] = {**trees(), **others()}
