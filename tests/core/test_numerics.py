"""Draws by inverse CDF: edge cases, distribution, and rare tokens in float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.numerics import draw_index, interior, multiply_by_weight, safe_log, to_column
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import RowFunction
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.errors import NonFiniteError

LARGEST = 1.0 - 2.0**-53  # the largest uniform of CounterRng


def drawn(weights: list[float], *u: float) -> list[int]:
    rows = torch.tensor(weights, dtype=torch.float64).expand(len(u), -1)
    return draw_index(rows, torch.tensor(u, dtype=torch.float64)).tolist()


def test_draw_index_maps_a_half_open_interval_of_uniforms_to_each_index() -> None:
    assert drawn([1.0, 2.0, 1.0], 0.0, 0.2499, 0.25, 0.7499, 0.75, LARGEST) == [0, 0, 1, 1, 2, 2]


def test_draw_index_does_not_depend_on_scale_of_weights() -> None:
    u = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(500, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # powers of two scale without rounding, so the draws agree exactly
    assert torch.equal(draw_index(weights, u), draw_index(weights * 2.0**-40, u))


def test_draw_index_never_draws_zero_weight() -> None:
    assert drawn([0.0, 0.0, 1.0, 0.0, 1.0, 0.0], 0.0, 0.5, LARGEST, 0.499) == [2, 4, 4, 2]


def test_draw_index_at_largest_uniform_is_last_possible_index() -> None:
    """The product of the uniform and the total weight may round up to the total weight.

    A search for the total weight in the cumulative sums would end after the last index.
    """
    for seed in range(200):
        weights = torch.rand(
            1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        weights[:, 33:] = 0.0
        assert draw_index(weights, torch.tensor([LARGEST]).double()).item() <= 32
    assert draw_index(torch.ones(1, 3).double(), torch.tensor([1.0]).double()).item() == 2


def test_draw_index_sums_float32_weights_in_float64() -> None:
    weights = torch.cat([torch.ones(1), torch.full((4096,), 2.0**-25)])  # 1 + 2^-25 == 1 in float32
    total = 1.0 + 4096 * 2.0**-25
    u = torch.tensor([(1.0 + 2048.5 * 2.0**-25) / total], dtype=torch.float64)
    assert draw_index(weights.unsqueeze(0), u).item() == 2049


@pytest.mark.parametrize("row", [[0.0, 0.0], [1.0, math.nan], [1.0, math.inf]])
def test_draw_index_rejects_rows_without_finite_weight(row: list[float]) -> None:
    weights = torch.tensor([[1.0, 1.0], row])
    with pytest.raises(NonFiniteError, match="positive, finite sum in every row; got"):
        draw_index(weights, torch.tensor([0.5, 0.5]).double())


def test_draw_index_without_rows_gives_no_draws() -> None:
    assert draw_index(torch.empty(0, 3), torch.empty(0).double()).shape == (0,)


def test_interior_moves_times_0_and_1_by_1e_12_and_keeps_all_others() -> None:
    t = torch.tensor([0.0, 1e-12, 0.3, 1.0], dtype=torch.float64)
    assert interior(t).tolist() == [1e-12, 1e-12, 0.3, 1.0 - 1e-12]


def test_to_column_returns_a_column_with_dtype_of_its_second_argument() -> None:
    assert to_column(torch.ones(2).double(), torch.ones(2, 5)).dtype == torch.float32
    assert to_column(torch.ones(2), torch.ones(2, 5)).shape == (2, 1)


def test_safe_log_passes_no_gradient_to_zero_and_keeps_nan() -> None:
    mass = torch.tensor([0.0, 0.5, math.nan], dtype=torch.float64, requires_grad=True)
    log = safe_log(mass)
    assert log[:2].tolist() == [-math.inf, math.log(0.5)]
    assert log[2].isnan()
    log[:2].exp().sum().backward()
    assert mass.grad is not None
    assert mass.grad[:2].tolist() == [0.0, 1.0]


# ---------------------------------------------------------------------- rare tokens
# (Zheng et al., arXiv 2409.02908)

ZIPF = (1.0 / torch.arange(1, 50_258, dtype=torch.float64)) / (
    1.0 / torch.arange(1, 50_258, dtype=torch.float64)
).sum()
ENTROPY = float(-(ZIPF * ZIPF.log()).sum())  # 7.566 nats
STEP = 1.0 / 1024  # step size of 1,024 steps; tests use the step from t = 1/2
RARE = 3e-5  # tokens below this probability are drawn too rarely; their total probability is 1/4


def race_in_single_precision(reveal: float) -> Tensor:
    """Return P(token v is revealed) [V] in an exponential race with float32 uniforms.

    The token with the least E_v/w_v wins the race, where E_v is an exponential variable and w_v the
    weight of token v. The mask takes part with the weight 1 - reveal, where `reveal` is the
    probability that the position is revealed.

    A float32 uniform is a multiple of 2^-24, so an exponential variable near 0 is a multiple of
    d = 2^-24 = 6e-8. Let a = d (1 - reveal)/w. A token of small weight w wins with probability
    sum_k d exp(-k a) = d / (exp(a) - 1). The correct probability is d / a.
    """
    smallest = float(-torch.log1p(-torch.tensor(2.0**-24)))
    return 2.0**-24 / torch.expm1(smallest * (1.0 - reveal) / (reveal * ZIPF))


def test_float32_uniforms_are_multiples_of_2_to_the_minus_24() -> None:
    u = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)).double() * 2.0**24
    assert torch.equal(u, u.round())


def test_exponential_race_in_float32_almost_never_draws_rare_tokens() -> None:
    """Tokens with a quarter of the total probability are almost never drawn.

    The generated text then looks more likely than it is.
    """
    revealed = race_in_single_precision(reveal=2 * STEP)
    share = revealed / revealed.sum()
    assert float(ZIPF[ZIPF < RARE].sum()) == pytest.approx(0.25, abs=0.01)
    assert float(share[ZIPF < RARE].sum()) < 0.1
    assert float(-(share * ZIPF.log()).sum()) < ENTROPY - 1.0
    assert float(revealed.sum()) < 0.9 * 2 * STEP  # fewer tokens are revealed in total, too


def test_float32_reverse_step_keeps_the_probability_of_rare_tokens() -> None:
    """The mean of -ln p over revealed tokens equals the entropy of the prediction.

    The uniforms form a grid. -ln p increases with the token id, so the mean over the grid has an
    error of at most ln V / (number of points), for V tokens.
    """
    vocabulary, points, chunk = FlatVocabulary(len(ZIPF)), 1024, 64
    process = TreeProcess(vocabulary, LogTimeClock((1.0,)))
    dist = ZIPF.log().float().expand(chunk, -1)

    def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Tensor:
        return fn(DenseDistribution(dist, vocabulary), *per_row)

    words = []
    for grid in ((torch.arange(points, dtype=torch.float64) + 0.5) / points).split(chunk):
        t = torch.full((chunk,), 0.5, dtype=torch.float64)
        u = torch.stack(
            [torch.zeros(chunk, dtype=torch.float64), grid], -1
        )  # a first uniform of 0 always reveals a token
        words.append(process.step(query, torch.full((chunk,), vocabulary.root), t, t - STEP, u))
    revealed = ZIPF[torch.cat(words)]
    assert float(-revealed.log().mean()) == pytest.approx(ENTROPY, abs=math.log(len(ZIPF)) / points)
    assert float((revealed < RARE).double().mean()) == pytest.approx(
        float(ZIPF[ZIPF < RARE].sum()), abs=1.5 / points
    )


def test_reverse_step_reveals_a_rare_token_with_exact_probability() -> None:
    """A step from t to s of linear masked diffusion reveals a mask with probability (t - s)/t.

    The frequency on a grid of uniforms differs from the probability by at most one grid point.
    """
    vocabulary, points = FlatVocabulary(2), 100_000
    process = TreeProcess(vocabulary, LogTimeClock((1.0,)))
    t = torch.full((points,), 0.5, dtype=torch.float64)
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points

    def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Tensor:
        return fn(
            DenseDistribution(torch.full((len(rows), 2), -math.log(2.0)), vocabulary), *per_row
        )

    zs = process.step(query, torch.full((points,), 2), t, t - STEP, torch.stack([grid, grid], -1))
    assert float((zs < 2).double().mean()) == pytest.approx(2 * STEP, abs=1.0 / points)


def test_multiply_by_weight_is_zero_with_zero_gradient_at_weight_0() -> None:
    values = torch.tensor([2.0, 0.0, -1.5], requires_grad=True)
    weight = torch.tensor([3.0, 0.0, 0.5])
    infinite = torch.where(weight > 0, values, -values.log())  # -ln 0 = inf at weight 0
    product = multiply_by_weight(weight, infinite)
    assert product.tolist() == [6.0, 0.0, -0.75]
    direct = multiply_by_weight(weight, values)
    direct.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [3.0, 0.0, 0.5]
