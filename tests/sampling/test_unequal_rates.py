"""Samplers of processes in which tokens are noised at unequal rates.

alpha_t(x), the probability that token x is still clean, then depends on the token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddiff import (
    AdaptiveCorrectionSampler,
    Canvas,
    CapRemasking,
    DenseDistribution,
    DenseProcess,
    FlatVocabulary,
    ForwardProcess,
    PsiSampler,
    TreeProcess,
)
from ddiff.core.clock import CdfClock
from ddiff.core.schedule import LinearSchedule
from ddiff.sampling.grid_sampler import compute_alpha
from ddiff.testing.sampler_distribution import FastRng

RATES = torch.tensor([[-0.2, 0.1, 0.1], [2.0, -4.0, 2.0], [0.5, 0.5, -1.0]], dtype=torch.float64)
PROCESS = DenseProcess(FlatVocabulary(3, mask=False), RATES)
T, S = 0.6, 0.4


def canvas_of(tokens: Tensor, t: float) -> Canvas:
    free = torch.ones_like(tokens, dtype=torch.bool)
    return Canvas(tokens, torch.full(tokens.shape, t, dtype=torch.float64), ~free, free)


def test_compute_alpha_at_a_token_is_the_probability_that_it_is_clean() -> None:
    tokens = torch.tensor([[0, 1, 2]])
    t = torch.full(tokens.shape, T, dtype=torch.float64)
    diagonal = PROCESS.from_clean(t[0, :1]).dense()[0].diagonal()
    torch.testing.assert_close(compute_alpha(PROCESS, t, tokens)[0], diagonal)
    assert float(diagonal.max() - diagonal.min()) > 0.3
    torch.testing.assert_close(compute_alpha(PROCESS, t), diagonal.mean().expand_as(t))


def test_compute_alpha_at_a_mask_returns_the_mean_over_tokens() -> None:
    masked = TreeProcess(FlatVocabulary(3), CdfClock([LinearSchedule()]))
    t = torch.tensor([[0.25, 0.5]], dtype=torch.float64)
    assert compute_alpha(masked, t, torch.tensor([[3, 1]])).tolist() == [[0.75, 0.5]]


def test_remasking_probability_is_equal_for_all_tokens() -> None:
    """Noise replaces tokens of any rate with the probability sigma = 0.05.

    The sampler sets kappa_i = 1 - sigma/(1 - alpha_s(x_i)) at position i.
    """
    tokens = torch.tensor([[0, 1, 2]])
    canvas = canvas_of(tokens, T)
    s = torch.full(tokens.shape, S, dtype=torch.float64)
    back = 1.0 - CapRemasking(0.05)(PROCESS, canvas, s)
    alpha_s = compute_alpha(PROCESS, s, tokens)
    assert float(alpha_s.max() - alpha_s.min()) > 0.3
    torch.testing.assert_close(back * (1.0 - alpha_s), torch.full_like(back, 0.05))


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 0, 1]])
def test_probability_of_leaving_a_token_does_not_depend_on_its_id(order: list[int]) -> None:
    """If the tokens are renumbered, the probability of leaving a token stays the same.

    The probability is measured with 2^15 draws. The tolerance 0.014 is five standard deviations.
    """
    place = torch.tensor(order)
    renamed = DenseProcess(FlatVocabulary(3, mask=False), RATES[place][:, place])
    for sampler in (PsiSampler(2, CapRemasking(0.3)), AdaptiveCorrectionSampler(2, eta=0.9)):
        first = _leaving(sampler, PROCESS)
        second = _leaving(sampler, renamed)
        torch.testing.assert_close(second, first[place], atol=0.02, rtol=0.0)


def _leaving(sampler: PsiSampler | AdaptiveCorrectionSampler, process: ForwardProcess) -> Tensor:
    """Return how often each token [3] changes in a step from time T to time S.

    The network predicts the uniform distribution.
    """
    count = 2**15
    leaving = []
    for tokens in (torch.tensor([[0, 1]]), torch.tensor([[2, 2]])):
        canvas = canvas_of(tokens.repeat(count, 1), T)

        def network(noisy: object) -> object:
            def query(rows: Tensor, node: Tensor, fn: object, *per_row: Tensor) -> object:
                even = torch.zeros(len(rows), 3, dtype=torch.float64).log_softmax(-1)
                return fn(DenseDistribution(even, process.vocabulary), *per_row)  # type: ignore[operator]

            return query

        s = torch.full(canvas.zt.shape, S, dtype=torch.float64)
        moved = sampler.move(process, network, canvas, s, FastRng(count, 5)).zt  # type: ignore[arg-type]
        leaving.append((moved != canvas.zt).double().mean(0))
    return torch.cat([leaving[0], leaving[1][:1]])
