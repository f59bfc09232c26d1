"""Detours: training near the path of a level clock, and its weights."""

from __future__ import annotations

import pytest
import torch
from ddiff_dit.dit import DiT
from torch import Tensor

from ddiff.core.clock import CdfClock, LevelClock, LogTimeClock
from ddiff.core.detour import Detour, DetourClock, tabulate_groups
from ddiff.core.elbo import nelbo, network_from_table
from ddiff.core.information import TimeChange
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import GeometricSchedule
from ddiff.core.times import FlatTimes, OccupancyTimes, TimeRule, Times
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.data.batch import Batch
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.heads import TreeHead
from ddiff.testing import assert_laws, check_time_rule
from ddiff.testing.bound import constant_table
from ddiff.training.losses import ClippedLoss, ElboLoss
from ddiff.training.objective import DiffusionObjective

PAIR = HierarchicalVocabulary([[0, 1, 0, 2, 1]])
THREE = HierarchicalVocabulary([[2, 0, 1, 0, 1], [1, 0, 1]])
CLOCKS = (LogTimeClock((1.0, 1.0)), LogTimeClock((0.5, 1.0, 1.3)))
clocks = pytest.mark.parametrize("clock", CLOCKS, ids=["two levels", "three levels"])


def all_detours(clock: LevelClock, count: int, share: float) -> tuple[DetourClock, Tensor]:
    """Return a detour of every extreme path at `count` times each, and the times [r]."""
    num_paths = 2 ** (clock.num_levels - 1)
    choice = (torch.arange(num_paths, dtype=torch.float64) + 0.5) / num_paths
    choice = choice.repeat_interleave(count)
    t = torch.linspace(0.01, 0.99, count, dtype=torch.float64).repeat(num_paths)
    return DetourClock(clock, Detour(torch.full_like(choice, share), choice)), t


def test_groups_of_three_levels_are_all_divisions() -> None:
    lower, size = tabulate_groups(3)
    assert lower.tolist() == [[0, 1, 2], [0, 0, 2], [0, 1, 1], [0, 0, 0]]
    assert size.tolist() == [[1, 1, 1], [2, 2, 1], [1, 2, 2], [3, 3, 3]]


@clocks
@pytest.mark.parametrize("share", [0.3, 1.0 - 1e-9])
def test_detour_has_ordered_occupancies_and_their_mean(clock: LevelClock, share: float) -> None:
    detour, t = all_detours(clock, 99, share)
    cdf = detour.cdf(t)
    assert bool((cdf[:, :-1] >= cdf[:, 1:] - 1e-12).all())
    torch.testing.assert_close(cdf.mean(-1), clock.cdf(t).mean(-1))
    start = torch.ones(len(t), 1, dtype=torch.float64)
    reached = torch.cat([start, cdf, 0.0 * start], -1)
    torch.testing.assert_close(detour.pi(t), reached[:, :-1] - reached[:, 1:])


@clocks
def test_inflow_of_a_detour_is_the_derivative_of_its_occupancies(clock: LevelClock) -> None:
    """Central differences of 2e-6; times at a kink of an extreme path are left out."""
    detour, t = all_detours(clock, 99, 0.4)
    step = 1e-6
    quotient = (detour.cdf(t + step) - detour.cdf(t - step)) / (2.0 * step)
    straight = (detour.inflow(t + step) - detour.inflow(t - step)).abs() < 1e-3
    assert float(straight.double().mean()) > 0.98
    torch.testing.assert_close(quotient[straight], detour.inflow(t)[straight], rtol=1e-6, atol=1e-6)


def test_detour_without_share_is_the_clock() -> None:
    clock = CLOCKS[0]
    detour, t = all_detours(clock, 9, 0.0)
    torch.testing.assert_close(detour.pi(t), clock.pi(t))
    torch.testing.assert_close(detour.hazard(t), clock.hazard(t))


