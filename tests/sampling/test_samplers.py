"""Every sampler on every process: rejections, prompts, distributions and cost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from all_samplers import SAMPLERS
from joint import JOINT, EarlyNoise, exact_network, processes

from ddiff.core.components import MixtureProcess
from ddiff.core.elbo import network_from_noisy, network_from_table
from ddiff.core.network import count_evaluations
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, WindowTimes
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.errors import ArgumentError, NonFiniteError
from ddiff.sampling.adaptive_correction import AdaptiveCorrectionSampler
from ddiff.sampling.analytic import AnalyticSampler
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.blockwise import BlockwiseSampler
from ddiff.sampling.first_hitting import FirstHittingSampler
from ddiff.sampling.grid import Grid, LoopGrid
from ddiff.sampling.grid_sampler import compute_alpha
from ddiff.sampling.hyperschedule import HyperscheduleSampler
from ddiff.sampling.loop import Canvas, Sampler, Samples, generate
from ddiff.sampling.one_level import OneLevelSampler
from ddiff.sampling.predictor_corrector import ForwardBackward, PredictorCorrectorSampler
from ddiff.sampling.psi import CapRemasking, PsiSampler
from ddiff.sampling.self_correction import SelfCorrectingSampler
from ddiff.sampling.shaping import ShapedSampler, Temperature
from ddiff.sampling.tau_leaping import TauLeapingSampler
from ddiff.sampling.trapezoidal import TrapezoidalSampler
from ddiff.sampling.unmasking import EntropyBoundSampler, UnmaskingSampler, rank_by_confidence
from ddiff.testing.sampler_distribution import ExactNetwork, FastRng, measure_sampler

PROCESSES = processes()
PAIRS = [(s, p) for s, (_, refused) in SAMPLERS.items() for p in PROCESSES if p not in refused]
REFUSED = [(s, p) for s, (_, refused) in SAMPLERS.items() for p in refused]


def draw(sampler: Sampler, process: ForwardProcess, index: list[int], **settings: Any) -> Samples:
    settings = {"network": exact_network(process), "seed": 3, "length": 2} | settings
    return generate(sampler, process, index=torch.tensor(index), **settings)


# ------------------------------------------------------------------ all samplers on all processes


@pytest.mark.parametrize(("sampler", "process"), PAIRS)
def test_samples_keep_the_prompt_and_contain_only_tokens(sampler: str, process: str) -> None:
    """Each row has its own prompt; one prompt is empty, and one covers the whole row."""
    prompt = torch.tensor([[1, 0], [2, 2], [0, 1], [1, 1]])
    prompt_mask = torch.tensor([[True, False], [False, True], [False, False], [True, True]])
    states: list[torch.Tensor] = []
    keep = lambda step, canvas: states.append(canvas.zt)  # noqa: E731
    settings: dict[str, Any] = {"prompt": prompt, "prompt_mask": prompt_mask, "on_step": keep}
    drawn = draw(SAMPLERS[sampler][0](4), PROCESSES[process], [0, 1, 2, 3], **settings)
    assert all(bool((zt == prompt)[prompt_mask].all()) for zt in [*states, drawn.ids])
    assert bool((drawn.ids < 3).all())
    assert drawn.runs[3] == 0, "the last row has no free position"


@pytest.mark.parametrize(("sampler", "process"), PAIRS)
def test_sample_does_not_depend_on_other_samples_of_its_batch(sampler: str, process: str) -> None:
    build = SAMPLERS[sampler][0]
    together = draw(build(4), PROCESSES[process], list(range(6))).ids
    assert torch.equal(draw(build(4), PROCESSES[process], [5, 2]).ids, together[[5, 2]])


@pytest.mark.parametrize("process", ["uniform", "masked"])
def test_first_hitting_decodes_each_sequence_after_its_own_last_event(process: str) -> None:
    """Rows of a batch end after different numbers of events.

    The final decoding of a row must not depend on the row with the most events.
    """
    dist = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    network = network_from_noisy(
        lambda noisy: dist.expand(*noisy.zt.shape, 3), PROCESSES[process].vocabulary
    )
    # until = 0.4 ends the events early; the final decoding step draws the other tokens.
    build = lambda: FirstHittingSampler(until=0.4)  # noqa: E731
    together = draw(build(), PROCESSES[process], list(range(12)), network=network, length=8)
    for row in range(12):
        assert torch.equal(
            draw(build(), PROCESSES[process], [row], network=network, length=8).ids[0],
            together.ids[row],
        )


def test_rounding_errors_do_not_change_the_ranks_of_equal_confidences() -> None:
    """Float32 rounding errors of 64 equal confidences must not change the order of positions."""
    rng = CounterRng(0, 1, torch.arange(4), 64)
    confidence = torch.full((4, 64), -1.2345, dtype=torch.float64)
    confidence[:, ::7] = -0.5
    jitter = 1e-7 * torch.randn(
        confidence.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    order = rank_by_confidence(confidence, rng)
    assert torch.equal(order, rank_by_confidence(confidence + jitter, rng))
    assert bool((order[:, :10] % 7 == 0).all()), "the most confident positions rank first"
    assert not torch.equal(order[0], order[1]), (
        "equal confidences are ranked in the same order in all rows"
    )


@pytest.mark.parametrize(("sampler", "process"), REFUSED)
def test_unsupported_sampler_and_process_are_refused_with_a_reason(
    sampler: str, process: str
) -> None:
    reason = {"first_hitting": "must have events", "blockwise events": "must have events"}
    reads_words = {"acs", "self_correction"}
    expected = reason.get(
        sampler,
        "does not train the prediction at tokens" if sampler in reads_words else "must be monotone",
    )
    with pytest.raises(ArgumentError, match=expected):
        draw(SAMPLERS[sampler][0](4), PROCESSES[process], [0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_rate_samplers_accept_a_network_that_predicts_scores(sampler: str) -> None:
    process = PROCESSES["masked"]
    if "masked" in SAMPLERS[sampler][1]:
        process = PROCESSES["uniform"]
    settings: dict[str, Any] = {
        "network": count_evaluations(ExactNetwork(process, JOINT, "score"), "score")
    }
    if sampler in ("tau_leaping", "analytic", "trapezoidal"):
        assert bool((draw(SAMPLERS[sampler][0](4), process, [0, 1], **settings).ids < 3).all())
        return
    with pytest.raises(ArgumentError, match="predicts a score"):
        draw(SAMPLERS[sampler][0](4), process, [0], **settings)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_diffusion_samplers_refuse_a_run_without_process(sampler: str) -> None:
    with pytest.raises(ArgumentError, match="this run has none"):
        generate(
            SAMPLERS[sampler][0](4),
            None,
            exact_network(PROCESSES["masked"]),
            index=torch.arange(1),
            length=2,
            seed=0,
        )


def test_samplers_and_grids_refuse_invalid_arguments() -> None:
    inner = AncestralSampler(2)
    wrong: list[Any] = [
        lambda: Grid("uniform", 0),
        lambda: Grid("cosin", 4),
        lambda: LoopGrid(4, on=0.1, off=0.2),
        lambda: TrapezoidalSampler(4, theta=1.0),
        lambda: UnmaskingSampler(4, "sure"),
        lambda: UnmaskingSampler(4, noise=-1.0),
        lambda: EntropyBoundSampler(-0.1),
        lambda: PsiSampler(4, 1.5),
        lambda: PsiSampler(4, CapRemasking(2.0)),
        lambda: AdaptiveCorrectionSampler(4, -0.1),
        lambda: SelfCorrectingSampler(inner, rounds=0),
        lambda: PredictorCorrectorSampler(inner, ForwardBackward(), rounds=0),
        lambda: ForwardBackward(0.0),
        lambda: BlockwiseSampler(inner, 0),
        lambda: FirstHittingSampler(until=0.0),
        lambda: FirstHittingSampler(until=0.5),
        lambda: AncestralSampler(4, "mode"),
    ]
    for build in wrong:
        with pytest.raises(ArgumentError, match="got"):
            build()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_raises_an_error_that_names_the_network_that_predicts_nan(sampler: str) -> None:
    process = PROCESSES["uniform" if "masked" in SAMPLERS[sampler][1] else "masked"]
    network = network_from_table(
        lambda zt, t: torch.full((*zt.shape, 3), torch.nan).double(), process.vocabulary
    )
    with pytest.raises(NonFiniteError, match="NaN"):
        draw(SAMPLERS[sampler][0](2), process, [0, 1], network=network, length=6)


# ---------------------------------------------------------------------- distributions of samples


@pytest.mark.parametrize("name", ["masked", "tree", "uncertain tree", "uniform"])
def test_first_hitting_samples_follow_the_data_distribution(name: str) -> None:
    """Compare the frequencies of nine pairs of tokens with the joint distribution.

    By chance, the chi-square statistic is above its limit 35 with probability 2.7e-5. There are
    four cases, and the seed is fixed.
    """
    count = 2**12 if name == "uniform" else 2**15
    dist = measure_sampler(FirstHittingSampler(), PROCESSES[name], JOINT, points=count).dist[:3, :3]
    assert float(dist.sum()) == pytest.approx(1.0)
    assert float((count * (dist - JOINT) ** 2 / JOINT).sum()) < 35


@pytest.mark.parametrize(
    "inner", [AncestralSampler(3), TauLeapingSampler(1), FirstHittingSampler()]
)
def test_sampling_one_position_at_a_time_is_exact(inner: Any) -> None:
    count = 2**15
    dist = measure_sampler(BlockwiseSampler(inner, 1), PROCESSES["tree"], JOINT, points=count).dist[
        :3, :3
    ]
    assert float((count * (dist - JOINT) ** 2 / JOINT).sum()) < 35


@pytest.mark.parametrize("name", ["masked", "uniform"])
@pytest.mark.parametrize("build", [TauLeapingSampler, AnalyticSampler])
def test_ancestral_sampling_error_is_first_order_in_the_step_size(build: Any, name: str) -> None:
    """Four times as many steps divide the distance to the joint distribution by four.

    Distances are above 8e-3 and are computed with an error below 4e-4.
    """
    few, many = (
        measure_sampler(build(n), PROCESSES[name], JOINT, apart=True, points=2**14).distance(JOINT)
        for n in (8, 32)
    )
    assert 3.3 < few / many < 5.0


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_trapezoidal_beats_tau_leaping_at_equal_cost(name: str) -> None:
    """Compare a trapezoidal step, with two network evaluations, with two steps of tau-leaping.

    Twice as many steps halve the distance of tau-leaping. They would quarter the distance of the
    trapezoidal method if all extrapolated rates were positive. For this joint distribution some
    rates are clipped at 0, and the factor is 2.7. The noise of a distance is about 2e-3.
    """
    process = PROCESSES[name]
    few, many = (
        measure_sampler(TrapezoidalSampler(n), process, JOINT, points=2**15) for n in (4, 8)
    )
    euler = measure_sampler(TauLeapingSampler(16), process, JOINT, apart=True, points=2**13)
    assert few.distance(JOINT) / many.distance(JOINT) > 2.3
    assert many.distance(JOINT) < 0.85 * euler.distance(JOINT)
    assert many.runs < euler.runs + 1e-9


def test_error_from_noise_at_time_zero_does_not_fall_with_number_of_steps() -> None:
    """A tenth of the tokens is noisy at t = 0; the final decoding draws both independently."""
    process = MixtureProcess(FlatVocabulary(3, mask=False), EarlyNoise(), torch.full((3,), 1 / 3))
    near, nearer = (
        measure_sampler(AncestralSampler(n), process, JOINT, apart=True, points=2**13)
        for n in (24, 48)
    )
    closing = measure_sampler(
        AncestralSampler(48), PROCESSES["uniform"], JOINT, apart=True, points=2**13
    )
    assert nearer.distance(JOINT) > 1.25 * closing.distance(JOINT)
    assert near.distance(JOINT) < 1.9 * nearer.distance(JOINT), (
        "the distance falls as fast as at first order"
    )


def test_unmasking_in_order_of_confidence_favours_likely_sequences() -> None:
    """Revealing in an order that depends on the drawn tokens favours likely tokens.

    The error remains for any number of steps. An order that depends only on the predicted
    distributions has no such error.
    """
    process = PROCESSES["masked"]
    assert (
        measure_sampler(UnmaskingSampler(16), process, JOINT, points=2**13).distance(JOINT) > 0.15
    )
    assert (
        measure_sampler(UnmaskingSampler(16, "margin"), process, JOINT, points=2**14).distance(
            JOINT
        )
        < 0.02
    )
    assert (
        measure_sampler(EntropyBoundSampler(0.0), process, JOINT, points=2**14).distance(JOINT)
        < 0.02
    )
    assert (
        measure_sampler(EntropyBoundSampler(9.0), process, JOINT, points=2**12).distance(JOINT)
        > 0.35
    ), "a bound of 9 nats reveals all positions at once"


@pytest.mark.parametrize("name", PROCESSES)
def test_psi_with_kappa_1_and_adaptive_correction_with_eta_0_equal_ancestral_sampling(
    name: str,
) -> None:
    process, index = PROCESSES[name], list(range(40))
    plain = draw(AncestralSampler(6), process, index).ids
    assert torch.equal(draw(PsiSampler(6, 1.0), process, index).ids, plain)
    if name in ("uniform", "dense"):
        assert torch.equal(draw(AdaptiveCorrectionSampler(6, eta=0.0), process, index).ids, plain)


def test_psi_sampler_with_cap_remasking_equals_remdm_for_masked_diffusion() -> None:
    """Compare with the step of ReMDM (arXiv 2503.00307) for the remasking probability sigma = 0.3.

    A token is masked with probability 0.3, and a mask is revealed with probability
    (alpha_s - 0.7 alpha_t)/(1 - alpha_t). The tolerance is five standard deviations of 40 000
    draws, at most 0.0125.
    """
    process, count, t, s = PROCESSES["masked"], 20_000, 0.6, 0.4
    zt = torch.tensor([[0, 3]]).repeat(count, 1)
    free = torch.ones_like(zt, dtype=torch.bool)
    canvas = Canvas(zt, torch.full(zt.shape, t).double(), ~free, free)
    sampler, rng = PsiSampler(2, CapRemasking(0.3)), FastRng(count, 5)
    moved = sampler.move(
        process, exact_network(process), canvas, torch.full_like(canvas.t, s), rng
    ).zt  # type: ignore[arg-type]
    masked = (moved == 3).double().mean(0)
    revealed = ((1 - s) - 0.7 * (1 - t)) / t
    assert masked.tolist() == pytest.approx([0.3, 1 - revealed], abs=0.0125)
    assert compute_alpha(process, torch.tensor([0.25, 0.5]).double()).tolist() == pytest.approx(
        [0.75, 0.5]
    )


def test_one_level_sampler_equals_ancestral_sampling_for_masked_diffusion() -> None:
    """The samplers use different uniforms, so their distances to JOINT agree only up to 1e-3."""
    process = PROCESSES["masked"]
    one, plain = (
        measure_sampler(build(4), process, JOINT, apart=True, points=2**13)
        for build in (OneLevelSampler, AncestralSampler)
    )
    assert one.distance(JOINT) == pytest.approx(plain.distance(JOINT), abs=1e-3)


def test_analytic_steps_of_a_score_and_of_its_distribution_agree() -> None:
    """The tolerance allows for rounding in the first step, where 1 - t is 1e-12."""
    for name in ("masked", "uniform"):
        process, states = PROCESSES[name], []
        keep = lambda k, canvas: states.append(canvas.zt)  # noqa: B023, E731
        dist = draw(AnalyticSampler(8), process, list(range(60)), on_step=keep)
        score = draw(
            AnalyticSampler(8),
            process,
            list(range(60)),
            network=count_evaluations(ExactNetwork(process, JOINT, "score"), "score"),
            on_step=keep,
        )
        assert float((states[6] == states[14]).double().mean()) > 0.98, (
            "states before the last step differ"
        )
        assert dist.clamped_mass.tolist() == [0.0] * 60
        assert float(score.clamped_mass.max()) < 1e-3


def test_analytic_sampler_clamps_and_reports_negative_probabilities() -> None:
    process = PROCESSES["uniform"]
    exact = ExactNetwork(process, JOINT, "score")

    def tilted(noisy: Any) -> Any:
        query = exact(noisy)
        tilt = torch.tensor([1.5, 0.0, -1.5]).double()
        return lambda rows, node, fn, *per_row: query(
            rows,
            node,
            lambda score, *values: fn(
                type(score)(score.log_ratio + tilt - tilt[noisy.zt.flatten()[rows]][:, None]),
                *values,
            ),
            *per_row,
        )

    score = count_evaluations(tilted, "score")
    drawn = draw(AnalyticSampler(8), process, list(range(10)), network=score)
    assert float(drawn.clamped_mass.min()) >= 0
    assert float(drawn.clamped_mass.max()) > 0.01
    assert bool((drawn.ids < 3).all())


# ---------------------------------------------------------------------- cost


def even_table(zt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return predicted log-distributions [B,L,3] that depend only on the position."""
    place = torch.arange(zt.shape[1]).double()
    return (
        torch.stack([place * 0, 0.7 * place, place.sin()], -1).log_softmax(-1).expand(*zt.shape, 3)
    )


