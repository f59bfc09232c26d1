"""Tree processes: forward draws and decoding rules equal their formulas; invalid arguments.

Distributions of draws are measured on a midpoint grid of N uniforms, without random numbers. An
interval of length p contains between N p - 1 and N p + 1 grid points, so that a frequency has an
error of at most 1/N per interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ddiff.core.clock import CdfClock, LevelClock, LogTimeClock
from ddiff.core.elbo import network_from_table
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import RowFunction
from ddiff.core.schedule import CosineSchedule, LinearSchedule, PowerSchedule
from ddiff.core.times import Noisy
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.errors import ArgumentError
from ddiff.testing.bound import constant_denoiser

POINTS = 4000
GRID = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS

tree = HierarchicalVocabulary(
    [[0, 1, 0, 2, 1, 1]]
)  # six tokens under three nodes (6, 7, 8) under the root 9
PARENT = [0, 1, 0, 2, 1, 1]
P = torch.tensor([0.3, 0.05, 0.1, 0.25, 0.2, 0.1], dtype=torch.float64)
MASS = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
XI = 0.8


def shares(drawn: Tensor, num_states: int = 10) -> Tensor:
    return torch.bincount(drawn, minlength=num_states).double() / len(drawn)


def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
    return fn(DenseDistribution(P.log().expand(len(rows), -1), tree), *per_row)


def never(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
    raise AssertionError("the network was queried although no row draws a state")


def process(decoding: str = "bayes", xi: float | Sequence[float] = XI) -> TreeProcess:
    return TreeProcess(tree, LogTimeClock((0.7, 1.0)), xi, decoding)


# ---------------------------------------------------------------------- decoding rules


def tokens_by_decoding_rule(decoding: str, node: int) -> Tensor:
    """Return the distribution [V] of the token that a decoding rule draws at a node, by formula."""
    n = 3
    inside = torch.tensor([parent == node for parent in PARENT])
    forward_step = torch.where(inside, XI, (1 - XI) / (n - 1))
    if decoding == "bayes":
        expected = XI * MASS[node] + (1 - XI) * (1 - MASS[node]) / (n - 1)
        return forward_step * P / expected
    if decoding == "within":
        return torch.where(inside, P / MASS[node], 0.0)
    if decoding == "between":
        return torch.where(inside, XI * P / MASS[node], (1 - XI) * P / (1 - MASS[node]))
    return P


@pytest.mark.parametrize("decoding", ["bayes", "within", "between", "free"])
@pytest.mark.parametrize("node", [0, 1, 2])
def test_token_drawn_below_a_node_follows_the_formula_of_its_decoding_rule(
    decoding: str, node: int
) -> None:
    zt, t = torch.full((POINTS,), 6 + node), torch.full((POINTS,), 0.4, dtype=torch.float64)
    expected = tokens_by_decoding_rule(decoding, node)
    assert float(expected.sum()) == pytest.approx(1.0)
    drawn = process(decoding).decode(query, zt, t, GRID.unsqueeze(-1))
    torch.testing.assert_close(shares(drawn)[:6], expected, rtol=0.0, atol=1.5 / POINTS)


@pytest.mark.parametrize("decoding", ["bayes", "within", "between", "free"])
def test_tree_decoding_rules_agree_at_masks(decoding: str) -> None:
    zt, t = torch.full((POINTS,), 9), torch.full((POINTS,), 0.4, dtype=torch.float64)
    drawn = process(decoding).decode(query, zt, t, GRID.unsqueeze(-1))
    torch.testing.assert_close(shares(drawn)[:6], P, rtol=0.0, atol=1.5 / POINTS)


@pytest.mark.parametrize("decoding", ["bayes", "within", "between", "free"])
def test_only_bayes_decoding_accounts_for_stochastic_parents(
    decoding: str,
) -> None:
    rule, t, s = (
        process(decoding),
        torch.full((POINTS,), 0.8).double(),
        torch.full((POINTS,), 0.3).double(),
    )
    chance = (rule.clock.pi(s) * rule.clock.transition(s, t)[:, :, 2])[0]
    words, nodes, _ = (chance / chance.sum()).tolist()
    u = torch.stack(
        [torch.full_like(GRID, words + nodes / 2), GRID], -1
    )  # the first uniform chooses level 1
    drawn = rule.step(query, torch.full((POINTS,), 9), t, s, u)
    expected = XI * MASS + (1 - XI) * (1 - MASS) / 2 if decoding == "bayes" else MASS
    torch.testing.assert_close(shares(drawn)[6:9], expected, rtol=0.0, atol=1.5 / POINTS)


def test_tree_step_equals_exact_reverse_transition() -> None:
    """Draw with a grid of 300 x 300 uniforms: one chooses the level, and one chooses the state."""
    side = 300
    edge = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    u = torch.cartesian_prod(edge, edge)
    rows = len(u)
    t, s = torch.full((rows,), 0.8).double(), torch.full((rows,), 0.3).double()
    for state in (6, 8, 9):
        drawn = process().step(query, torch.full((rows,), state), t, s, u)
        exact = (
            process()
            .reverse_log_probs(P.log().unsqueeze(0), torch.tensor([state]), t[:1], s[:1])[0]
            .exp()
        )
        # Tolerance: 1/side for the choice of the level and 1/side for the state.
        torch.testing.assert_close(shares(drawn), exact, rtol=0.0, atol=2.0 / side)


def test_tree_step_keeps_leaf_tokens_without_querying_the_network() -> None:
    zt, t = torch.tensor([0, 5]), torch.tensor([0.8, 0.9]).double()
    u = torch.tensor([[0.1, 0.2], [0.99, 0.5]]).double()
    assert torch.equal(process().step(never, zt, t, t / 2, u), zt)
    assert torch.equal(process().decode(never, zt, t, u[:, :1]), zt)


def test_tree_decoding_is_exact_if_only_upper_levels_are_stochastic() -> None:
    """Compare with Bayes' rule, for P(true parent) = 1 of tokens and 0.7 of clusters."""
    deep = HierarchicalVocabulary([[0, 1, 2, 3, 0], [0, 1, 0, 1]])
    chain = TreeProcess(deep, LogTimeClock((1.0, 1.0, 1.0)), xi=(1.0, 0.7, 1.0))
    p = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.25], dtype=torch.float64)

    def network(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        return fn(DenseDistribution(p.log().expand(len(rows), -1), deep), *per_row)

    t = torch.full((POINTS,), 0.5).double()
    for state in (9, 10):
        drawn = chain.decode(network, torch.full((POINTS,), state), t, GRID.unsqueeze(-1))
        right = torch.tensor([1, 0, 1, 0, 1] if state == 9 else [0, 1, 0, 1, 0], dtype=torch.bool)
        posterior = p * torch.where(right, 0.7, 0.3)
        expected = posterior / posterior.sum()
        torch.testing.assert_close(shares(drawn, 12)[:5], expected, rtol=0.0, atol=1.5 / POINTS)


def test_tree_node_with_underflowing_probability_has_finite_loss_and_gradient() -> None:
    three = HierarchicalVocabulary([[0, 0, 1, 1], [0, 1], [0, 0]])
    process = TreeProcess(three, LogTimeClock((1.0, 1.0, 1.0)), xi=(1.0, 0.8, 1.0))
    logits = torch.tensor(
        [[0.0, 0.5, -150.0, -151.0]], requires_grad=True
    )  # exp(-150) is 0 in float32
    dist = DenseDistribution(logits.log_softmax(-1), three)
    x0, node, t = torch.tensor([2]), torch.tensor([5]), torch.tensor([0.4], dtype=torch.float64)
    surprise = process.divergence(dist, x0, node, t)
    surprise.sum().backward()
    # -ln P(token 2 | tokens 2 and 3) = ln(1 + 1/e); float32 digits of numbers near 150
    torch.testing.assert_close(surprise.item(), 0.31326168751822286, rtol=0.0, atol=1e-4)
    share = torch.sigmoid(torch.tensor(1.0)).item()
    expected = torch.tensor([[0.0, 0.0, share - 1.0, 1.0 - share]])
    torch.testing.assert_close(logits.grad, expected, rtol=0.0, atol=1e-4)


def test_decode_draws_below_the_node_if_all_its_probabilities_underflow() -> None:
    """All tokens below the node have the probability e^-200, which is 0 in float32."""
    chain = TreeProcess(tree, LogTimeClock((0.7, 1.0)), xi=0.8)
    deep = HierarchicalVocabulary([[0, 1, 1], [0, 0]])
    certain = TreeProcess(deep, LogTimeClock((0.7, 1.0)))
    log_p = torch.tensor([[0.0, -200.0, -201.0]])
    network = network_from_table(lambda zt, t: log_p.expand(*zt.shape, -1), deep)(
        Noisy(torch.tensor([[4]]), torch.tensor([[0.5]]).double(), torch.tensor([[False]]))
    )
    drawn = certain.decode(
        network, torch.tensor([4]), torch.tensor([0.5]).double(), torch.tensor([[0.5]]).double()
    )
    assert drawn.tolist() == [1]
    faint = torch.tensor([[0.0, -200.0, -200.0, -200.0, -201.0, -201.0]])

    def faint_query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        return fn(DenseDistribution(faint, tree), *per_row)

    drawn = chain.decode(
        faint_query, torch.tensor([7]), torch.tensor([0.5]).double(), torch.tensor([[0.5]]).double()
    )
    assert drawn.tolist() == [0]  # not below node 7, but more likely than the tokens below it


# ---------------------------------------------------------------------- forward draws


@pytest.mark.parametrize("xi", [(0.8, 1.0), (0.3, 0.6), (0.05, 0.2), (1.0, 0.7)])
def test_tree_forward_draws_follow_the_marginal_for_every_xi(xi: tuple[float, float]) -> None:
    """If xi < 1/n, where n is the number of nodes, each wrong parent is likelier than the true one.

    xi is the probability of the true parent.
    """
    deep = HierarchicalVocabulary([[2, 0, 1, 0, 1, 2], [1, 0, 1]])
    chain = TreeProcess(deep, LogTimeClock((1.0, 0.6, 1.4)), xi)
    t = torch.full((POINTS,), 0.6).double()
    pi = chain.clock.pi(t[:1])[0]
    climbed = torch.cat([torch.ones(1), chain.clock.cdf(t[:1])[0], torch.zeros(1)]).double()
    for word in range(6):
        certain = torch.full((1, 6), -torch.inf).double().index_fill(1, torch.tensor([word]), 0.0)
        marginal = chain.log_marginal(certain, t[:1])[0].exp()
        for level in range(4):
            middle = (
                climbed[level] + climbed[level + 1]
            ) / 2  # a first uniform that draws this level
            u = torch.stack([middle.expand(POINTS), GRID], -1)[:, : chain.uniforms_per_sample]
            drawn = chain.sample(torch.full((POINTS,), word), t, u)
            here = deep.level_of(torch.arange(deep.num_states)) == level
            expected = torch.where(here, marginal / pi[level], 0.0)
            torch.testing.assert_close(
                shares(drawn, deep.num_states), expected, rtol=0.0, atol=1.5 / POINTS
            )


def test_tree_forward_draws_have_the_level_probabilities_of_the_clock() -> None:
    chain = process(xi=1.0)
    t = torch.full((POINTS,), 0.35).double()
    level = tree.level_of(chain.sample(torch.zeros(POINTS).long(), t, GRID.unsqueeze(-1)))
    torch.testing.assert_close(
        shares(level, 3), chain.clock.pi(t[:1])[0], rtol=0.0, atol=1.0 / POINTS
    )


@pytest.mark.parametrize("xi", [1.0, 0.8])
def test_tree_forward_draw_is_the_token_at_time_0_and_the_root_at_1(xi: float) -> None:
    chain, x0 = process(xi=xi), torch.arange(6)
    u = torch.tensor([[1e-300, 0.999]]).double().expand(6, -1)
    assert torch.equal(chain.sample(x0, torch.zeros(6).double(), u), x0)
    assert torch.equal(
        chain.sample(x0, torch.ones(6).double(), 1.0 - u.flip(-1)), torch.full((6,), 9)
    )


# ---------------------------------------------------------------------- invalid arguments


def test_bound_of_a_single_cluster_with_wrong_parents_is_minus_log_p() -> None:
    """A level with one node has no wrong parents, and (1 - xi)/(n - 1) is not evaluated there."""
    single = HierarchicalVocabulary([[0, 0, 0], [0]])
    chain = TreeProcess(single, LogTimeClock((0.7, 1.0)), xi=0.8)
    report = constant_denoiser(chain)
    assert report.passed, str(report)


@pytest.mark.parametrize("xi", [0.0, -0.1, 1.5, float("nan"), (0.9, 0.0), (0.9, 0.9, 0.9), ()])
def test_tree_process_rejects_invalid_xi(
    xi: float | Sequence[float],
) -> None:
    with pytest.raises(
        ArgumentError, match=r"xi must be one number in \(0, 1\], or one for each of the 2 levels"
    ):
        TreeProcess(tree, LogTimeClock((1.0, 1.0)), xi)


@pytest.mark.parametrize(
    "clock", [LogTimeClock((1.0,)), LogTimeClock((1.0, 1.0, 1.0)), CdfClock([LinearSchedule()])]
)
def test_tree_process_rejects_clock_with_other_number_of_levels(clock: LevelClock) -> None:
    with pytest.raises(
        ArgumentError,
        match=rf"2 levels, one per level .* a clock with {clock.num_levels}",
    ):
        TreeProcess(tree, clock)


def test_tree_process_rejects_vocabulary_without_mask() -> None:
    with pytest.raises(ArgumentError, match="vocabulary must have a mask or more levels"):
        TreeProcess(FlatVocabulary(4, mask=False), LogTimeClock((1.0,)))


def test_error_for_an_unknown_decoding_rule_suggests_the_nearest_name() -> None:
    with pytest.raises(
        ArgumentError,
        match=r'one of bayes, within, between, free; got .withn.. Did you mean "within"',
    ):
        process("withn")


@pytest.mark.parametrize(
    "rates", [(), (0.0,), (1.0, -1.0), (20.5,), (float("nan"),), (float("inf"),)]
)
def test_log_time_clock_rejects_invalid_rates(rates: tuple[float, ...]) -> None:
    with pytest.raises(
        ArgumentError,
        match=r"rates must be one number in \(0, 20\] per level above the tokens; got",
    ):
        LogTimeClock(rates)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CdfClock([]), "schedules must hold one schedule per level"),
        (
            lambda: CdfClock([PowerSchedule(2.0), PowerSchedule(1.0)]),
            r"F_1\(t\) > F_2\(t\).*schedules 0 and 1",
        ),
        (lambda: CdfClock([LinearSchedule(), LinearSchedule()]), r"F_1\(t\) > F_2\(t\)"),
        (lambda: LinearSchedule(floor=1.0), r"floor = alpha\(1\) must be in \[0, 1\); got 1.0"),
        (lambda: LinearSchedule(floor=-0.1), r"must be in \[0, 1\)"),
        (lambda: PowerSchedule(0.0), "power must be > 0; got 0.0"),
        (lambda: PowerSchedule(float("nan")), "power must be > 0; got nan"),
    ],
)
def test_clocks_and_schedules_reject_invalid_arguments(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_cdf_clock_raises_an_error_that_names_the_schedules_that_cross() -> None:
    with pytest.raises(ArgumentError, match=r"F_2\(t\) > F_3\(t\).*schedules 1 and 2"):
        CdfClock([PowerSchedule(0.5), PowerSchedule(3.0), CosineSchedule()])


@pytest.mark.parametrize(
    "clock",
    [
        LogTimeClock((0.5, 1.0, 2.0)),
        CdfClock([PowerSchedule(0.8), PowerSchedule(1.5), PowerSchedule(3.0)]),
    ],
    ids=["log-time", "cdf"],
)
def test_level_entry_time_is_the_inverse_cdf_of_its_uniform(clock: LevelClock) -> None:
    """The entry time s < t of a level solves P(at the level at s | at the level at t) = u."""
    level, u = torch.tensor([1, 2, 3, 3]), torch.tensor([0.2, 0.5, 0.01, 0.99]).double()
    t = torch.tensor([0.4, 0.9, 0.7, 1.0]).double()
    s = clock.entry_time(level, t, u)
    assert bool((s < t).all())
    stay = clock.transition(s, t)[torch.arange(4), level, level]
    held = clock.pi(s)[torch.arange(4), level] * stay / clock.pi(t)[torch.arange(4), level]
    torch.testing.assert_close(held, u, rtol=0.0, atol=1e-8)
