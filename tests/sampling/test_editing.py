"""Edits of token sequences: chosen positions, clamped positions, distribution, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from all_samplers import SAMPLERS
from joint import processes
from torch import Tensor

import ddiff.sampling.editing as editing
from ddiff.core.clock import CdfClock
from ddiff.core.components import MixtureProcess
from ddiff.core.elbo import Network, network_from_table
from ddiff.core.network import count_evaluations
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import CosineSchedule, LinearSchedule
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.errors import ArgumentError
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.editing import Edits, edit
from ddiff.sampling.loop import Canvas, Sampler, generate
from ddiff.sampling.shaping import ShapedSampler, Temperature
from ddiff.sampling.uncertainty import ENTROPY_PASSES
from ddiff.sampling.unmasking import UnmaskingSampler

PROCESSES = processes()
MODES = ("random", "entropy", "suffix")
# Samplers that edit, with the processes that each refuses.
GRID_SAMPLERS = {
    name: (build, refused)
    for name, (build, refused) in SAMPLERS.items()
    if name not in ("first_hitting", "entropy", "self_correction", "blockwise", "blockwise events")
}
PAIRS = [(s, p) for s, (_, refused) in GRID_SAMPLERS.items() for p in PROCESSES if p not in refused]


def varied_network(process: ForwardProcess) -> Network:
    """Return a network whose predictions depend on position and states, with logits in [-2, 2]."""
    num_tokens = process.vocabulary.num_tokens

    def table(zt: Tensor, t: Tensor) -> Tensor:
        place = torch.arange(zt.shape[1], dtype=torch.float64)
        token = torch.arange(num_tokens, dtype=torch.float64)
        around = zt.double().roll(1, -1).unsqueeze(-1)
        return (2.0 * torch.sin(place.unsqueeze(-1) + 2.0 * token + around)).log_softmax(-1)

    return network_from_table(table, process.vocabulary)


def run_edit(process: ForwardProcess, source: Tensor, **settings: Any) -> Edits:
    settings = {
        "sampler": AncestralSampler(6),
        "network": varied_network(process),
        "editable": torch.ones_like(source, dtype=torch.bool),
        "index": torch.arange(len(source)),
        "seed": 5,
    } | settings
    return edit(
        settings.pop("sampler"), process, settings.pop("network"), source=source, **settings
    )


def random_tokens(count: int, length: int, num_tokens: int = 3) -> Tensor:
    return torch.randint(num_tokens, (count, length), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ kept and sampled positions


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("mode", MODES)
def test_edit_with_ratio_0_returns_the_source_without_evaluations(process: str, mode: str) -> None:
    source = random_tokens(4, 7)
    done = run_edit(PROCESSES[process], source, ratio=0.0, mode=mode)
    assert torch.equal(done.samples.ids, source)
    assert not done.edited.any()
    assert done.samples.nfe == 0


@pytest.mark.parametrize(("sampler", "process"), PAIRS)
def test_every_grid_sampler_keeps_clamped_positions_at_every_step(
    sampler: str, process: str
) -> None:
    source = random_tokens(5, 8)
    editable = torch.arange(8).expand(5, 8) < torch.tensor([8, 6, 3, 1, 0]).unsqueeze(-1)
    states: list[Canvas] = []
    done = run_edit(
        PROCESSES[process],
        source,
        sampler=GRID_SAMPLERS[sampler][0](4),
        editable=editable,
        ratio=0.6,
        on_step=lambda step, canvas: states.append(canvas),
    )
    assert bool((done.edited <= editable).all())
    assert bool(done.edited.any())
    for zt in [*(canvas.zt for canvas in states), done.samples.ids]:
        assert torch.equal(zt[~done.edited], source[~done.edited])
    assert all(float(canvas.t.max()) <= 0.6 for canvas in states)
    assert bool((done.samples.ids < 3).all())
    assert done.samples.runs[4] == 0, "the last text has no editable position"


@pytest.mark.parametrize("process", PROCESSES)
def test_edit_with_ratio_1_equals_generation_bit_for_bit(process: str) -> None:
    source = random_tokens(6, 5)
    keep = torch.zeros(6, 5, dtype=torch.bool)
    keep[:, 2] = True
    network = varied_network(PROCESSES[process])
    done = run_edit(PROCESSES[process], source, editable=~keep, ratio=1.0, mode="entropy")
    drawn = generate(
        AncestralSampler(6),
        PROCESSES[process],
        network,
        index=torch.arange(6),
        length=5,
        seed=5,
        prompt=source,
        prompt_mask=keep,
    )
    assert torch.equal(done.samples.ids, drawn.ids)
    assert done.samples.nfe == drawn.nfe


@pytest.mark.parametrize("mode", MODES)
def test_edit_does_not_depend_on_other_texts_of_its_batch(mode: str) -> None:
    source = random_tokens(6, 9)
    together = run_edit(PROCESSES["masked"], source, ratio=0.5, mode=mode)
    apart = run_edit(
        PROCESSES["masked"], source[[4, 1]], index=torch.tensor([4, 1]), ratio=0.5, mode=mode
    )
    assert torch.equal(apart.samples.ids, together.samples.ids[[4, 1]])
    assert torch.equal(apart.edited, together.edited[[4, 1]])


def test_masked_edit_starts_with_masks_at_exactly_the_chosen_positions() -> None:
    """A cosine schedule too: the state is a mask at every chosen position, and the time 0.4."""
    vocabulary = FlatVocabulary(3)
    for schedule in (LinearSchedule(), CosineSchedule()):
        process = TreeProcess(vocabulary, CdfClock([schedule]))
        seen: list[Any] = []
        inner = varied_network(process)

        def network(noisy: Any, inner: Network = inner, seen: list[Any] = seen) -> Any:
            seen.append(noisy)
            return inner(noisy)

        done = run_edit(process, random_tokens(3, 20), network=network, ratio=0.4)
        assert torch.equal(seen[0].zt == vocabulary.root, done.edited)
        assert torch.equal(seen[0].clean, ~done.edited)
        assert torch.equal(seen[0].t, torch.where(done.edited, 0.4, 0.0).double())


def test_uniform_edit_starts_at_a_draw_of_the_forward_process() -> None:
    """At time 0.4, a chosen token is kept with probability 0.6 + 0.4/3 = 0.733."""
    seen: list[Tensor] = []
    inner = varied_network(PROCESSES["uniform"])

    def network(noisy: Any) -> Any:
        seen.append(noisy.zt)
        return inner(noisy)

    source = random_tokens(400, 20)
    done = run_edit(PROCESSES["uniform"], source, network=network, ratio=0.4, mode="suffix")
    kept = (seen[0] == source)[done.edited].double().mean()
    assert float(kept) == pytest.approx(0.6 + 0.4 / 3, abs=0.03)


# ------------------------------------------------------------------ choice of the positions


def test_random_mode_chooses_the_share_ratio_within_sampling_error() -> None:
    """4 standard errors of 200 * 50 draws. Texts of different indices differ in their choice."""
    done = run_edit(PROCESSES["masked"], random_tokens(200, 50), ratio=0.3)
    share = float(done.edited.double().mean())
    assert share == pytest.approx(0.3, abs=4.0 * (0.3 * 0.7 / 10_000) ** 0.5)
    assert not torch.equal(done.edited[0], done.edited[1])
    other = run_edit(PROCESSES["masked"], random_tokens(200, 50), ratio=0.3, seed=6)
    assert not torch.equal(done.edited, other.edited)


@pytest.mark.parametrize("mode", ["entropy", "suffix"])
@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.5, 0.7])
def test_other_modes_choose_the_rounded_number_of_positions(mode: str, ratio: float) -> None:
    sizes = torch.tensor([100, 10, 3, 0])
    editable = torch.arange(100).expand(4, 100) < sizes.unsqueeze(-1)
    done = run_edit(
        PROCESSES["masked"], random_tokens(4, 100), editable=editable, ratio=ratio, mode=mode
    )
    counts = done.edited.sum(-1).tolist()
    assert counts == [int(ratio * size + 0.5 + 1e-9) for size in sizes.tolist()]


def test_suffix_mode_chooses_the_last_editable_positions() -> None:
    editable = torch.tensor([[True] * 6 + [False] * 2, [True, False] * 4])
    done = run_edit(
        PROCESSES["masked"], random_tokens(2, 8), editable=editable, ratio=0.5, mode="suffix"
    )
    assert done.edited[0].nonzero().flatten().tolist() == [3, 4, 5]
    assert done.edited[1].nonzero().flatten().tolist() == [4, 6]


@pytest.mark.parametrize(("process", "passes"), [("masked", ENTROPY_PASSES), ("uniform", 1)])
def test_entropy_mode_chooses_the_positions_of_largest_entropy(process: str, passes: int) -> None:
    """The entropy of position i is set by a temperature. Position 9 is the most uncertain."""
    sharpness = torch.tensor([4.0, 1.0, 3.0, 0.5, 8.0, 2.0, 0.7, 5.0, 6.0, 0.1]).double()
    token = torch.arange(3, dtype=torch.float64)
    log_p = (sharpness.unsqueeze(-1) * token).log_softmax(-1)

    def table(zt: Tensor, t: Tensor) -> Tensor:
        return log_p.expand(*zt.shape, 3)

    counted = count_evaluations(network_from_table(table, PROCESSES[process].vocabulary))
    editable = torch.ones(2, 10, dtype=torch.bool)
    editable[1, 9] = False
    done = run_edit(
        PROCESSES[process],
        random_tokens(2, 10),
        network=counted,
        editable=editable,
        ratio=0.4,
        mode="entropy",
        sampler=AncestralSampler(1),
    )
    assert done.edited[0].nonzero().flatten().tolist() == [1, 3, 6, 9]
    assert done.edited[1].nonzero().flatten().tolist() == [1, 3, 5, 6][: int(0.4 * 9 + 0.5)]
    assert done.samples.nfe == counted.calls == passes + 1
    assert done.samples.runs.tolist() == [passes + 1, passes + 1]


def test_entropy_of_a_masked_process_is_that_of_predictions_at_masks() -> None:
    """The prediction at a token is certain here and must not be used."""
    process = PROCESSES["masked"]

    def table(zt: Tensor, t: Tensor) -> Tensor:
        certain = torch.nn.functional.one_hot(zt.clamp(max=2), 3).double()
        at_mask = torch.full((3,), 1 / 3, dtype=torch.float64)
        at_mask = torch.where((torch.arange(8) == 5).unsqueeze(-1), at_mask, torch.eye(3)[0])
        return torch.where((zt == process.vocabulary.root).unsqueeze(-1), at_mask, certain).log()

    network = network_from_table(table, process.vocabulary)
    done = run_edit(process, random_tokens(3, 8), network=network, ratio=0.125, mode="entropy")
    assert done.edited.nonzero()[:, 1].tolist() == [5, 5, 5]


# ------------------------------------------------------------------ distribution


class BatchRng(CounterRng):
    """Generator that draws the uniforms of all samples from one `torch.Generator`, for speed."""

    def __init__(
        self, seed: int, step: int, index: Tensor, length: int, purpose: str = "", group: Any = None
    ) -> None:
        super().__init__(seed, step, index, length, purpose)
        self.generator = torch.Generator().manual_seed(1000 * seed + step)

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        shape = (len(self.index), self.length, count)
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return drawn.squeeze(-1) if count == 1 else drawn


JOINT = torch.tensor([0.9, 0.2, 0.7, 0.1, 0.8, 0.4, 0.3, 1.5] * 4)[:27].double().reshape(3, 3, 3)
JOINT = JOINT**2 / (JOINT**2).sum()
"""P(x_1, x_2, x_3), far from a product."""


def exact_network(process: ForwardProcess) -> Network:
    """Return the network of exact predictions for JOINT, given the states of other positions."""

    def table(zt: Tensor, t: Tensor) -> Tensor:
        evidence = process.log_likelihood(zt.reshape(-1), t.reshape(-1)).exp()
        first, second, third = evidence.reshape(*zt.shape, 3).unbind(1)
        dists = [
            torch.einsum("abc,nb,nc->na", JOINT, second, third),
            torch.einsum("abc,na,nc->nb", JOINT, first, third),
            torch.einsum("abc,na,nb->nc", JOINT, first, second),
        ]
        dist = torch.stack(dists, 1)
        return (dist / dist.sum(-1, keepdim=True)).log()

    return network_from_table(table, process.vocabulary)


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "CounterRng", BatchRng)


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("sampler", [AncestralSampler(40), AncestralSampler(1)])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_edited_tokens_follow_the_exact_conditional_given_the_clamped_tokens(
    first: int, sampler: Sampler
) -> None:
    """Two of three tokens are edited, given the first. 20,000 edits, 9 outcomes.

    The sampling error of the total variation distance is below 0.01, and the error of 40 steps is
    below 0.01. One step draws the tokens independently, which the same distance detects.
    """
    source = torch.tensor([[first, 1, 2]]).expand(20_000, 3).contiguous()
    done = run_edit(
        PROCESSES["masked"],
        source,
        sampler=sampler,
        network=exact_network(PROCESSES["masked"]),
        ratio=2 / 3,
        mode="suffix",
    )
    assert done.edited[0].tolist() == [False, True, True]
    pairs = 3 * done.samples.ids[:, 1] + done.samples.ids[:, 2]
    found = torch.bincount(pairs, minlength=9).double() / len(source)
    expected = (JOINT[first] / JOINT[first].sum()).reshape(-1)
    distance = 0.5 * float((found - expected).abs().sum())
    if sampler.steps == 1:
        assert distance > 0.03
    else:
        assert distance < 0.02


@pytest.mark.usefixtures("_fast")
def test_uniform_edit_keeps_the_joint_distribution_of_its_sources() -> None:
    """Noising some tokens and denoising them with the exact network leaves P(x) unchanged."""
    process = MixtureProcess(
        FlatVocabulary(3, mask=False), LinearSchedule(), torch.full((3,), 1 / 3)
    )
    draws = torch.multinomial(
        JOINT.reshape(-1), 20_000, replacement=True, generator=torch.Generator().manual_seed(2)
    )
    source = torch.stack([draws // 9, draws // 3 % 3, draws % 3], -1)
    done = run_edit(
        process,
        source,
        sampler=AncestralSampler(32),
        network=exact_network(process),
        ratio=0.6,
    )
    ids = done.samples.ids
    found = torch.bincount(9 * ids[:, 0] + 3 * ids[:, 1] + ids[:, 2], minlength=27).double()
    distance = 0.5 * float((found / len(source) - JOINT.reshape(-1)).abs().sum())
    assert distance < 0.02
    assert float((ids != source).double().mean()) > 0.1


def test_confidence_sampler_spreads_an_edit_over_all_steps() -> None:
    """An edit of 32 tokens in 8 steps reveals 4 tokens per step, for every start time."""
    revealed: list[int] = []
    process = PROCESSES["masked"]

    def count(step: int, canvas: Canvas) -> None:
        revealed.append(int((canvas.zt < 3).sum()))

    for ratio in (0.25, 0.5, 1.0):
        revealed.clear()
        length = int(32 / ratio)
        run_edit(
            process,
            random_tokens(1, length),
            sampler=UnmaskingSampler(8),
            ratio=ratio,
            mode="suffix",
            on_step=count,
        )
        assert revealed == [length - 32 + 4 * k for k in range(1, 9)]


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("ratio", [-0.1, 1.01, float("nan")])
def test_edit_refuses_a_ratio_outside_0_to_1(ratio: float) -> None:
    with pytest.raises(ArgumentError, match=r"ratio must be in \[0, 1\]"):
        run_edit(PROCESSES["masked"], random_tokens(1, 4), ratio=ratio)


def test_edit_refuses_an_unknown_mode_and_suggests_one() -> None:
    with pytest.raises(ArgumentError, match='"entropy"'):
        run_edit(PROCESSES["masked"], random_tokens(1, 4), ratio=0.5, mode="entrpy")


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize(
    "name", ["first_hitting", "entropy", "self_correction", "blockwise", "blockwise events"]
)
def test_edit_refuses_samplers_that_choose_their_own_times(name: str, ratio: float) -> None:
    for build in (
        SAMPLERS[name][0],
        lambda n: ShapedSampler(SAMPLERS[name][0](n), [Temperature(1)]),
    ):
        with pytest.raises(ArgumentError, match="chooses its own times"):
            run_edit(PROCESSES["uniform"], random_tokens(1, 4), ratio=ratio, sampler=build(4))


def test_edit_refuses_entropy_mode_for_scores_and_wrong_shapes() -> None:
    scores = count_evaluations(varied_network(PROCESSES["masked"]), "score")
    sampler = SAMPLERS["tau_leaping"][0](4)
    with pytest.raises(ArgumentError, match="predicts a score"):
        run_edit(
            PROCESSES["masked"],
            random_tokens(1, 4),
            network=scores,
            sampler=sampler,
            ratio=0.5,
            mode="entropy",
        )
    with pytest.raises(ArgumentError, match="shape"):
        run_edit(
            PROCESSES["masked"],
            random_tokens(1, 4),
            ratio=0.5,
            editable=torch.ones(1, 5, dtype=torch.bool),
        )


def test_start_at_does_not_change_the_original_sampler() -> None:
    sampler = AncestralSampler(4)
    assert sampler.start_at(0.5).start == 0.5
    assert sampler.start == 1.0
