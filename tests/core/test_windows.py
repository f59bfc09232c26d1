"""Window rules: the bound of exact predictions is the entropy of the data.

In a window rule, only the positions of a window have noise times between 0 and 1. The data are
three symbols with a known joint distribution. No number is drawn: `exact_windows` sums over states,
windows and quadrature nodes.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from chains import HumpedNoise
from exact_windows import (
    ENTROPY,
    JOINT,
    LENGTH,
    LOG_JOINT,
    SEQUENCES,
    cost_of_ends,
    exact_prediction,
    exact_terms,
    mean,
)

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.components import MixtureProcess
from ddiff.core.elbo import nelbo, network_from_noisy
from ddiff.core.information import IdentityTime, TimeChange
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import LinearSchedule, Schedule
from ddiff.core.times import FlatTimes, Noisy, TimeRule, Times, WindowTimes, jointly_stratified
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.errors import ArgumentError
from ddiff.testing import assert_laws, check_time_rule

WINDOW = (0.05, 0.9)
# Error of six panels of six nodes for integrands that grow as 1/t; effects here are 1e-3 and more.
QUADRATURE = 1e-6


class EarlyNoise(Schedule):
    """Schedule alpha = 0.05 + 0.85 (1 - t): noise at t = 0, and clean tokens left at t = 1."""

    closes_at_clean = closes_at_prior = False

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 0.05 + 0.85 * (1.0 - t)


PROCESSES: dict[str, ForwardProcess] = {
    "masked": TreeProcess(FlatVocabulary(3), CdfClock([LinearSchedule()])),
    "humped noise": HumpedNoise(),
    "closes at neither end": MixtureProcess(
        FlatVocabulary(3), EarlyNoise(), torch.tensor([0.0, 0.0, 0.0, 1.0])
    ),
}
STRAYING = TreeProcess(HierarchicalVocabulary([[0, 1, 0]]), LogTimeClock((1.0, 1.0)), xi=0.8)
RULES = {
    f"{shape} {width}, {'paired' if paired else 'alone'}": WindowTimes(width, shape, paired)
    for shape in ("block", "slide")
    for width in (1, 2, 3)
    for paired in (True, False)
}


def cost(process: ForwardProcess, rule: TimeRule, window: tuple[float, float]) -> float:
    """Return `cost_of_ends` for the blocks of a rule, and 0 for a sliding window.

    The positions of a sliding window reach the ends of the time window one after the other, so that
    no dependence between positions is lost.
    """
    if getattr(rule, "shape", "block") == "slide":
        return 0.0
    width = getattr(rule, "width", LENGTH)
    blocks = [list(range(first, min(first + width, LENGTH))) for first in range(0, LENGTH, width)]
    return float(cost_of_ends(process, window, blocks))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("process", PROCESSES)
def test_window_bound_of_exact_network_is_entropy_plus_prior_and_decoding_cost(
    process: str, rule: str
) -> None:
    chain, times = PROCESSES[process], RULES[rule].with_window(*WINDOW)
    closing, diffusion, decoding = exact_terms(chain, times)
    expected = float(ENTROPY) + cost(chain, times, WINDOW)
    assert mean(closing + diffusion + decoding) == pytest.approx(expected, abs=QUADRATURE)


@pytest.mark.parametrize("rule", ["block 2, paired", "slide 2, paired", "slide 2, alone"])
def test_window_bound_of_tree_with_jumps_is_entropy_plus_prior_and_decoding_cost(rule: str) -> None:
    times = RULES[rule].with_window(*WINDOW)
    total = mean(sum(exact_terms(STRAYING, times)))
    assert total == pytest.approx(float(ENTROPY) + cost(STRAYING, times, WINDOW), abs=QUADRATURE)


@pytest.mark.parametrize("rule", RULES)
def test_masked_process_on_times_0_to_1_has_no_prior_or_decoding_term(rule: str) -> None:
    """Compare exactly: the integrand is a polynomial in t, so the only error is rounding."""
    closing, diffusion, decoding = exact_terms(PROCESSES["masked"], RULES[rule])
    assert not closing.any()
    assert not decoding.any()
    assert mean(diffusion) == pytest.approx(float(ENTROPY), abs=1e-11)


@pytest.mark.parametrize("process", PROCESSES)
def test_sliding_window_prior_and_decoding_terms_are_zero_only_without_noise_at_time_0(
    process: str,
) -> None:
    rule = RULES["slide 2, paired"]
    terms = exact_terms(PROCESSES[process], rule)
    closes = PROCESSES[process].closes_at_clean
    assert bool(terms[0].any()) == bool(terms[2].any()) == (not closes)
    if not closes:
        assert mean(sum(terms)) == pytest.approx(float(ENTROPY), abs=QUADRATURE)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("paired", [True, False])
def test_bound_of_windows_of_width_one_is_the_autoregressive_nll(
    process: str, paired: bool
) -> None:
    """NELBO(x) = -ln p(x) for every sequence x, since only one position is noisy at a time."""
    terms = exact_terms(PROCESSES[process], WindowTimes(1, "block", paired).with_window(*WINDOW))
    torch.testing.assert_close(sum(terms), -LOG_JOINT.reshape(-1), rtol=0, atol=10 * QUADRATURE)


@pytest.mark.parametrize("paired", [True, False])
def test_time_rule_with_one_window_per_sequence_gives_the_flat_bound(paired: bool) -> None:
    process, slot = PROCESSES["closes at neither end"], torch.arange(len(SEQUENCES))
    network, scored = (
        network_from_noisy(exact_prediction(process), process.vocabulary),
        torch.ones_like(SEQUENCES, dtype=torch.bool),
    )
    flat, block = (
        nelbo(
            process,
            network,
            SEQUENCES,
            scored,
            rule.with_window(*WINDOW, LENGTH),
            CounterRng(3, 0, slot, LENGTH),
            slot,
            len(slot),
        )
        for rule in (FlatTimes(tokens=LENGTH), WindowTimes(LENGTH, "block", paired=True))
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(block[:3], flat[:3]))
    ours = exact_terms(process, WindowTimes(LENGTH, "block", paired).with_window(*WINDOW))
    for one, other in zip(ours, exact_terms(process, FlatTimes(*WINDOW))):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


class WithoutSpeed:
    """Fault: a rule whose speed is 1 at noisy positions.

    The correct speed at position i is dt_i/dtau times the number of windows of a sequence, because
    only one window is drawn.
    """

    def __init__(self, rule: WindowTimes) -> None:
        self.rule, self.width, self.shape, self.paired = rule, rule.width, rule.shape, rule.paired

    def draw(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: torch.Tensor,
        slots: int | torch.Tensor,
        length: int,
    ) -> Times:
        times = self.rule.draw(clock, rng, slot, slots, length)
        return times._replace(speed=(times.speed > 0).double())

    def ends(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: torch.Tensor,
        slots: int | torch.Tensor,
        length: int,
    ) -> tuple[Times, Times]:
        return self.rule.ends(clock, rng, slot, slots, length)


@pytest.mark.parametrize("rule", RULES)
def test_window_bound_without_the_factor_dt_dtau_differs_from_the_entropy(rule: str) -> None:
    times = RULES[rule].with_window(*WINDOW)
    total = mean(sum(exact_terms(PROCESSES["masked"], WithoutSpeed(times))))
    assert abs(total - float(ENTROPY) - cost(PROCESSES["masked"], times, WINDOW)) > 0.05


@pytest.mark.parametrize("rule", ["block 2, paired", "slide 2, paired"])
def test_bound_is_below_entropy_if_a_window_attends_to_its_clean_tokens(
    rule: str,
) -> None:
    """A network that attends to the tokens it predicts has a bound below the entropy."""
    honest, times = exact_prediction(PROCESSES["masked"]), RULES[rule].with_window(*WINDOW)

    def peeking(noisy: Noisy) -> torch.Tensor:
        assert noisy.memory is not None
        return honest(Noisy(noisy.memory, torch.zeros_like(noisy.t), torch.ones_like(noisy.clean)))

    assert mean(sum(exact_terms(PROCESSES["masked"], times, peeking))) < float(ENTROPY) - 0.05


@pytest.mark.parametrize("rule", ["block 2, alone", "slide 2, alone"])
def test_attending_to_positions_at_the_prior_does_not_change_the_bound(rule: str) -> None:
    honest, times = exact_prediction(PROCESSES["humped noise"]), RULES[rule].with_window(*WINDOW)
    total, seeing = (
        mean(sum(exact_terms(PROCESSES["humped noise"], times, dist)))
        for dist in (honest, lambda noisy: honest(noisy._replace(block=None)))
    )
    assert seeing == pytest.approx(total, abs=1e-12)


def test_exact_prediction_helper_equals_the_conditional_of_the_joint() -> None:
    """Compare the prediction for x_1 with explicit sums over JOINT, in three cases.

    1. x_0 is clean, and x_2 is in a later block than x_1.
    2. x_0 is clean, and x_2 is in the same block as x_1.
    3. x_0 is clean only in `memory`, the clean copy to which later blocks attend.
    """
    joint, dist = JOINT.reshape(3, 3, 3), exact_prediction(PROCESSES["masked"])
    zt, t = torch.tensor([[2, 3, 1]]), torch.tensor([[0.0, 0.5, 0.3]], dtype=torch.float64)
    clean = torch.tensor([[True, False, False]])
    behind = dist(Noisy(zt, t, clean, torch.tensor([[0, 1, 2]])))[0, 1].exp()
    torch.testing.assert_close(behind, joint[2].sum(-1) / joint[2].sum(), rtol=0, atol=1e-12)
    beside = dist(Noisy(zt, t, clean, torch.tensor([[0, 1, 1]])))[0, 1].exp()
    torch.testing.assert_close(beside, joint[2, :, 1] / joint[2, :, 1].sum(), rtol=0, atol=1e-12)
    memory = torch.tensor([[0, 2, 2]])
    remembered = dist(Noisy(zt, t, ~clean & False, torch.tensor([[0, 1, 2]]), memory))[0, 1].exp()
    torch.testing.assert_close(remembered, joint[0].sum(-1) / joint[0].sum(), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- window rules


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.05, 0.9)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_window_times_pass_all_conformance_checks(rule: str, window: tuple[float, float]) -> None:
    assert_laws(check_time_rule(RULES[rule].with_window(*window)))


def test_noise_times_of_the_windows_of_a_sequence_are_evenly_spread() -> None:
    """Each of the sixteen windows of a sequence has its time in another sixteenth of [0, 1]."""
    slot = torch.arange(5)
    times = WindowTimes(4).draw(IdentityTime(), CounterRng(0, 0, slot, 64), slot, 5, 64)
    per_window = times.t.unflatten(1, (16, 4))
    assert torch.equal(per_window, per_window[..., :1].expand(-1, -1, 4))
    places = (per_window[..., 0] * 16).floor().long()
    assert torch.equal(places.sort(-1).values, torch.arange(16).expand(5, -1))
    assert torch.equal(times.block, (torch.arange(64) // 4).unsqueeze(0))


@pytest.mark.parametrize(("slots", "count"), [(4, 4), (6, 4), (5, 16), (8, 6), (7, 1), (1, 5)])
def test_windows_and_times_of_a_batch_are_stratified_jointly(slots: int, count: int) -> None:
    """Every stratum contains exactly one draw, if the shift common to a sequence is removed.

    A batch of `slots` samples with `count` windows has slots * count strata: `slots` strata for the
    draws of a window, and `count` strata for those of a sample.
    """
    slot = torch.arange(slots)
    for step in range(3):
        rng = CounterRng(0, step, slot, count)
        v = jointly_stratified(rng, slot, slots, count)
        turn = rng.uniform_per_group("time")[0] / slots if count > 1 else 0.0
        turned = (v - turn) % 1.0
        cells = (turned * slots * count).floor().long()
        assert sorted(cells.reshape(-1).tolist()) == list(range(slots * count))
        for window in range(count):
            assert sorted((turned[:, window] * slots).floor().long().tolist()) == list(range(slots))
        for sample in range(slots):
            assert sorted((cells[sample] // slots).tolist()) == list(range(count))


def test_stratified_draws_for_the_windows_are_uniformly_distributed() -> None:
    """The means of the draws v and of v^2 over 4,000 steps are close to 1/2 and 1/3.

    The tolerance is five standard errors.
    """
    slot = torch.arange(3)
    drawn = torch.stack(
        [jointly_stratified(CounterRng(1, step, slot, 4), slot, 3, 4) for step in range(4000)]
    )
    assert float((drawn.mean((0, 1)) - 1 / 2).abs().max()) < 5 * 0.29 / 12_000**0.5
    assert float((drawn.square().mean((0, 1)) - 1 / 3).abs().max()) < 5 * 0.30 / 12_000**0.5


def test_times_in_a_sliding_window_rise_from_left_to_right() -> None:
    tau = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    times = WindowTimes(4, "slide").at(IdentityTime(), tau, 12)
    assert times.at_prior is not None
    assert times.block is not None
    for row in range(3):
        opened = ~times.clean[row] & ~times.at_prior[row]
        assert 3 <= int(opened.sum()) <= 4
        torch.testing.assert_close(
            times.t[row][opened].diff(), torch.full((int(opened.sum()) - 1,), 0.25).double()
        )
        assert times.block[row][opened].unique().tolist() == [0]
        assert (times.block[row][times.clean[row]] < 0).all()
        assert (times.block[row][times.at_prior[row]] > 0).all()
    for earlier, later in pairwise(times.clean):  # tau falls from 1 to 0 as text is generated
        assert (later <= earlier).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"width": 2, "shape": "diagonal"}, 'shape must be "block" or "slide"'),
        ({"width": 2, "start": 0.5, "stop": 0.5}, "0 <= start < stop <= 1"),
    ],
)
def test_window_times_reject_invalid_arguments(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        WindowTimes(**arguments)  # type: ignore[arg-type]
