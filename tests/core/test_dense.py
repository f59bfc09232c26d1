"""Dense and mixture processes: invalid arguments, and gradients at states of probability 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddiff.core.components import MixtureProcess
from ddiff.core.dense import DenseProcess
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import ForwardProcess, RowFunction
from ddiff.core.schedule import LinearSchedule
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.errors import ArgumentError, NonFiniteError

bare = FlatVocabulary(3, mask=False)
chain = torch.tensor([[-1.0, 0.5, 0.5], [0.2, -0.2, 0.0], [1.0, 3.0, -4.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (chain[:2, :2], r"must be \[S,S\] for the 3 states .* got \(2, 2\)"),
        (chain[0], r"got \(3,\)"),
        (chain + 0.1, "a generator: .* a row sum of 0.3"),
        (chain.T, "rows that sum to 0"),
        (-chain, "off-diagonal rates >= 0"),
        (
            torch.tensor([[-1.0, 1.5, -0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
            "a smallest rate of -0.5",
        ),
        (chain * math.nan, "must be a generator: finite"),
        (chain * math.inf, "must be a generator: finite"),
        (lambda t: chain.T.expand(len(t), -1, -1), "rows that sum to 0"),
        (lambda t: (0.9 - t)[:, None, None] * chain, "off-diagonal rates >= 0"),
    ],
    ids=[
        "smaller",
        "vector",
        "shifted",
        "transposed",
        "negated",
        "negative",
        "nan",
        "infinite",
        "function",
        "function late",
    ],
)
def test_dense_process_rejects_matrix_that_is_not_a_generator(
    matrix: Tensor | Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        DenseProcess(bare, matrix)


def test_dense_process_rejects_more_than_512_states() -> None:
    with pytest.raises(ArgumentError, match=r"S at most 512; got \(513, 513\).*structured process"):
        DenseProcess(FlatVocabulary(512), torch.zeros(513, 513))


def test_dense_process_accepts_rounding_in_rows_of_float32_matrix() -> None:
    """The row sums of the generator are made exactly 0 by correcting its diagonal."""
    thirds = torch.full((3, 3), 1 / 3) - torch.eye(3)
    assert float(thirds.double().sum(-1).abs().max()) > 1e-9
    process = DenseProcess(bare, thirds)
    assert process.closes_at_prior
    moved = process.transition(torch.tensor([0.0]).double(), torch.tensor([1.0]).double()).dense()
    torch.testing.assert_close(moved.sum(-1), torch.ones(1, 3).double(), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize(
    "target", [torch.ones(4), torch.tensor([0.5, 0.2, 0.2]), torch.full((3,), math.nan)]
)
def test_mixture_process_rejects_noise_that_does_not_sum_to_one(target: Tensor) -> None:
    with pytest.raises(
        ArgumentError,
        match="the noise must be a distribution over the 3 states, with no negative entry and "
        "sum 1",
    ):
        MixtureProcess(bare, LinearSchedule(), target)


def test_mixture_process_rejects_negative_noise() -> None:
    with pytest.raises(ArgumentError, match=r"smallest entry -0\.25 and sum 1\."):
        MixtureProcess(bare, LinearSchedule(), torch.tensor([1.5, -0.25, -0.25]))


def idle_mask() -> ForwardProcess:
    """Return a process on three tokens and a mask in which no token is ever masked."""
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[:3, :3] = chain
    return DenseProcess(FlatVocabulary(3), matrix)


def unmasked_mixture() -> ForwardProcess:
    return MixtureProcess(FlatVocabulary(3), LinearSchedule(), torch.tensor([0.5, 0.25, 0.25, 0.0]))


@pytest.mark.parametrize("make", [idle_mask, unmasked_mixture])
@pytest.mark.parametrize("derived", [True, False])
def test_bound_integrand_gradient_is_finite_if_mask_is_unreachable(
    make: Callable[[], ForwardProcess], derived: bool
) -> None:
    process = make()
    density = ForwardProcess.density if derived else type(process).density
    logits = torch.randn(
        6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    x0, zt = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 0, 0, 1, 2, 1])
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
    value = density(
        process, DenseDistribution(logits.log_softmax(-1), process.vocabulary), x0, zt, t
    )
    assert bool((value >= -1e-12).all())
    value[:-1].sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert float(logits.grad[:-1].abs().min(-1).values.min()) > 0


def test_bound_integrand_gradient_is_finite_if_probability_underflows() -> None:
    """A predicted probability exp(-200) is 0 in float32, so the predicted q_t(token 2) is 0."""
    vocabulary = FlatVocabulary(3)
    process = MixtureProcess(vocabulary, LinearSchedule(), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    logits = torch.tensor([[0.0, 0.0, -200.0]], requires_grad=True)
    dist = DenseDistribution(logits.log_softmax(-1), vocabulary)
    process.density(
        dist, torch.tensor([0]), torch.tensor([3]), torch.tensor([0.5]).double()
    ).sum().backward()
    # -ln p(x0)/t, with gradient (p - onehot)/t
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_dense_process_step_raises_if_the_prediction_is_nan() -> None:
    process = DenseProcess(bare, chain)

    def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Tensor:
        return fn(DenseDistribution(torch.full((len(rows), 3), math.nan).double(), bare), *per_row)

    t = torch.tensor([0.5, 0.6], dtype=torch.float64)
    for draw in (
        lambda: process.step(
            query, torch.tensor([0, 1]), t, t / 2, torch.tensor([[0.1], [0.9]]).double()
        ),
        lambda: process.decode(
            query, torch.tensor([0, 1]), t, torch.tensor([[0.1], [0.9]]).double()
        ),
    ):
        with pytest.raises(NonFiniteError, match="the predicted distribution holds NaN"):
            draw()