def test_first_hitting_of_masks_evaluates_the_network_once_per_position() -> None:
    process = PROCESSES["masked"]
    network, prompt_mask = (
        network_from_table(even_table, process.vocabulary),
        torch.zeros(3, 9, dtype=torch.bool),
    )
    prompt_mask[1, 2:6] = True
    settings: dict[str, Any] = {
        "network": network,
        "length": 9,
        "prompt": torch.zeros(3, 9, dtype=torch.long),
        "prompt_mask": prompt_mask,
    }
    steps: list[int] = []
    drawn = draw(
        FirstHittingSampler(),
        process,
        [0, 1, 2],
        on_step=lambda k, canvas: steps.append(k),
        **settings,
    )
    assert drawn.runs.tolist() == [9, 5, 9]
    assert drawn.nfe == 9
    assert steps == list(range(1, 11))


def test_first_hitting_with_larger_until_needs_fewer_evaluations() -> None:
    """The parameter `until` limits the range of simulated times, and with it the candidate events.

    With uniform noise, candidate events occur at a rate of about 1/t + 2/(3 (1 - t)). For two
    positions and `until` = 1e-4, there are 16 candidates per position; between the times 1e-12 and
    1 - 1e-12 there would be 46.

    The error at each end of the range is at most until^2 / 2, the probability that both positions
    change outside the range. The tolerance adds 0.02 for sampling noise.
    """
    process, count = PROCESSES["uniform"], 2**12
    near, far = (
        measure_sampler(FirstHittingSampler(until), process, JOINT, points=count)
        for until in (1e-4, 0.49)
    )
    assert near.runs < 2 * 17.0 + 2
    assert far.runs < 0.3 * near.runs
    assert 0.02 < far.distance(JOINT) < 0.49**2 + 0.02


