"""Interpolating processes, q_t(.|x) = alpha_t delta_x + b_t: reverse steps, events, noise, kernels.

- Thinning draws candidate moves at an upper bound of the rate, and accepts some of these moves.
- `InterpolatingProcess` gets the noise b_t as a vector over the states. `ComponentProcess` gets it
  as a mixture of a few fixed distributions, called components.
- An event is a jump of the reversed chain at a random time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.components import (
    ComponentProcess,
    MixtureProcess,
    mask_distribution,
    token_distribution,
)
from ddiff.core.dense import DenseProcess
from ddiff.core.interpolating import InterpolatingProcess
from ddiff.core.kernel import DenseKernel, InterpolatingKernel, Kernel
from ddiff.core.prediction import DenseDistribution, Score
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import LinearSchedule, PowerSchedule
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.errors import ArgumentError, NonFiniteError
from ddiff.testing.probes import TableQuery, random_log_probs

UNMASKED = FlatVocabulary(4, mask=False)
MASKED = FlatVocabulary(3)
PAIR = HierarchicalVocabulary([[0, 1, 0, 0]])


class MaskAndUniform(ComponentProcess):
    """Process with probability t of the mask and t(1-t)/2 of a uniformly random token."""

    def __init__(self, vocabulary: FlatVocabulary) -> None:
        super().__init__(
            vocabulary, [mask_distribution(vocabulary), token_distribution(vocabulary)]
        )

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - t) * (1.0 - t / 2.0)

    def coefficients(self, t: Tensor) -> Tensor:
        return torch.stack([t, t * (1.0 - t) / 2.0], -1)


class NoiseAsVector(InterpolatingProcess):
    """The process `MaskAndUniform`, with its noise b_t as a vector instead of components."""

    def __init__(self, vocabulary: FlatVocabulary) -> None:
        self.vocabulary, self._twin = vocabulary, MaskAndUniform(vocabulary)
        self.prior = self._twin.prior

    def alpha(self, t: Tensor) -> Tensor:
        return self._twin.alpha(t)

    def noise(self, t: Tensor) -> Tensor:
        return self._twin.noise(t)


def uneven() -> MixtureProcess:
    return MixtureProcess(UNMASKED, LinearSchedule(), torch.tensor([0.4, 0.3, 0.2, 0.1]))


THINNED: dict[str, Callable[[], InterpolatingProcess]] = {
    "mask and uniform tokens": lambda: MaskAndUniform(MASKED),
    "noise as a vector": lambda: NoiseAsVector(MASKED),
    "uneven": uneven,
    "masked": lambda: MixtureProcess(MASKED, PowerSchedule(2.0), mask_distribution(MASKED)),
}


def full(value: float, like: Tensor) -> Tensor:
    return torch.full(like.shape, value, dtype=torch.float64)


def last_before(holds: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Return thresholds [count] in [0,1]: entry i of `holds(u)` is true for u_i below entry i."""
    low, high = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    for _ in range(52):
        middle = (low + high) / 2
        low, high = (
            torch.where(holds(middle), middle, low),
            torch.where(holds(middle), high, middle),
        )
    return (low + high) / 2


def step_distribution(
    process: ForwardProcess, log_p: Tensor, zt: Tensor, t: float, s: float
) -> Tensor:
    """Return the exact distribution [r,S] of the states that `process.step` draws from t to s.

    `log_p` [V] is the predicted log-distribution at all r rows. The first uniform decides whether a
    row changes, and the second chooses the new state, in the order of the ids. The probabilities
    are differences of thresholds of the uniforms, which bisection finds to 2^-52.
    """

    def step(first: Tensor, second: Tensor) -> Tensor:
        query = TableQuery(log_p.expand(len(zt), -1), process.vocabulary)
        return process.step(query, zt, full(t, zt), full(s, zt), torch.stack([first, second], -1))

    moving = last_before(lambda v: step(v, full(0.5, zt)) != zt, len(zt))
    first = torch.where(moving > 1e-12, 0.0, 1.0 - 2.0**-53).double()
    reached = [
        last_before(lambda v, y=y: step(first, v) <= y, len(zt))
        for y in range(process.vocabulary.num_states)
    ]
    cdf = torch.stack(reached, -1)
    drawn = cdf.diff(dim=-1, prepend=torch.zeros_like(cdf[:, :1])) * moving.unsqueeze(-1)
    return drawn.scatter_add(-1, zt.unsqueeze(-1), (1.0 - moving).unsqueeze(-1))


