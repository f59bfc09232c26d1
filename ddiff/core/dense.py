"""Processes that are defined by any rate matrix. Bound and samplers follow from the rates.

>>> from ddiff.core.vocabulary import FlatVocabulary
>>> rates = [[-1.0, 1.0], [2.0, -2.0]]
>>> process = DenseProcess(FlatVocabulary(2, mask=False), rates)
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
    """Any continuous-time Markov chain on up to 512 states.

    The prior is the mean of the marginals q_1(.|x) over all tokens x. `closes_at_prior` is true if
    these marginals are within 1e-9 of each other. The cost is O(S^3) per distinct time for S
    states.

    Args:
        matrix: one generator [S,S] as a tensor or nested lists (rows sum to 0, off-diagonal entries
            >= 0), or a function t [r] -> Q_t [r,S,S]. A single generator is multiplied by the rate
            of the schedule: Q_t = rate(t) * matrix with rate = -alpha'/alpha, so that the integral
            of the rate is -ln alpha. A function must be continuous in t: an integration step across
            a jump has an error proportional to the length of the step.
        schedule: noise schedule alpha that defines the rate. Not used if `matrix` is a function.
    """

    # Number of Magnus steps per interval. The error is 1e-9 on random chains.
    steps = 512

    def __init__(
        self,
        vocabulary: Vocabulary,
        matrix: Tensor | Sequence[Sequence[float]] | Callable[[Tensor], Tensor],
        schedule: Schedule | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.schedule = schedule or LinearSchedule()
        self._function: Callable[[Tensor], Tensor] | None = None
        self._matrix: Tensor | None = None
        self._table: tuple[Tensor, Tensor] | None = None
        if callable(matrix):
            self._function = matrix
            examples = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)
            for generator in self._generator(examples):
                self._check_generator(generator)
            self._table = self._tabulate()
        else:
            self._matrix = self._check_generator(_as_tensor(matrix))
        self._last_times: Tensor | None = None
        end = torch.ones(1).double()
        at_end = self._transition_from_clean(end)[0, : vocabulary.num_tokens]
        mean = at_end.mean(0)
        self.prior = Prior(mean.clamp(min=0.0).log())
        self.closes_at_prior = bool((at_end - mean).abs().max() < 1e-9)
        self.closes_at_clean = True

    def _check_generator(self, matrix: Tensor) -> Tensor:
        """Return the generator with a corrected diagonal, so that every row sums to exactly 0.

        Rounding in the caller's matrix would otherwise lose probability. Raises ArgumentError if
        the matrix is not a generator.
        """
        size = self.vocabulary.num_states
        if size > MAX_STATES or matrix.shape != (size, size):
            raise ArgumentError(
                f"DenseProcess: matrix must be [S,S] for the {size} states of the vocabulary, S at "
                f"most {MAX_STATES}; got {tuple(matrix.shape)}. Larger spaces need a structured "
                "process (TreeProcess, InterpolatingProcess)."
            )
        off_diagonal = matrix - matrix.diagonal().diag()
        row_sums = matrix.sum(-1).abs().max()
        has_negative_rates = off_diagonal.min() < 0
        leaks = row_sums > 1e-6 * matrix.abs().max()
        if not matrix.isfinite().all() or has_negative_rates or leaks:
            raise ArgumentError(
                "DenseProcess: matrix must be a generator: finite, off-diagonal rates >= 0, rows "
                "that sum to 0 (row y holds the rates from y); got a smallest rate of "
                f"{float(off_diagonal.min()):.3g} and a row sum of {float(row_sums):.3g}."
            )
        return matrix - matrix.sum(-1).diag()

    # ------------------------------------------------------------------ transitions

    def _generator(self, t: Tensor) -> Tensor:
        """Return the generators Q_t [r,S,S]. Times 0 and 1 are first moved slightly into (0, 1)."""
        t = interior(t)
        if self._function is not None:
            return self._function(t).double()
        assert self._matrix is not None
        rate = -self.schedule.d_alpha(t) / self.schedule.alpha(t)
        return rate[:, None, None] * self._matrix.to(t.device)

    def _transition(self, s: Tensor, t: Tensor) -> Tensor:
        """Return the transition matrices [r,S,S] from times s [r] to times t [r].

        The matrix of each distinct pair (s, t) is computed only once.
        """
        start, stop, pair_index = distinct_pairs(s, t)
        if self._matrix is None:
            size = self.vocabulary.num_states
            moved = propagate(self._generator, start, stop, size, self.steps)
            return moved[pair_index]
        elapsed = self._log_alpha(start) - self._log_alpha(stop)
        exponent = elapsed[:, None, None] * self._matrix.to(t.device)
        # Rounding may make probabilities slightly negative, which draws and logarithms reject.
        return torch.matrix_exp(exponent)[pair_index].clamp(min=0.0)

    def _log_alpha(self, t: Tensor) -> Tensor:
        # If alpha(1) = 0, its logarithm is infinite.
        return self.schedule.alpha(t.clamp(max=LATEST)).log()

    def _tabulate(self) -> tuple[Tensor, Tensor]:
        """Tabulate the transitions from time 0.

        Returns K times, and the transition matrices [K,S,S] from time 0 to each of these times. A
        transition from time 0 to any other time then needs only a short integration.
        """
        ends = interior(torch.tensor([0.0, 1.0], dtype=torch.float64))
        first, last = torch.logit(ends).tolist()
        logit_knots = torch.linspace(first, last, self.steps + 1, dtype=torch.float64)
        knots = torch.sigmoid(logit_knots)
        size = self.vocabulary.num_states
        moves = propagate(self._generator, knots[:-1], knots[1:], size, steps=4)
        reached = [torch.eye(size, dtype=torch.float64)]
        for move in moves:
            reached.append(reached[-1] @ move)
        return knots, torch.stack(reached)

    def _transition_from_clean(self, t: Tensor) -> Tensor:
        """Return the transition matrices [r,S,S] from time 0 to times t [r]."""
        if self._table is None:
            return self._transition(torch.zeros_like(t), t)
        times, time_index = torch.unique(t, return_inverse=True)
        knots = self._table[0].to(t.device)
        reached = self._table[1].to(t.device)
        # The table gives the transition to the latest knot before each time. One short step leads
        # from this knot to the time.
        before = torch.searchsorted(knots, interior(times), right=True) - 1
        before = before.clamp(0, len(knots) - 1)
        size = self.vocabulary.num_states
        rest = propagate(self._generator, knots[before], times, size, steps=4)
        return (reached[before] @ rest)[time_index].clamp(min=0.0)

    # ------------------------------------------------------------------ the forward process

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        from_tokens = self._transition_from_clean(t)[:, : self.vocabulary.num_tokens]
        marginal = log_p.exp().unsqueeze(1) @ from_tokens.to(log_p.dtype)
        return safe_log(marginal.squeeze(1))

    def rates(self, t: Tensor) -> Kernel:
        return DenseKernel(self._generator(t))

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        return DenseKernel(self._transition(s, t))

    def from_clean(self, t: Tensor) -> Kernel:
        return DenseKernel(self._transition_from_clean(t))

    def stay_probability(self, x0: Tensor, t: Tensor) -> Tensor:
        times, time_index = torch.unique(t, return_inverse=True)
        diagonal = self._transition_from_clean(times).diagonal(dim1=-2, dim2=-1)
        return diagonal[time_index, x0]

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return draw_index(self.from_clean(t).row(x0), u[:, 0])

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        reached = self._transition_from_clean(t)
        rows = torch.arange(len(zt), device=zt.device)
        return reached[rows, : self.vocabulary.num_tokens, zt].log()

    # ------------------------------------------------------------------ information

    def information(self, t: Tensor) -> Tensor:
        """Return I(X; Z_t) [n] in nats at times t [n], for X uniform over the tokens.

        The value is the mean over tokens x of KL( q_t(.|x) || mean of q_t over the tokens ).
        """
        return self._average_over_tokens(t)[0]

    def change_probability(self, t: Tensor) -> Tensor:
        return self._average_over_tokens(t)[1]

    def _average_over_tokens(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return two tensors [n] for X uniform over the tokens: I(X; Z_t) and P(Z_t != X).

        Both tensors need the same transitions, and one transition of 512 states takes 0.2 seconds.
        The results for the last argument `t` are therefore cached.
        """
        if self._last_times is None or not torch.equal(self._last_times, t):
            times_per_chunk = max(1, REFERENCE_ENTRIES // self.vocabulary.num_states**2)
            chunks = [self._average_at(chunk) for chunk in t.split(times_per_chunk)]
            information, changed = zip(*chunks)
            self._last_times = t.clone()
            self._last_values = (torch.cat(information), torch.cat(changed))
        return self._last_values

    def _average_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        reached = self._transition_from_clean(t)[:, : self.vocabulary.num_tokens]
        mean = reached.mean(1, keepdim=True)
        ratio = reached / torch.where(mean > 0, mean, 1.0)
        information = torch.special.xlogy(reached, ratio).sum(-1).mean(-1)
        changed = 1.0 - reached.diagonal(dim1=-2, dim2=-1).mean(-1)
        return information, changed

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        """Return a chain with a constant generator and one with generators that do not commute."""
        rng = torch.Generator().manual_seed(0)
        first = torch.rand(4, 4, generator=rng).double()
        second = torch.rand(4, 4, generator=rng).double()
        first = first - first.sum(-1).diag()
        second = second - second.sum(-1).diag()
        bare = FlatVocabulary(4, mask=False)

        def turning(t: Tensor) -> Tensor:
            t = t[:, None, None]
            early = first.to(t.device) * (1.0 - t) / (1.0 - t * 0.9)
            return early + second.to(t.device) * 4.0 * t

        return [cls(bare, first), cls(bare, turning)]


def _as_tensor(matrix: Tensor | Sequence[Sequence[float]]) -> Tensor:
    try:
        return torch.as_tensor(matrix, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            "DenseProcess: matrix must be a tensor [S,S], S lists of S numbers each, or a function "
            f"t[r] -> [r,S,S]; got {matrix!r}, of which torch says: {error}"
        ) from error


def distinct_pairs(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the distinct pairs among the r pairs of times (s, t).

    Returns three tensors: the s of each distinct pair, the t of each distinct pair, and for each
    row [r] the index of its pair. The function is 30 times faster than `torch.unique` with `dim=0`.
    """
    starts, start_index = torch.unique(s, return_inverse=True)
    stops, stop_index = torch.unique(t, return_inverse=True)
    codes, pair_index = torch.unique(start_index * len(stops) + stop_index, return_inverse=True)
    return starts[codes // len(stops)], stops[codes % len(stops)], pair_index