@pytest.mark.parametrize("name", ["masked", "tree", "uncertain tree"])
def test_first_hitting_sampler_ignores_setting_until_without_uniform_noise(name: str) -> None:
    """The samples are bitwise identical for two values of `until`."""
    plain, other = (
        draw(FirstHittingSampler(until), PROCESSES[name], list(range(50))).ids
        for until in (1e-4, 0.4)
    )
    assert torch.equal(plain, other)


@pytest.mark.parametrize(
    ("sampler", "most"),
    [("ancestral", 5), ("trapezoidal", 9), ("dfm", 13), ("margin", 5), ("psi", 5)],
)
def test_number_of_network_evaluations_stays_below_limit_of_sampler(
    sampler: str, most: int
) -> None:
    process = PROCESSES["tree"]
    network = network_from_table(even_table, process.vocabulary)
    drawn = draw(SAMPLERS[sampler][0](5), process, list(range(8)), network=network, length=12)
    assert 1 <= drawn.nfe <= most
    assert int(drawn.runs.max()) <= drawn.nfe


@pytest.mark.parametrize("by", ["confidence", "top", "margin", "entropy"])
def test_unmasking_sampler_grid_sets_the_number_of_revealed_positions(by: Any) -> None:
    process, left = PROCESSES["masked"], []
    network = network_from_table(even_table, process.vocabulary)
    keep = lambda k, canvas: left.append((canvas.zt == 3).sum(-1).tolist())  # noqa: E731
    draw(
        UnmaskingSampler(Grid("cosine", 4), by),
        process,
        [0, 1],
        network=network,
        length=10,
        on_step=keep,
    )
    assert left == [[9, 9], [7, 7], [3, 3], [0, 0]]  # floor of 10 cos(pi k / 8)