@pytest.mark.parametrize("name", THINNED)
@pytest.mark.parametrize(("t", "s"), [(0.77, 0.31), (0.5, 0.49), (1.0, 0.6), (0.4, 0.0)])
def test_reverse_step_by_thinning_equals_exact_reverse_transition(
    name: str, t: float, s: float
) -> None:
    process = THINNED[name]()
    log_p = random_log_probs(process.vocabulary.num_tokens, 1, seed=3)
    reached = process.log_marginal(log_p, full(t, log_p[:, 0]))[0].exp() > 1e-12
    zt = reached.nonzero().squeeze(-1)
    expected = process.reverse_log_probs(
        log_p.expand(len(zt), -1), zt, full(t, zt), full(s, zt)
    ).exp()
    torch.testing.assert_close(
        step_distribution(process, log_p, zt, t, s), expected, rtol=0.0, atol=1e-12
    )


def test_reverse_step_queries_network_only_at_rows_that_may_change() -> None:
    """The network is queried at rows with a candidate move, about the fraction t (1 - t) / 64.

    The step has 1/64 of the time. A step with s = t has no candidates.
    """
    vocabulary = FlatVocabulary(1000, mask=False)
    process = MixtureProcess(vocabulary, LinearSchedule(), token_distribution(vocabulary))
    zt, u = (
        torch.randint(1000, (4096,), generator=torch.Generator().manual_seed(0)),
        torch.rand(4096, 2).double(),
    )
    query = TableQuery(random_log_probs(1000, 1).expand(4096, -1), vocabulary)
    process.step(query, zt, full(0.5, zt), full(0.5, zt), u)
    assert query.calls == 0
    process.step(query, zt, full(0.5, zt), full(0.5 - 1 / 64, zt), u)
    bound = 1.0 - (0.5 / (0.5 + 1 / 64)) * (0.5 - 1 / 64) / 0.5
    assert abs(len(query.queried) / 4096 - bound) < 0.02  # five standard deviations


