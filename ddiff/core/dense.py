"""The dense family: a user's own rate matrix, with everything else derived.

>>> from ddiff.core.vocabulary import FlatVocabulary
>>> chain = [[-1.0, 1.0], [2.0, -2.0]]
>>> process = DenseProcess(FlatVocabulary(2, mask=False), chain)      # bound, loss, samplers and checks follow
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddiff.core.kernel import DenseKernel, Kernel
from ddiff.core.numerics import LATEST, draw_index, interior, safe_log
from ddiff.core.oracle import propagate
from ddiff.core.process import REFERENCE_ENTRIES, ForwardProcess, Prior
from ddiff.core.schedule import LinearSchedule, Schedule
from ddiff.core.vocabulary import FlatVocabulary, Vocabulary
from ddiff.errors import ArgumentError

MAX_STATES = 512


class DenseProcess(ForwardProcess):
    """Any chain on up to 512 states.

    `matrix` is one generator [S,S], a tensor or nested lists (rows sum to 0, off-diagonal >= 0), run at the speed of
    `schedule`: Q_t = rate(t) matrix with rate = -alpha'/alpha, so that the total noise is -ln alpha; or a function
    t[r] -> [r,S,S] that gives Q_t itself (the schedule is then not used; Q_t must be continuous, since steps across a jump
    of it are as far off as they are long). The prior is q_1: the mean over clean tokens of
    their laws at t = 1, which `closes_at_prior` declares equal when they are within 1e-9. Cost O(S^3) per distinct time, so
    S is bounded.
    """

    steps = 512  # Magnus steps across an interval where generators do not commute: 1e-9 on random chains

    def __init__(
        self,
        vocabulary: Vocabulary,
        matrix: Tensor | Sequence[Sequence[float]] | Callable[[Tensor], Tensor],
        schedule: Schedule | None = None,
    ) -> None:
        self.vocabulary, self.schedule = vocabulary, schedule or LinearSchedule()
        self._function = matrix if callable(matrix) else None
        self._matrix = None if callable(matrix) else self._checked(_as_tensor(matrix))
        if self._function is not None:
            for seen in self._generator(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)):
                self._checked(seen)
        self._table = self._march() if self._matrix is None else None
        self._last_times: Tensor | None = None
        last = self._from_clean(torch.ones(1).double())[0, : vocabulary.num_tokens]
        self.prior = Prior(last.mean(0).clamp(min=0.0).log())
        self.closes_at_prior = bool((last - last.mean(0)).abs().max() < 1e-9)
        self.closes_at_clean = True

    def _checked(self, matrix: Tensor) -> Tensor:
        """A generator whose rows sum to 0 to the last digit: the caller's rounding must not leak probability."""
        size = self.vocabulary.num_states
        if size > MAX_STATES or matrix.shape != (size, size):
            raise ArgumentError(
                f"DenseProcess: matrix must be [S,S] for the {size} states of the vocabulary, S at most {MAX_STATES}; got "
                f"{tuple(matrix.shape)}. Larger spaces need a structured process (TreeProcess, InterpolatingProcess)."
            )
        off_diagonal = matrix - matrix.diagonal().diag()
        row_sums = matrix.sum(-1).abs().max()
        if (
            not matrix.isfinite().all()
            or off_diagonal.min() < 0
            or row_sums > 1e-6 * matrix.abs().max()
        ):
            raise ArgumentError(
                "DenseProcess: matrix must be a generator: finite, off-diagonal rates >= 0, rows that sum to 0 (row y "
                f"holds the rates from y); got a smallest rate of {float(off_diagonal.min()):.3g} and a row sum of "
                f"{float(row_sums):.3g}."
            )
        return matrix - matrix.sum(-1).diag()

    def _generator(self, t: Tensor) -> Tensor:
        t = interior(t)
        if self._function is not None:
            return self._function(t).double()
        assert self._matrix is not None
        return (-self.schedule.d_alpha(t) / self.schedule.alpha(t))[
            :, None, None
        ] * self._matrix.to(t.device)

    def _between(self, s: Tensor, t: Tensor) -> Tensor:
        """[r,S,S] the transition; each distinct pair of times is computed once."""
        start, stop, inverse = distinct_pairs(s, t)
        if self._matrix is None:
            return propagate(self._generator, start, stop, self.vocabulary.num_states, self.steps)[
                inverse
            ]
        log_alpha = lambda time: self.schedule.alpha(time.clamp(max=LATEST)).log()  # noqa: E731
        elapsed = log_alpha(start) - log_alpha(stop)
        return torch.matrix_exp(elapsed[:, None, None] * self._matrix.to(t.device))[inverse].clamp(
            min=0.0
        )

    def _march(self) -> tuple[Tensor, Tensor]:
        """Times [K] and the transitions [K,S,S] from 0 to them, so that a marginal costs one short step."""
        ends = torch.logit(interior(torch.tensor([0.0, 1.0], dtype=torch.float64)))
        knots = torch.sigmoid(
            torch.linspace(float(ends[0]), float(ends[1]), self.steps + 1, dtype=torch.float64)
        )
        moves = propagate(
            self._generator, knots[:-1], knots[1:], self.vocabulary.num_states, steps=4
        )
        reached = [torch.eye(self.vocabulary.num_states, dtype=torch.float64)]
        for move in moves:
            reached.append(reached[-1] @ move)
        return knots, torch.stack(reached)

    def _from_clean(self, t: Tensor) -> Tensor:
        """[r,S,S] the transition from 0 to t."""
        if self._table is None:
            return self._between(torch.zeros_like(t), t)
        times, inverse = torch.unique(t, return_inverse=True)
        knots, reached = (part.to(t.device) for part in self._table)
        before = (torch.searchsorted(knots, interior(times), right=True) - 1).clamp(
            0, len(knots) - 1
        )
        rest = propagate(self._generator, knots[before], times, self.vocabulary.num_states, steps=4)
        return (reached[before] @ rest)[inverse].clamp(min=0.0)

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        reached = self._from_clean(t)[:, : self.vocabulary.num_tokens].to(log_p.dtype)
        return safe_log((log_p.exp().unsqueeze(1) @ reached).squeeze(1))

    def information(self, t: Tensor) -> Tensor:
        """The mean over tokens x of KL( q_t(.|x) || q_t-bar ), with one transition for each time."""
        return self._of_uniform_tokens(t)[0]

    def change_probability(self, t: Tensor) -> Tensor:
        return self._of_uniform_tokens(t)[1]

    def _of_uniform_tokens(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """[n] I(X; Z_t) and P(Z_t != X), computed once for the same times.

        One transition of 512 states takes a fifth of a second.
        """
        if self._last_times is None or not torch.equal(self._last_times, t):
            together = max(1, REFERENCE_ENTRIES // self.vocabulary.num_states**2)
            parts = [self._uniform_tokens_at(part) for part in t.split(together)]
            information, moved = zip(*parts)
            self._last_times = t.clone()
            self._last_values = (torch.cat(information), torch.cat(moved))
        return self._last_values

    def _uniform_tokens_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        reached = self._from_clean(t)[:, : self.vocabulary.num_tokens]
        mean = reached.mean(1, keepdim=True)
        information = (
            torch.special.xlogy(reached, reached / torch.where(mean > 0, mean, 1.0))
            .sum(-1)
            .mean(-1)
        )
        return information, 1.0 - reached.diagonal(dim1=-2, dim2=-1).mean(-1)

    def rates(self, t: Tensor) -> Kernel:
        return DenseKernel(self._generator(t))

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        return DenseKernel(self._between(s, t))

    def from_clean(self, t: Tensor) -> Kernel:
        return DenseKernel(self._from_clean(t))

    def stay_probability(self, x0: Tensor, t: Tensor) -> Tensor:
        distinct, place = torch.unique(t, return_inverse=True)
        return self._from_clean(distinct).diagonal(dim1=-2, dim2=-1)[place, x0]

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return draw_index(DenseKernel(self._from_clean(t)).row(x0), u[:, 0])

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        reached = self._from_clean(t)
        return reached[
            torch.arange(len(zt), device=zt.device), : self.vocabulary.num_tokens, zt
        ].log()

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        """One chain of fixed direction, one whose generators at different times do not commute."""
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.rand(4, 4, generator=generator).double() for _ in range(2))
        first, second = (m - m.sum(-1).diag() for m in (first, second))
        bare = FlatVocabulary(4, mask=False)

        def turning(t: Tensor) -> Tensor:
            t = t[:, None, None]
            return first.to(t.device) * (1.0 - t) / (1.0 - t * 0.9) + second.to(t.device) * 4.0 * t

        return [cls(bare, first), cls(bare, turning)]


def _as_tensor(matrix: Tensor | Sequence[Sequence[float]]) -> Tensor:
    try:
        return torch.as_tensor(matrix, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            "DenseProcess: matrix must be a tensor [S,S], S lists of S numbers each, or a function t[r] -> [r,S,S]; got "
            f"{matrix!r}, of which torch says: {error}"
        ) from error


def distinct_pairs(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct (s, t) and each row's place among them; unique over rows of a table is 30 times slower."""
    first, which_first = torch.unique(s, return_inverse=True)
    second, which_second = torch.unique(t, return_inverse=True)
    codes, inverse = torch.unique(which_first * len(second) + which_second, return_inverse=True)
    return first[codes // len(second)], second[codes % len(second)], inverse