def test_detour_of_the_single_group_is_the_diagonal() -> None:
    clock = CLOCKS[0]
    share = torch.full((3,), 1.0 - 1e-12, dtype=torch.float64)
    diagonal = DetourClock(clock, Detour(share, torch.full_like(share, 0.99)))
    cdf = diagonal.cdf(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    torch.testing.assert_close(cdf[:, 0], cdf[:, 1])


@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_time_rule_of_occupancies_passes_all_conformance_checks(spread: float) -> None:
    assert_laws(check_time_rule(OccupancyTimes(spread, 1e-3, 1.0)))


# ---------------------------------------------------------------------- training

COUNTS = torch.tensor([1.0, 5.0, 2.0, 8.0, 4.0])
# The head adds one to each count.
FIXED = (COUNTS.double() + 1.0) / float((COUNTS + 1.0).sum())


def make_objective(
    process: TreeProcess, loss: ElboLoss | ClippedLoss, spread: float
) -> DiffusionObjective:
    """Return an objective whose denoiser predicts a fixed distribution, that of the counts."""
    torch.manual_seed(0)
    head = TreeHead(process.vocabulary, 8, "tied")
    denoiser = Denoiser(DiT(process.vocabulary, 8, layers=1, heads=2), head).double()
    head.start_from_counts(COUNTS)
    return DiffusionObjective(process, denoiser, loss, OccupancyTimes(spread, 0.0, 1.0))


@pytest.mark.parametrize(
    "process",
    [TreeProcess(PAIR, CLOCKS[0]), TreeProcess(THREE, CLOCKS[1])],
    ids=["two levels", "three levels"],
)
def test_training_bound_of_a_fixed_prediction_is_its_cross_entropy(process: TreeProcess) -> None:
    """Every rising path has this bound, so the mean over random detours has it too.

    The tolerance is five standard errors of the mean of 40 batches.
    """
    objective = make_objective(process, ElboLoss(), 0.9)
    ids = torch.randint(5, (64, 8), generator=torch.Generator().manual_seed(2))
    found = draw_losses(objective, ids)
    expected = float(-FIXED.log()[ids].mean())
    assert float(found.mean()) == pytest.approx(expected, abs=float(5.0 * found.std() / 40**0.5))


def draw_losses(objective: DiffusionObjective, ids: Tensor) -> Tensor:
    """Return the losses [40] of a batch with 40 draws of times and states."""
    slots = torch.arange(len(ids))
    scored = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(ids, scored, scored, torch.zeros_like(ids), slots)
    count = {"tokens": torch.tensor(float(ids.numel()))}
    losses = []
    for step in range(40):
        rng = CounterRng(0, step, slots, ids.shape[1])
        losses.append(objective(batch, rng, count, len(ids)).loss.item())
    return torch.tensor(losses, dtype=torch.float64)


class OneByOneTimes(TimeRule):
    """Time rule whose detours all have a share of 0.9 of the path of one level after the other."""

    has_one_time = True
    has_detours = True

    def draw(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> Times:
        times = FlatTimes().draw(clock, rng, slot, slots, length)
        return times._replace(
            detour=Detour(torch.full_like(times.t, 0.9), torch.zeros_like(times.t))
        )

    def ends(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> tuple[Times, Times]:
        return FlatTimes().ends(clock, rng, slot, slots, length)


def test_decoding_and_diffusion_terms_of_a_detour_add_up_to_the_cross_entropy() -> None:
    """The process is noisy at t = 0, with F = (0.8, 0.4). The detour starts at (0.98, 0.22) there.

    All tokens are token 0, of a rare cluster. A decoding term at F would therefore be about 0.12
    nats too large. The tolerance is five standard errors of the mean of 40 batches.
    """
    clock = CdfClock([GeometricSchedule(1.6, 20.0), GeometricSchedule(0.5, 16.0)])
    objective = make_objective(TreeProcess(PAIR, clock), ElboLoss(), 0.9)
    near = DiffusionObjective(
        objective.process, objective.denoiser, ElboLoss(), OneByOneTimes(), decoding_share=0.5
    )
    found = draw_losses(near, torch.zeros(256, 8, dtype=torch.long))
    tolerance = float(5.0 * found.std() / 40**0.5)
    assert tolerance < 0.1
    assert float(found.mean()) == pytest.approx(-float(FIXED[0].log()), abs=tolerance)


def test_clipped_training_loss_clips_the_weights_of_the_detour() -> None:
    process = TreeProcess(PAIR, CLOCKS[0])
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    choice = torch.full((len(t),), 0.25, dtype=torch.float64)
    along = process.along(Detour(torch.full_like(choice, 0.9), choice))
    x0 = torch.zeros(len(t), dtype=torch.long)
    zt = torch.full_like(x0, PAIR.root)
    exact = along.weight(x0, zt, t)
    assert float(exact.max()) > 3.0
    assert not torch.allclose(exact, process.weight(x0, zt, t))
    clipped = ClippedLoss(largest=3.0).weight(along, x0, zt, t)
    torch.testing.assert_close(clipped, exact.clamp(max=3.0))


def test_detours_are_refused_without_several_levels() -> None:
    flat = TreeProcess(FlatVocabulary(5), LogTimeClock((1.0,)))
    denoiser = Denoiser(DiT(PAIR, 8, layers=1, heads=2), TreeHead(PAIR, 8, "tied"))
    with pytest.raises(ArgumentError, match="two or more levels"):
        DiffusionObjective(flat, denoiser, ElboLoss(), OccupancyTimes())
    with pytest.raises(ArgumentError, match="two or more levels"):
        flat.along(Detour(torch.zeros(1), torch.zeros(1)))


def test_reported_bound_is_that_of_flat_times() -> None:
    process: ForwardProcess = TreeProcess(PAIR, CLOCKS[0])
    network = network_from_table(constant_table(torch.full((5,), 0.2).double().log()), PAIR)
    x0 = torch.zeros(4, 3, dtype=torch.long)
    scored = torch.ones_like(x0, dtype=torch.bool)
    slots = torch.arange(4)
    rng = CounterRng(0, 0, slots, 3)
    near = OccupancyTimes().with_window(0.0, 1.0, 3)
    found = nelbo(process, network, x0, scored, near, rng, slots, 4).total
    flat = nelbo(process, network, x0, scored, FlatTimes(0.0, 1.0, 3), rng, slots, 4).total
    assert torch.equal(found, flat)
    with pytest.raises(ArgumentError, match="draws detours for training"):
        nelbo(process, network, x0, scored, OccupancyTimes(), rng, slots, 4)