def test_blockwise_finishes_each_block_before_it_starts_the_next() -> None:
    process, shown = PROCESSES["masked"], []

    def table(zt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return even_table(zt, t)

    inner = network_from_table(table, process.vocabulary)

    def network(noisy: Any) -> Any:
        shown.append(noisy)
        return inner(noisy)

    draw(BlockwiseSampler(AncestralSampler(3), 2), process, [0], network=network, length=5)
    for noisy in shown:
        assert noisy.block.tolist() == [[0, 0, 1, 1, 2]]
        window = int(noisy.block[0][~noisy.clean[0]].min())
        later = noisy.block[0] > window
        assert bool(noisy.clean[0][noisy.block[0] < window].all())
        assert bool((noisy.zt[0][later] == 3).all())
        assert noisy.t[0][later].tolist() == [1.0] * int(later.sum())


def test_left_to_right_samplers_declare_looks_ahead_false() -> None:
    inner, window = AncestralSampler(4), WindowTimes(2, "slide", paired=False)
    blind: list[Any] = [BlockwiseSampler(inner, 2), HyperscheduleSampler(inner, window)]
    seeing: list[Any] = [
        inner,
        FirstHittingSampler(),
        BlockwiseSampler(inner, 2, "all"),
        HyperscheduleSampler(inner, FlatTimes()),
    ]
    for samplers, expected in ((blind, False), (seeing, True)):
        for sampler in samplers:
            assert sampler.looks_ahead is expected
            for around in (
                ShapedSampler(sampler, [Temperature(0.5)]),
                SelfCorrectingSampler(sampler),
            ):
                assert around.looks_ahead is expected
            assert BlockwiseSampler(sampler, 2, "all").looks_ahead is expected


def test_samplers_without_look_ahead_ignore_prompt_tokens_after_a_gap() -> None:
    """x_1 is drawn from its marginal, (.40, .25, .35), although the prompt contains x_2 = 1.

    P(x_1 | x_2 = 1) would be (.08, .80, .12).
    """
    process, count = PROCESSES["masked"], 400
    prompt, prompt_mask = torch.tensor([[0, 1]] * count), torch.tensor([[False, True]] * count)
    for sampler in (
        AncestralSampler(2),
        BlockwiseSampler(AncestralSampler(2), 1),
        BlockwiseSampler(AncestralSampler(2), 1, "all"),
        HyperscheduleSampler(AncestralSampler(3), WindowTimes(1, "slide", paired=False)),
    ):
        network = PastOnlyNetwork(process)
        drawn = draw(
            sampler,
            process,
            list(range(count)),
            network=network,
            prompt=prompt,
            prompt_mask=prompt_mask,
        ).ids
        share = float((drawn[:, 0] == 1).double().mean())
        assert share == pytest.approx(0.8 if sampler.looks_ahead else 0.25, abs=0.1), (
            "five deviations"
        )


class PastOnlyNetwork:
    """Network that predicts exactly, given only positions of the same or earlier blocks."""

    def __init__(self, process: ForwardProcess) -> None:
        self.process, self.exact = process, ExactNetwork(process, JOINT)

    def __call__(self, noisy: Any) -> Any:
        if noisy.block is None:
            return self.exact(noisy)
        hidden = (noisy.block[:, 1:] > noisy.block[:, :1]).expand(len(noisy.zt), 1)
        first = noisy._replace(
            zt=torch.cat(
                [
                    noisy.zt[:, :1],
                    noisy.zt[:, 1:].masked_fill(hidden, self.process.vocabulary.root),
                ],
                1,
            ),
            t=torch.cat([noisy.t[:, :1], noisy.t[:, 1:].masked_fill(hidden, 1.0)], 1),
            clean=torch.cat([noisy.clean[:, :1], noisy.clean[:, 1:] & ~hidden], 1),
        )
        seen, whole = self.exact(first), self.exact(noisy)

        def query(rows: Any, node: Any, fn: Any, *per_row: Any) -> Any:
            return (whole if bool((rows % 2 == 1).all()) else seen)(rows, node, fn, *per_row)

        return query


def test_self_correcting_sampler_changes_at_most_one_token_per_round() -> None:
    process, canvases = PROCESSES["uniform"], []
    sampler = SelfCorrectingSampler(AncestralSampler(1), rounds=30, at=0.7)
    drawn = draw(
        sampler, process, list(range(30)), on_step=lambda k, canvas: canvases.append(canvas.zt)
    )
    changes = [(after != before).sum(-1) for before, after in itertools.pairwise(canvases)]
    assert max(int(change.max()) for change in changes) == 1
    assert len(canvases) < 30
    likelihood = [float(JOINT[zt[:, 0], zt[:, 1]].log().mean()) for zt in (canvases[0], drawn.ids)]
    assert likelihood[1] > likelihood[0] + 0.5, "the likelihood of the pairs did not increase"


# ---------------------------------------------------------------------- grids


@pytest.mark.parametrize("steps", [1, 2, 7, 64])
@pytest.mark.parametrize("spacing", ["uniform", "cosine", "log"])
def test_grid_times_fall_from_one_to_zero(spacing: Any, steps: int) -> None:
    times = Grid(spacing, steps).times()
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert all(later < sooner for sooner, later in itertools.pairwise(times))


def test_log_grid_is_uniform_in_log_time_after_its_first_step() -> None:
    times = torch.tensor(Grid("log", 9).times()[1:], dtype=torch.float64)
    assert float(times[0]) == pytest.approx(1 - 1 / 9)
    elapsed = -(-times).log1p()
    assert elapsed.diff().tolist() == pytest.approx([float(elapsed.diff()[0])] * 8)


def test_loop_grid_contains_its_time_hold_many_times() -> None:
    times = LoopGrid(40, on=0.5, off=0.1, hold=0.2).times()
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, 41)
    assert sum(abs(t - 0.2) < 1e-12 for t in times) == 17  # tau from .5 to .1 in steps of 1/40
