"""Transition probabilities of a single step of each sampler, compared with formulas.

The network always predicts the same distribution, so that the formulas are short. Draws use Sobol
points, so that frequencies have an error below 5e-3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from ddiff_hybrid.epsilon import EpsilonHybrid
from torch import Tensor

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.components import MixtureProcess, token_distribution
from ddiff.core.elbo import Network, network_from_noisy
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import Noisy, WindowTimes
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.sampling.adaptive_correction import AdaptiveCorrectionSampler
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.grid import LoopGrid
from ddiff.sampling.grid_sampler import GridSampler
from ddiff.sampling.hyperschedule import HyperscheduleSampler
from ddiff.sampling.loop import Canvas, Sampler, generate
from ddiff.sampling.one_level import OneLevelSampler
from ddiff.sampling.predictor_corrector import ForwardBackward, PredictorCorrectorSampler
from ddiff.sampling.psi import (
    CapRemasking,
    ConfidenceRemasking,
    LoopRemasking,
    PsiSampler,
    RescaleRemasking,
)
from ddiff.sampling.self_correction import SelfCorrectingSampler, _Patience, propose_changes
from ddiff.sampling.tau_leaping import TauLeapingSampler, tau_leap
from ddiff.sampling.trapezoidal import TrapezoidalSampler
from ddiff.sampling.unmasking import EntropyBoundSampler, UnmaskingSampler
from ddiff.testing.bound_terms import SobolRng

POINTS = 8192
RESOLVED = 5e-3
MASK, P = 3, (0.5, 0.3, 0.2)  # id of the mask after three tokens; predicted distribution
MASKED = TreeProcess(FlatVocabulary(3), CdfClock([LinearSchedule()]))  # alpha = 1 - t
BARE = FlatVocabulary(3, mask=False)
UNIFORM = MixtureProcess(BARE, LinearSchedule(), token_distribution(BARE))
TREE = TreeProcess(HierarchicalVocabulary([[0, 1, 0]]), LogTimeClock((2.0, 1.0)))


def predicting(process: ForwardProcess, *p: tuple[float, ...]) -> Network:
    """Return a network that ignores its input.

    It predicts the distribution p[0] at all positions, or p[i] at position i if several are given.
    """
    log_p = torch.tensor(p, dtype=torch.float64).log()
    return network_from_noisy(lambda noisy: log_p.expand(*noisy.zt.shape, -1), process.vocabulary)


def canvas_of(states: tuple[int, ...], t: float, count: int = POINTS) -> Canvas:
    zt = torch.tensor(states).expand(count, -1).clone()
    free = torch.ones_like(zt, dtype=torch.bool)
    return Canvas(zt, torch.full(zt.shape, t, dtype=torch.float64), ~free, free)


def covering(length: int) -> Any:
    return SobolRng(torch.arange(POINTS), POINTS, length)


def moved(
    sampler: GridSampler, process: ForwardProcess, network: Network, canvas: Canvas, s: float
) -> Canvas:
    return sampler.move(
        process, network, canvas, torch.full_like(canvas.t, s), covering(canvas.zt.shape[1])
    )


def step_of(
    sampler: GridSampler, process: ForwardProcess, state: int, t: float, s: float
) -> list[float]:
    """Return the probability of each state after a step of a single position from t to s."""
    after = moved(sampler, process, predicting(process, P), canvas_of((state,), t), s).zt
    return shares(after[:, 0], process.vocabulary.num_states)


def shares(states: Tensor, count: int) -> list[float]:
    found: list[float] = (torch.bincount(states, minlength=count).double() / len(states)).tolist()
    return found


def near(expected: Any) -> Any:
    return pytest.approx(expected, abs=RESOLVED)


# ---------------------------------------------------------------------- rates


def test_tau_leap_changes_the_state_with_probability_1_minus_exp_of_minus_rate_times_span() -> None:
    rates = torch.tensor([[0.0, 1.5, 0.5]], dtype=torch.float64).expand(POINTS, -1)
    zt = torch.zeros(POINTS, dtype=torch.long)
    u = covering(2).uniform("leap")
    after = tau_leap(rates, zt, torch.full((POINTS,), 0.4, dtype=torch.float64), u)
    gone = 1.0 - math.exp(-2.0 * 0.4)
    assert shares(after, 3) == near([1.0 - gone, 0.75 * gone, 0.25 * gone])


def test_tau_leaping_uses_rates_at_the_start_of_the_step() -> None:
    """Masks are revealed at the rate 1/t, where t is the time before the step."""
    gone = 1.0 - math.exp(-(0.8 - 0.3) / 0.8)
    expected = [*(gone * p for p in P), 1.0 - gone]
    assert step_of(TauLeapingSampler(4), MASKED, MASK, 0.8, 0.3) == near(expected)


@pytest.mark.parametrize("theta", [0.3, 0.5, 0.8])
def test_trapezoidal_second_stage_uses_extrapolated_rates(theta: float) -> None:
    """Compare the probability that a mask is revealed in a step with a formula.

    The first stage has the fraction theta of the step from t to s, and the rate 1/t. The second
    stage starts at the time rho at which the first stage ends. Its rate is the positive part of
    a/rho - (a - 1)/t, where a = 1/(2 theta (1 - theta)).
    """
    t, s = 0.8, 0.3
    rho, ahead = t - theta * (t - s), 0.5 / (theta * (1.0 - theta))
    late = max(ahead / rho - (ahead - 1.0) / t, 0.0)
    stays = math.exp(-theta * (t - s) / t - late * (1.0 - theta) * (t - s))
    expected = [*((1.0 - stays) * p for p in P), stays]
    assert step_of(TrapezoidalSampler(4, theta), MASKED, MASK, t, s) == near(expected)


# ---------------------------------------------------------------------- levels


@pytest.mark.parametrize(("state", "level"), [(5, 2), (3, 1)])
def test_one_level_sampler_moves_tokens_at_most_one_level_down(state: int, level: int) -> None:
    """A state at level l moves one level down with probability (F_l(t) - F_l(s)) / pi_l(t).

    F_l(t) is the probability that a token has entered level l by time t, and pi_l(t) the
    probability that it is at level l. Tokens do not move.
    """
    t, s = 0.7, 0.5
    now, then = TREE.clock.pi(torch.tensor([t, s], dtype=torch.float64))
    falls = float((now[level:].sum() - then[level:].sum()) / now[level])
    below = {5: {3: 0.7, 4: 0.3}, 3: {0: 0.5 / 0.7, 2: 0.2 / 0.7}}[state]  # clusters {0, 2} and {1}
    expected = [0.0] * 6
    expected[state] = 1.0 - falls
    for child, share in below.items():
        expected[child] = falls * share
    assert 0.1 < falls < 0.9
    assert step_of(OneLevelSampler(4), TREE, state, t, s) == near(expected)
    assert step_of(OneLevelSampler(4), TREE, 0, t, s) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


# ---------------------------------------------------------------------- remasking


def test_psi_step_mixes_posterior_and_new_noise_with_weight_kappa() -> None:
    t, s, kappa = 0.6, 0.4, 0.7
    stays = (
        kappa * s / t + (1.0 - kappa) * s
    )  # the fraction s/t of masks remains in the posterior, and s in new noise
    expected = [*((1.0 - stays) * p for p in P), stays]
    assert step_of(PsiSampler(4, kappa), MASKED, MASK, t, s) == near(expected)
    assert step_of(PsiSampler(4, kappa), MASKED, 0, t, s) == near(
        [1.0 - 0.3 * s, 0.0, 0.0, 0.3 * s]
    )


@pytest.mark.parametrize(
    ("rule", "t", "s", "sigma"),
    [
        (CapRemasking(0.2), 0.45, 0.3, 0.2),
        (CapRemasking(0.9), 0.45, 0.3, 0.3),  # 1 - alpha_s = .3 is less than sigma_max = .545
        (CapRemasking(0.2), 0.5, 0.05, 0.05),
        (RescaleRemasking(0.4), 0.45, 0.3, 0.4 * 0.3 / 0.55),
        (RescaleRemasking(0.5), 0.3, 0.1, 0.5 * 0.1 / 0.7),
        (RescaleRemasking(0.3), 0.9, 0.6, 0.3),  # sigma_max = min(1, .6/.1)
        (RescaleRemasking(0.0), 0.5, 0.3, 0.0),
        (LoopRemasking(0.15), 0.4, 0.4, 0.15),
        (LoopRemasking(0.15), 0.4, 0.3, 0.0),
    ],
    ids=lambda value: type(value).__name__ if callable(value) else str(value),
)
def test_remasking_masks_a_token_with_probability_sigma(
    rule: Any, t: float, s: float, sigma: float
) -> None:
    assert step_of(PsiSampler(4, rule), MASKED, 0, t, s) == near([1.0 - sigma, 0.0, 0.0, sigma])


def test_confidence_sampler_remasks_tokens_that_were_drawn_with_low_probability() -> None:
    """The token at position i is remasked with probability eta sigma_max softmax_i(-p_i).

    p_i is the probability with which the token was drawn. The softmax is over positions with a
    recorded p_i; masks and all other tokens have weight 0.
    """
    t, s, eta = 0.45, 0.3, 0.5
    drawn_with = torch.tensor([0.9, 0.1, 0.5, 0.5])
    confidence = drawn_with.double().log()
    confidence[3] = torch.inf  # a token of the prompt or of the start
    canvas = canvas_of((0, 1, 0, 1, MASK), t)
    note = torch.cat([confidence, torch.tensor([-0.2]).double()]).expand(POINTS, -1)
    canvas = replace(canvas, extras={"drawn_log_p": note})
    after = moved(
        PsiSampler(4, ConfidenceRemasking(eta)), MASKED, predicting(MASKED, P), canvas, s
    ).zt
    weights = [math.exp(-p) for p in (0.9, 0.1, 0.5)]
    expected = [eta * 0.3 / 0.55 * weight / sum(weights) for weight in weights]
    assert (after[:, :4] == MASK).double().mean(0).tolist() == near([*expected, 0.0])


def test_psi_sampler_records_log_probabilities_of_new_tokens() -> None:
    canvas = canvas_of((MASK, 1), 0.8, POINTS)
    after = moved(
        PsiSampler(4, ConfidenceRemasking(0.0)), MASKED, predicting(MASKED, P), canvas, 0.2
    )
    first, second = after.extras["drawn_log_p"].unbind(-1)
    revealed = after.zt[:, 0] != MASK
    log_p = torch.tensor(P, dtype=torch.float64).log()
    torch.testing.assert_close(first[revealed], log_p[after.zt[:, 0][revealed]], rtol=0, atol=1e-12)
    assert bool(first[~revealed].isinf().all())
    assert bool(second.isinf().all()), "the record of an unchanged token changed"


def test_loop_grid_time_is_constant_while_tau_is_between_on_and_off() -> None:
    """Compare the times of the grid with a formula in tau, which falls from 1 to 0 in ten steps.

    The time falls from 1 to `hold` while tau > `on`, stays at `hold` while tau is between `on` and
    `off`, and falls from `hold` to 0 while tau < `off`.
    """
    times = LoopGrid(10, on=0.6, off=0.2, hold=0.3).times()
    expected = [1.0, 0.825, 0.65, 0.475, 0.3, 0.3, 0.3, 0.3, 0.3, 0.15, 0.0]
    assert times == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------- correcting


@pytest.mark.parametrize(("t", "s"), [(0.8, 0.4), (0.5, 0.45)])
def test_adaptive_correction_redraws_tokens_with_the_paper_probability(t: float, s: float) -> None:
    """A token is redrawn from its distribution given z_t with probability eta (1 - pi).

    pi = (alpha_s - alpha_t)/(1 - alpha_t) = (t - s)/t is the probability that a mask is revealed.
    Otherwise the token is drawn from the posterior.
    """
    eta = 0.6
    again = eta * (1.0 - (t - s) / t)
    at, then = torch.tensor([t], dtype=torch.float64), torch.tensor([s], dtype=torch.float64)
    zt, log_p = torch.tensor([2]), torch.tensor([P], dtype=torch.float64).log()
    posterior = UNIFORM.reverse_log_probs(log_p, zt, at, then).exp()[0]
    bayes = (log_p + UNIFORM.log_likelihood(zt, at)).softmax(-1)[0]
    expected = again * bayes + (1.0 - again) * posterior
    assert step_of(AdaptiveCorrectionSampler(4, eta), UNIFORM, 2, t, s) == near(expected.tolist())


@pytest.mark.parametrize(("share", "above"), [(1.0, 0.7), (0.5, 0.6), (4.0, 1.0)])
def test_forward_backward_corrector_adds_noise_for_a_set_share_of_the_step(
    share: float, above: float
) -> None:
    """The corrector adds noise from t = 0.5 to a later time `above` <= 1, and steps back to t.

    A token is masked with probability (above - t)/(1 - t). The fraction t/above of the masked
    tokens stays masked in the step back.
    """
    canvas = canvas_of((0,), 0.5)
    rng = covering(1)
    span = torch.full_like(canvas.t, 0.2)
    after = ForwardBackward(share).correct(
        MASKED, predicting(MASKED, P), canvas, span, rng, "correct"
    )
    up = (above - 0.5) / (1.0 - 0.5)
    masked, back = up * 0.5 / above, up * (1.0 - 0.5 / above)
    expected = [1.0 - up + back * P[0], back * P[1], back * P[2], masked]
    assert shares(after.zt[:, 0], 4) == near(expected)


def test_predictor_corrector_passes_step_length_to_corrector() -> None:
    spans: list[float] = []
    channels: list[str] = []

    class RecordSpans:
        def check_supported(self, process: Any, predicts: Any) -> None: ...

        def correct(
            self, process: Any, network: Any, canvas: Canvas, span: Tensor, rng: Any, channel: str
        ) -> Canvas:
            assert canvas.t.unique().tolist() == [0.3]
            spans.extend(span.unique().tolist())
            channels.append(channel)
            return canvas

    sampler = PredictorCorrectorSampler(AncestralSampler(4), RecordSpans(), rounds=2)  # type: ignore[arg-type]
    moved(sampler, MASKED, predicting(MASKED, P), canvas_of((MASK,), 0.8, POINTS), 0.3)
    assert spans == pytest.approx([0.5, 0.5])
    assert len(set(channels)) == 2, "both rounds use the same uniforms"


# ---------------------------------------------------------------------- self-correction


def test_self_correcting_sampler_proposal_uses_likelihood_of_current_state() -> None:
    """The proposal is drawn from [P(x) q_a(z|x)]^(1/T), normalized.

    P is the prediction, z the current state, T the temperature, and a the time that is passed to
    the network.
    """
    at, temperature, state = 0.4, 0.7, 2
    canvas = canvas_of((state,), at)
    going = torch.ones(POINTS, dtype=torch.bool)
    drawn, score, right = propose_changes(
        UNIFORM, predicting(UNIFORM, P), canvas, going, covering(1), temperature
    )
    log_q = UNIFORM.log_likelihood(torch.tensor([state]), torch.tensor([at], dtype=torch.float64))[
        0
    ]
    full = torch.tensor(P, dtype=torch.float64).log() + log_q
    tempered = (full / temperature).log_softmax(-1)
    assert shares(drawn[:, 0], 3) == near(tempered.exp().tolist())
    changed = drawn[:, 0] != state
    torch.testing.assert_close(
        score[:, 0][changed], tempered[drawn[:, 0][changed]], rtol=0, atol=1e-12
    )
    assert bool(score[:, 0][~changed].isneginf().all())
    assert bool((right == (int(full.argmax()) == state)).all())
    assert int(full.argmax()) == state != P.index(max(P)), (
        "the own evidence must change the most likely token"
    )


def test_self_correcting_sampler_stops_after_patience_rounds_without_gain() -> None:
    patient = _Patience(2, torch.ones(1, dtype=torch.bool))
    told = [3, 3, 4, 4, 2, 4]
    going = [bool(patient(torch.tensor([agreeing]))[0]) for agreeing in told]
    assert going == [True, True, True, True, True, False], (
        "must stop after three rounds without more than 4"
    )


def test_self_correcting_sampler_commits_only_the_most_likely_changes() -> None:
    shown: list[Noisy] = []
    rows = ((0.8, 0.1, 0.1), (0.05, 0.9, 0.05), (0.01, 0.01, 0.98))
    log_p = torch.tensor(rows, dtype=torch.float64).log()

    def network(noisy: Noisy) -> Tensor:
        shown.append(noisy)
        return log_p.expand(len(noisy.zt), -1, -1)

    class OneCanvas(Sampler):
        def run(self, process: Any, network: Any, canvas: Canvas, rng_at: Any) -> Iterator[Canvas]:
            yield canvas.advance(torch.tensor([[2, 0, 1]]), torch.zeros_like(canvas.t))

    sampler = SelfCorrectingSampler(OneCanvas(), rounds=1, commit=2, temperature=0.5, at=0.9)  # type: ignore[arg-type]
    rng: Callable[[int], Any] = lambda k: SobolRng(torch.zeros(1, dtype=torch.long), 64, 3)  # noqa: E731
    *_, last = sampler.run(
        UNIFORM, network_from_noisy(network, BARE), canvas_of((0, 0, 0), 1.0, 1), rng
    )
    assert shown[-1].t.unique().tolist() == [0.9]
    assert last.t.unique().tolist() == [0.0]
    assert last.zt.tolist() == [[2, 1, 2]], (
        "of three possible changes, only the two most likely must be made"
    )


# ---------------------------------------------------------------------- unmasking


def first_revealed(
    sampler: UnmaskingSampler, rows: tuple[tuple[float, ...], ...], s: float
) -> list[float]:
    """Return how often each masked position is revealed in the step from time 1 to s.

    rows: predicted distribution of each position.
    """
    process = TreeProcess(FlatVocabulary(len(rows[0])), CdfClock([LinearSchedule()]))
    mask = len(rows[0])
    canvas = canvas_of((mask,) * len(rows), 1.0)
    after = moved(sampler, process, predicting(process, *rows), canvas, s).zt
    found: list[float] = (after != mask).double().mean(0).tolist()
    return found


PEAKED, SPREAD = (0.6, 0.4, *(0.0,) * 10), (0.2, *(0.8 / 11,) * 11)


def test_margin_order_compares_differences_of_probabilities() -> None:
    """The margin of a position is the difference of its two largest probabilities.

    0.6 - 0.4 is more than 0.2 - 0.073, although 0.6/0.4 is less than 0.2/0.073.
    """
    assert first_revealed(UnmaskingSampler(4, "margin"), (PEAKED, SPREAD), 0.5) == [1.0, 0.0]


def test_unmasking_order_top_ranks_positions_by_largest_probability() -> None:
    rows = ((0.55, 0.45), (0.6, 0.4))
    assert first_revealed(UnmaskingSampler(4, "top"), rows, 0.5) == [0.0, 1.0]
    # The second position has the larger confidence unless it draws the token of probability .4.
    assert first_revealed(UnmaskingSampler(4, "confidence"), rows, 0.5) == near([0.4, 0.6])


def test_entropy_sampler_reveals_the_lowest_entropy_first() -> None:
    rows = (
        (0.5, 0.48, 0.02),
        (0.55, 0.225, 0.225),
    )  # the second has the larger maximum, the first the lower entropy
    assert first_revealed(UnmaskingSampler(4, "entropy"), rows, 0.5) == [1.0, 0.0]
    assert first_revealed(UnmaskingSampler(4, "top"), rows, 0.5) == [0.0, 1.0]


@pytest.mark.parametrize("s", [0.5, 0.8])
def test_gumbel_noise_of_unmasking_sampler_scales_with_time(s: float) -> None:
    """The position of higher confidence is revealed first with probability 1/(1 + e^(-d/b)).

    d is the difference of the confidences of two positions, and b = noise * s the scale of the
    Gumbel noise at time s.
    """
    rows = ((0.8, 0.2), (0.5, 0.5))
    first = 1.0 / (1.0 + math.exp(-math.log(0.8 / 0.5) / (2.0 * s)))
    assert first_revealed(UnmaskingSampler(4, "top", noise=2.0), rows, s) == near(
        [first, 1.0 - first]
    )


def steps_of_entropy_bound(
    bound: float, rows: tuple[tuple[float, ...], ...]
) -> tuple[list[int], list[float]]:
    """Sample with the entropy-bound sampler; rows are the predicted distributions of the positions.

    Returns the number of masked positions after each step, and the times passed to the network.
    """
    canvas = canvas_of((MASK,) * len(rows), 1.0, 1)

    def rng(k: int) -> Any:
        return SobolRng(torch.zeros(1, dtype=torch.long), 64, len(rows))

    steps = list(EntropyBoundSampler(bound).run(MASKED, predicting(MASKED, *rows), canvas, rng))
    return [int((step.zt == MASK).sum()) for step in steps], [float(step.t[0, 0]) for step in steps]


def test_entropy_bound_sampler_reveals_positions_exactly_at_the_bound() -> None:
    """Positions with a certain prediction have entropy 0; a bound of 0 reveals all in one step."""
    certain = (1.0, 0.0, 0.0)
    assert steps_of_entropy_bound(0.0, (certain, certain, certain)) == ([0], [0.0])


def test_entropy_bound_sampler_sums_all_entropies_but_the_largest() -> None:
    """The predictions at three positions have the entropy h = ln 3 each.

    A bound between h and 2 h reveals two positions, and a bound below h reveals one.
    """
    flat = (1 / 3, 1 / 3, 1 / 3)
    assert steps_of_entropy_bound(1.5, (flat, flat, flat))[0] == [1, 0]
    assert steps_of_entropy_bound(1.0, (flat, flat, flat)) == (
        [2, 1, 0],
        pytest.approx([2 / 3, 1 / 3, 0.0]),
    )


# ---------------------------------------------------------------------- generate


def test_generate_uses_uniforms_determined_by_seed_purpose_and_step() -> None:
    """Sampling uses other uniforms than training with the same seed, and than other seeds."""
    seen: list[tuple[int, int, str, list[int], int]] = []

    class RecordRng(Sampler):
        def run(self, process: Any, network: Any, canvas: Canvas, rng_at: Any) -> Iterator[Canvas]:
            for step in (0, 7):
                rng = rng_at(step)
                seen.append((rng.seed, rng.step, rng.purpose, rng.index.tolist(), rng.length))
            yield canvas.advance(torch.zeros_like(canvas.zt), torch.zeros_like(canvas.t))

    index = torch.tensor([4, 9])
    generate(RecordRng(), MASKED, predicting(MASKED, P), index=index, length=3, seed=5)
    assert seen == [(5, 0, "sample", [4, 9], 3), (5, 7, "sample", [4, 9], 3)]
    drawn = [
        generate(
            AncestralSampler(4),
            UNIFORM,
            predicting(UNIFORM, P),
            index=torch.arange(20),
            length=3,
            seed=seed,
        ).ids
        for seed in (0, 1)
    ]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("shape", ["block", "slide"])
def test_network_input_has_prompt_tokens_at_time_zero_in_any_window(shape: Any) -> None:
    shown: list[Noisy] = []

    def network(noisy: Noisy) -> Tensor:
        shown.append(noisy)
        return torch.tensor(P, dtype=torch.float64).log().expand(*noisy.zt.shape, -1)

    sampler = HyperscheduleSampler(AncestralSampler(6), WindowTimes(2, shape, paired=False))
    prompt, prompt_mask = (
        torch.tensor([[1, 2, 0, 1, 2]]),
        torch.tensor([[False, True, False, True, False]]),
    )
    settings: dict[str, Any] = {"prompt": prompt, "prompt_mask": prompt_mask}
    generate(
        sampler,
        MASKED,
        network_from_noisy(network, MASKED.vocabulary),
        index=torch.arange(1),
        length=5,
        seed=0,
        **settings,
    )
    assert len(shown) >= 3
    for noisy in shown:
        assert bool((noisy.t[noisy.clean] == 0.0).all())
        assert bool(noisy.clean[prompt_mask].all())
        assert bool((noisy.zt == prompt)[prompt_mask].all())


def test_sampling_step_keeps_the_time_of_prompt_positions() -> None:
    canvas = canvas_of((MASK, MASK), 0.9, 1)
    canvas = replace(canvas, free=torch.tensor([[True, False]]))
    moved_on = canvas.advance(canvas.zt, torch.full_like(canvas.t, 0.4))
    assert moved_on.t.tolist() == [[0.4, 0.9]]


def test_prompt_tokens_have_time_zero_in_every_sampling_step() -> None:
    prompt, prompt_mask = torch.tensor([[1, 2, 0]]), torch.tensor([[False, True, False]])
    times: list[Tensor] = []
    settings: dict[str, Any] = {
        "prompt": prompt,
        "prompt_mask": prompt_mask,
        "on_step": lambda k, canvas: times.append(canvas.t),
    }
    network = predicting(MASKED, P)
    generate(
        AncestralSampler(3), MASKED, network, index=torch.arange(1), length=3, seed=0, **settings
    )
    assert [t[0, 1].item() for t in times] == [0.0, 0.0, 0.0]
    assert [t[0, 0].item() for t in times] == pytest.approx([2 / 3, 1 / 3, 0.0])


def test_every_step_of_a_grid_sampler_uses_different_uniforms() -> None:
    asked: list[int] = []

    def rng_at(step: int) -> Any:
        asked.append(step)
        return covering(1)

    list(AncestralSampler(4).run(MASKED, predicting(MASKED, P), canvas_of((MASK,), 1.0), rng_at))
    assert asked == [0, 1, 2, 3]


def test_final_decoding_corrects_tokens_that_are_noisy_at_time_zero() -> None:
    """The process redraws a fraction 0.3 of the tokens at t = 0, and only masks tokens later."""
    process = EpsilonHybrid(FlatVocabulary(3), LinearSchedule(), 0.3)
    assert process.active(torch.arange(4)).tolist() == [False, False, False, True]
    canvas = canvas_of((2,), 0.25)
    after = AncestralSampler(4).finish(process, predicting(process, P), canvas, covering(1)).zt
    joint = torch.tensor(P) * torch.tensor([0.1, 0.1, 0.8])
    assert shares(after[:, 0], 3) == near((joint / joint.sum()).tolist())


def test_remasking_rules_give_kappa_between_0_and_1_at_all_times() -> None:
    for rule in (
        CapRemasking(1.0),
        RescaleRemasking(1.0),
        ConfidenceRemasking(1.0),
        LoopRemasking(1.0),
    ):
        for t, s in ((1.0, 0.99), (0.5, 0.5), (0.01, 0.001), (1e-9, 0.0)):
            canvas = replace(
                canvas_of((0, MASK), t, 1),
                extras={"drawn_log_p": torch.full((1, 2), -1.0).double()},
            )
            kappa = rule(MASKED, canvas, torch.full_like(canvas.t, s))
            assert bool(((kappa >= 0.0) & (kappa <= 1.0)).all()), (rule, t, s)


def test_confidence_remasking_ignores_prompt_positions() -> None:
    """A token of a finished window has a recorded probability, but is not remasked."""
    canvas = canvas_of((0, 1), 0.45, 1)
    canvas = replace(
        canvas,
        free=torch.tensor([[True, False]]),
        extras={"drawn_log_p": torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()},
    )
    s = torch.full_like(canvas.t, 0.3)
    largest = torch.full_like(s, 0.5)
    assert ConfidenceRemasking(1.0).sigma(MASKED, canvas, s, largest).tolist() == [[0.5, 0.0]]


def test_unmasking_sampler_on_a_tree_spreads_moves_of_all_levels_over_its_steps() -> None:
    """Four masks of a two-level tree need eight moves; after a step to s = 0.75, six remain."""
    canvas = canvas_of((5, 5, 5, 5), 1.0)
    after = moved(UnmaskingSampler(4, "top"), TREE, predicting(TREE, P), canvas, 0.75).zt
    assert (after != 5).sum(-1).unique().tolist() == [2]
    assert bool((TREE.vocabulary.level_of(after) >= 1).all()), (
        "a position moved two levels in one step"
    )


def test_trapezoidal_sampler_sets_negative_extrapolated_rates_to_zero() -> None:
    """The network predicts token 0 at the start of the step, and token 1 in its middle."""
    t, s, rho = 0.8, 0.3, 0.55
    early, late = (0.9, 0.05, 0.05), (0.1, 0.85, 0.05)

    def network(noisy: Noisy) -> Tensor:
        log_p = torch.where(
            noisy.t.unsqueeze(-1) > 0.7, torch.tensor(early).double(), torch.tensor(late).double()
        )
        return log_p.log()

    after = moved(
        TrapezoidalSampler(4),
        MASKED,
        network_from_noisy(network, MASKED.vocabulary),
        canvas_of((MASK,), t),
        s,
    ).zt
    rates = [max(2.0 * b / rho - a / t, 0.0) for a, b in zip(early, late)]
    assert rates[0] == 0.0
    first, second = math.exp(-(t - rho) / t), math.exp(-sum(rates) * (rho - s))
    expected = [
        (1.0 - first) * a + first * (1.0 - second) * rate / sum(rates)
        for a, rate in zip(early, rates)
    ]
    assert shares(after[:, 0], 4) == near([*expected, first * second])