class WideDoubles(TorchDispatchMode):
    """Dispatch mode that records every new float64 tensor of at least `size` entries."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, Tensor)
            and result.dtype == torch.float64
            and result.numel() >= self.size
        ):
            self.found.append(f"{func}: {tuple(result.shape)}")
        return result


@pytest.mark.parametrize("even", [True, False])
def test_mixture_noise_makes_no_float64_tensor_of_vocabulary_width(even: bool) -> None:
    vocabulary, rows = FlatVocabulary(500), 64
    process = MaskAndUniform(vocabulary)
    process._is_even_on_tokens = even
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 500, generator=generator, requires_grad=True)
    x0, t = (
        torch.randint(500, (rows,), generator=generator),
        torch.rand(rows, generator=generator).double(),
    )
    with WideDoubles(rows * 400) as seen:
        dist = DenseDistribution(logits.log_softmax(-1), vocabulary)
        zt = process.sample(x0, t, torch.rand(rows, 2, generator=generator).double())
        density = process.density(dist, x0, zt, t)
        decoding, closing = process.decode_nll(dist, x0, zt, t), process.closing_kl(dist, x0, t)
        score = Score(
            torch.randn(rows, 501, generator=generator).scatter(-1, zt.unsqueeze(-1), 0.0)
        )
        scored = process.density(score, x0, zt, t)
        density.sum().backward()
        process.log_marginal(dist.log_mass(0), t)
        process.reverse_rates(dist, zt, t)
        process.forward_step(zt, t / 2, t, torch.rand(rows, 2, generator=generator).double())
        process.event_time(zt[:8], t[:8], torch.rand(8, generator=generator).double())
    assert seen.found == []
    for got, derived in (
        (density, ForwardProcess.density(process, dist, x0, zt, t)),
        (decoding, ForwardProcess.decode_nll(process, dist, x0, zt, t)),
        (closing, ForwardProcess.closing_kl(process, dist, x0, t)),
        (scored, ForwardProcess.density(process, score, x0, zt, t)),
    ):
        torch.testing.assert_close(
            got, derived, rtol=1e-4, atol=1e-4, check_dtype=False
        )  # the distribution is float32


def test_reverse_step_keeps_a_token_predicted_with_probability_one() -> None:
    process = uneven()
    log_p = torch.eye(4).double().log()
    zt, u = torch.arange(4), torch.tensor([[0.0, 0.5]]).double().expand(4, -1)
    assert process.step(
        TableQuery(log_p, UNMASKED), zt, full(0.5, zt), full(0.0, zt), u
    ).tolist() == [
        0,
        1,
        2,
        3,
    ]


def test_reverse_step_by_thinning_raises_if_the_prediction_is_nan() -> None:
    zt, u = torch.arange(4), torch.zeros(4, 2).double()
    query = TableQuery(torch.full((4, 4), torch.nan).double(), UNMASKED)
    for draw in (lambda: uneven().step(query, zt, full(0.5, zt), full(0.2, zt), u),
                 lambda: uneven().event(query, zt, full(0.5, zt), u)):  # fmt: skip
        with pytest.raises(NonFiniteError, match="the predicted distribution holds NaN"):
            draw()


def test_reverse_step_rejects_a_network_that_predicts_scores() -> None:
    def query(rows: Tensor, node: Tensor, fn: Callable[..., Tensor], *per_row: Tensor) -> Tensor:
        return fn(Score(torch.zeros(len(rows), 5)), *per_row)

    zt, u = torch.full((2,), 4), torch.zeros(2, 2).double()
    masked = MixtureProcess(
        FlatVocabulary(4), LinearSchedule(), mask_distribution(FlatVocabulary(4))
    )
    tree = TreeProcess(FlatVocabulary(4), LogTimeClock((1.0,)))
    for process in (masked, tree):
        with pytest.raises(
            ArgumentError,
            match=r"must be a distribution of the clean token.*got a Score.*tau-leaping",
        ):
            process.step(query, zt, full(0.5, zt), full(0.2, zt), u)
        assert (
            process.decode(query, zt, full(0.5, zt), u).max() < 4
        )  # decode turns scores into a distribution


# ---------------------------------------------------------------------- events


EVENTFUL: dict[str, Callable[[], ForwardProcess]] = {
    "two levels, xi < 1": lambda: TreeProcess(PAIR, LogTimeClock((0.5, 1.0)), 0.8),
    "two powers": lambda: TreeProcess(PAIR, CdfClock([PowerSchedule(1.0), PowerSchedule(2.0)])),
    "never quite at the root": lambda: TreeProcess(
        PAIR, CdfClock([LinearSchedule(0.05), LinearSchedule(0.3)]), 0.9
    ),
    "mask and uniform tokens": lambda: MaskAndUniform(MASKED),
    "uneven": uneven,
}


@pytest.mark.parametrize("name", EVENTFUL)
def test_simulated_events_reproduce_the_reverse_transition(name: str) -> None:
    """20,000 chains run from t = 0.9 to s = 0.15 under a constant prediction.

    A frequency differs from its probability by more than five standard deviations (at most 0.018)
    once in 1.7 million cases. The test compares 35 frequencies, with a fixed seed; with a random
    seed, one run in 50,000 would fail by chance.
    """
    process, count, s = EVENTFUL[name](), 20_000, 0.15
    log_p = random_log_probs(process.vocabulary.num_tokens, 1, seed=3)
    generator = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    start = process.log_marginal(log_p, torch.tensor([0.9]).double())[0]
    for z in (start > -10.0).nonzero().squeeze(-1).tolist()[-2:]:
        zt = torch.full((count,), z)
        t, going = full(0.9, zt), torch.arange(count)
        while len(going):
            when = process.event_time(zt[going], t[going], rand(len(going)))
            going, when = going[when > s], when[when > s]
            query = TableQuery(log_p.expand(len(going), -1), process.vocabulary)
            if len(going):
                zt[going] = process.event(
                    query, zt[going], when, rand(len(going), process.uniforms_per_event)
                )
            t[going] = when
        row = torch.tensor([z])
        expected = process.reverse_log_probs(log_p, row, full(0.9, row), full(s, row))[0].exp()
        shares = torch.bincount(zt, minlength=process.vocabulary.num_states) / count
        limit = 5.0 * (expected * (1.0 - expected) / count).sqrt() + 1e-9
        assert bool(((shares - expected).abs() <= limit).all()), (z, shares, expected)


def test_next_event_time_is_zero_at_clean_tokens_of_masked_diffusion() -> None:
    process = MixtureProcess(MASKED, LinearSchedule(), mask_distribution(MASKED))
    zt = torch.arange(4)
    times = process.event_time(zt, full(0.5, zt), full(0.9, zt))
    assert times[:3].tolist() == [0.0] * 3
    # The mask of a linear schedule has s = u t. The candidate rate is up to 1 % larger.
    assert 0.45 < float(times[3]) < 0.4525
    assert process.is_monotone
    assert not uneven().is_monotone


def test_event_time_of_process_without_events_raises_argument_error() -> None:
    chain = torch.tensor([[-1.0, 1.0], [2.0, -2.0]])
    process = DenseProcess(FlatVocabulary(2, mask=False), chain)
    assert not process.has_events
    zt = torch.zeros(1, dtype=torch.long)
    with pytest.raises(
        ArgumentError,
        match=r"DenseProcess.event_time: this process offers no events.*sampler with steps",
    ):
        process.event_time(zt, full(0.5, zt), full(0.5, zt))


def test_event_raises_if_the_reverse_rate_exceeds_the_candidate_rate() -> None:
    class Leaping(MixtureProcess):  # type: ignore[misc]
        """Process whose rates triple near t = 0.507, between two times of the table of rates."""

        def d_coefficients(self, t: Tensor) -> Tensor:
            return super().d_coefficients(t) * torch.where(
                (t - 0.507).abs() < 3e-3, 3.0, 1.0
            ).unsqueeze(-1)

    process = Leaping(UNMASKED, LinearSchedule(), token_distribution(UNMASKED))
    zt = torch.arange(4)
    with pytest.raises(ArgumentError, match="candidate events are too few"):
        process.event(
            TableQuery(random_log_probs(4, 4), UNMASKED),
            zt,
            full(0.507, zt),
            torch.rand(4, 2).double(),
        )


# ---------------------------------------------------------------------- components and inverses


def test_noise_as_mixture_of_components_equals_the_same_noise_as_a_vector() -> None:
    """The two processes differ only in the interface that defines their noise b_t."""
    first, second = MaskAndUniform(MASKED), NoiseAsVector(MASKED)
    zt = torch.arange(4).repeat(5)
    t = torch.linspace(0.05, 1.0, 20, dtype=torch.float64)
    log_p, x0 = random_log_probs(3, 20), torch.arange(20) % 3
    dist = DenseDistribution(log_p, MASKED)
    for method, arguments in (
        ("noise_at", (zt, t)),
        ("arrivals_at", (zt, t)),
        ("log_marginal", (log_p, t)),
        ("reverse_rates", (dist, zt, t)),
        ("density", (dist, x0, zt, t)),
        ("decode_nll", (dist, x0, zt, t)),
        ("closing_kl", (dist, x0, t)),
    ):
        torch.testing.assert_close(
            getattr(first, method)(*arguments), getattr(second, method)(*arguments)
        )


def test_prior_of_mixture_noise_is_derived_from_the_mixture_weights() -> None:
    assert MaskAndUniform(MASKED).closes_at_clean
    assert MaskAndUniform(MASKED).closes_at_prior
    assert MaskAndUniform(MASKED).prior.log_prob.exp().tolist() == [0.0, 0.0, 0.0, 1.0]


def test_noise_components_must_be_distributions_over_the_states() -> None:
    class Wrong(MaskAndUniform):
        def __init__(self, dist: Tensor) -> None:
            ComponentProcess.__init__(self, MASKED, [mask_distribution(MASKED), dist])

    for dist in (
        torch.tensor([0.5, 0.5, 0.5, 0.0]),
        torch.tensor([1.5, -0.5, 0.0, 0.0]),
        torch.ones(2) / 2,
    ):
        with pytest.raises(
            ArgumentError,
            match=r"Wrong: the noise must be a distribution over the 4 states.*got shape",
        ):
            Wrong(dist)
    with pytest.raises(ArgumentError, match="vocabulary must have a mask"):
        mask_distribution(UNMASKED)


def test_transition_kernel_solve_inverts_apply() -> None:
    """`solve` inverts `apply` for dense, interpolating, scaled and summed kernels.

    The matrices are diagonally dominant, so that the only error is rounding.
    """
    noise = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    matrix = torch.eye(4, dtype=torch.float64) + 0.2 * noise
    factor, vector = torch.tensor([0.5, 2.0, 3.0]).double(), random_log_probs(4, 3).exp()
    mixed = InterpolatingKernel(factor, matrix[:, 0])
    kernels: list[Kernel] = [
        DenseKernel(matrix),
        mixed,
        factor * DenseKernel(matrix),
        DenseKernel(matrix) + mixed,
    ]
    for kernel in kernels:
        torch.testing.assert_close(
            kernel.solve(kernel.apply(vector)), vector, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    "process", [uneven(), TreeProcess(PAIR, LogTimeClock((1.0, 1.0)))], ids=["uneven", "tree"]
)
def test_transition_kernel_solve_rejects_singular_kernels(process: ForwardProcess) -> None:
    vector = random_log_probs(process.vocabulary.num_states, 2).exp()
    s, t = torch.tensor([0.2, 0.3]).double(), torch.tensor([0.5, 1.0]).double()
    for kernel in (
        process.transition(s, t),
        process.rates(t),
        DenseKernel(torch.ones(2, *vector.shape[1:] * 2).double()),
    ):
        with pytest.raises(ArgumentError, match="must be invertible in every row"):
            kernel.solve(vector)


def test_transition_kernel_solve_rejects_large_dense_kernels() -> None:
    with pytest.raises(ArgumentError, match=r"at most 512 states.*got 600"):
        DenseKernel(torch.zeros(1, 600, 600)).solve(torch.zeros(1, 600))
