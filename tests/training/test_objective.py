"""Diffusion objective: terms of the bound, training losses, prompts and dropped conditions."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from ddiff_dit.dit import Condition, DiT
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.components import MixtureProcess
from ddiff.core.information import IdentityTime
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import FlatTimes, Noisy, TimeRule, Times, WindowTimes
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.data.batch import Batch
from ddiff.nn.denoiser import Context, Denoiser
from ddiff.nn.heads import TokenHead, TreeHead
from ddiff.training.context import drop_conditions
from ddiff.training.losses import ClippedLoss, ElboLoss, TrainingLoss
from ddiff.training.objective import DECODING_SHARE, DiffusionObjective

VOCABULARY = FlatVocabulary(5, mask=False)
SLOTS, LENGTH, START = 20, 6, 0.05
NEVER_CLEAN = MixtureProcess(VOCABULARY, LinearSchedule(), torch.full((5,), 0.2))
RULES = {
    "flat": FlatTimes(START),
    "block": WindowTimes(2, start=START),
    "slide": WindowTimes(2, "slide", start=START),
}


class RecordingLoss(TrainingLoss[ForwardProcess]):
    """Training loss that equals the bound and records the noise times of its rows."""

    def __init__(self) -> None:
        self.times: list[Tensor] = []

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        self.times.append(t)
        return process.weight(x0, zt, t)

    def divergence(
        self, process: ForwardProcess, dist: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        return process.divergence(dist, x0, zt, t)


def batch(slots: Tensor) -> Batch:
    ids = torch.randint(5, (SLOTS, LENGTH), generator=torch.Generator().manual_seed(1))[slots]
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, everywhere, everywhere, torch.zeros_like(ids), slots)


def objective(
    loss: ElboLoss | ClippedLoss | RecordingLoss, rule: TimeRule, share: float
) -> DiffusionObjective:
    torch.manual_seed(0)
    model = Denoiser(DiT(VOCABULARY, 8, layers=1, heads=2), TokenHead(VOCABULARY, 8)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.4)
    return DiffusionObjective(NEVER_CLEAN, model, loss, rule, share)


def loss_at(one: DiffusionObjective, step: int, slots: Tensor) -> tuple[float, float]:
    """Return (loss per token, diffusion term of the bound) of a training step.

    slots: numbers of the samples within the global batch.
    """
    shown = batch(slots)
    terms = one(
        shown,
        CounterRng(4, step, slots, LENGTH),
        {"tokens": torch.tensor(float(SLOTS * LENGTH))},
        SLOTS,
    )
    return terms.loss.item(), float(terms.metrics["nelbo_diffusion_nats_per_token"][0]) / (
        SLOTS * LENGTH
    )


@pytest.mark.parametrize("rule", RULES)
def test_training_times_of_the_diffusion_term_are_uniform_in_their_window(rule: str) -> None:
    """Each tenth of the time window contains 10 % of the noise times of the diffusion term.

    Some sequences of a batch are used for the decoding term instead. If these were the sequences
    with the smallest times, the first tenth would be empty. Information time is replaced by t, so
    that noise times are uniform in t. The tolerance 0.015 is five standard errors of the fraction
    in a tenth, for 12 000 independent rows.
    """
    watching, everything = RecordingLoss(), torch.arange(SLOTS)
    one = objective(watching, RULES[rule], share=0.1)
    one.process = copy.copy(one.process)
    one.process.__dict__["information_time"] = IdentityTime()
    for step in range(100):
        loss_at(one, step, everything)
    t = torch.cat(watching.times)
    decoded = t == START
    assert 0.04 < float(decoded.double().mean()) < 0.16, (
        "the fraction of decoded positions must be between 1/20 and 1/10"
    )
    tenth = ((t[~decoded] - START) / (1.0 - START) * 10).long()
    share = torch.bincount(tenth, minlength=10) / len(tenth)
    assert float((share - 0.1).abs().max()) < 0.015, share


@pytest.mark.parametrize("rule", RULES)
def test_mean_training_loss_equals_diffusion_plus_decoding_term(rule: str) -> None:
    """The mean loss of 60 steps equals the mean of 60 evaluations of `nll` on the same text.

    The tolerance is five standard errors. A standard error is at most 8 % of the value.
    """
    one, everything = objective(ElboLoss(), RULES[rule], share=0.1), torch.arange(SLOTS)
    losses, parts = torch.tensor([loss_at(one, step, everything) for step in range(60)]).T
    terms = [
        one.nll(
            batch(everything),
            CounterRng(9, step, everything, LENGTH),
            everything,
            SLOTS,
            RULES[rule],
        ).terms
        for step in range(60)
    ]
    per_token = {name: torch.stack([t[name].detach().mean() for t in terms]) for name in terms[0]}
    expected = per_token["diffusion"] + per_token["decoding"]
    for ours, theirs in ((losses, expected), (parts, per_token["diffusion"])):
        error = (ours.var() / 60 + theirs.var() / 60).sqrt()
        assert float((ours.mean() - theirs.mean()).abs()) < 5 * float(error)
        assert float(error) < 0.08 * float(theirs.mean())
    assert float(per_token["decoding"].mean()) > 0.02


@pytest.mark.parametrize("rule", RULES)
def test_losses_of_micro_batches_sum_to_the_loss_of_the_whole_batch(rule: str) -> None:
    one, everything = objective(ElboLoss(), RULES[rule], share=0.1), torch.arange(SLOTS)
    whole = loss_at(one, 3, everything)
    for size in (10, 5, 7):
        shares = [loss_at(one, 3, part) for part in everything.split(size)]
        assert [sum(values) for values in zip(*shares)] == pytest.approx(whole, rel=1e-10)


def test_drop_conditions_drops_each_condition_at_its_own_rate() -> None:
    label, vector = torch.zeros(2000, dtype=torch.long), torch.ones(2000, LENGTH, 3)
    context = Context(conditions={"label": label, "vector": vector, "always": label})
    rng = CounterRng(0, 0, torch.arange(2000), LENGTH)
    shown = drop_conditions(
        context, {"label": 0.3, "vector": 0.1, "always": 0.0, "absent": 0.5}, rng
    ).conditions
    without = shown["label"] == -1
    assert float(without.double().mean()) == pytest.approx(0.3, abs=0.05)  # five standard errors
    apart = shown["vector"].isnan().all((1, 2))
    assert float(apart.double().mean()) == pytest.approx(0.1, abs=0.035)
    assert torch.equal(shown["vector"].isnan().any((1, 2)), apart), (
        "a condition was dropped at some positions of a sample only"
    )
    assert torch.equal(shown["always"], label)
    assert Condition(classes=3).dropout == 0.1


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_loss_with_default_divergence_computes_the_divergence_once(share: float) -> None:
    slots = torch.arange(SLOTS)
    calls = []

    class Counting(type(NEVER_CLEAN)):  # type: ignore[misc]
        def divergence(self, *asked: Tensor) -> Tensor:
            calls.append(1)
            return super().divergence(*asked)

    found = []
    for loss in (ElboLoss(), RecordingLoss()):
        one = objective(loss, RULES["flat"], share)
        one.process = Counting(VOCABULARY, LinearSchedule(), torch.full((5,), 0.2))
        calls.clear()
        found.append((loss_at(one, 3, slots), len(calls)))
    (once, reads), (twice, more) = found
    assert once == twice
    assert more == 2 * reads > 0


class OneNat(MixtureProcess):
    """Process whose decoding term is 1 nat and whose diffusion term is 1 nat per unit of time."""

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def divergence(self, dist: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return 0.0 * dist.log_prob(x0) + 1.0

    def decode_nll(self, dist: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return 0.0 * dist.log_prob(x0) + 1.0


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", [ElboLoss(), RecordingLoss()], ids=["elbo", "own divergence"])
def test_loss_weights_decoding_and_diffusion_rows_by_their_inverse_share(
    rule: str, loss: ElboLoss | RecordingLoss, share: float
) -> None:
    """Compare the loss with its exact value, for a process whose terms of the bound are constant.

    Of 20 sequences, a fraction `share` is used for the decoding term, with weight 1/share, and the
    others for the diffusion term, with weight 1/(1 - share). Per token, the loss is then 1 for the
    decoding term plus the width of the time window for the diffusion term. Information time is
    replaced by t, so that noise times are uniform and the sums have no variance.
    """
    one = objective(loss, RULES[rule], share)
    one.process = OneNat(VOCABULARY, LinearSchedule(), torch.full((5,), 0.2))
    one.process.__dict__["information_time"] = IdentityTime()
    count = 40 if rule == "slide" else 2  # the sliding rule scores random positions
    steps = [loss_at(one, step, torch.arange(SLOTS)) for step in range(count)]
    total, diffusion = (sum(values) / len(steps) for values in zip(*steps))
    tolerance = (0.02, 0.1) if rule == "slide" else (1e-9, 1e-9)
    assert diffusion == pytest.approx(1.0 - START, abs=tolerance[0])
    # With the sliding rule, the positions of the decoding term are random.
    assert total == pytest.approx(1.0 - START + (share > 0.0), abs=tolerance[1])


def test_default_share_of_rows_for_decoding_term_depends_on_process_and_loss() -> None:
    """The share None selects a default; the share 0 turns the decoding term off.

    The default depends on `closes_at_clean` of the process and on `select_rows` of the loss."""

    class Choosing(RecordingLoss):
        def select_rows(self, process: ForwardProcess, noisy: Noisy, times: Times) -> Tensor:
            return times.speed > 0

    noisy_at_zero = EarlyNoise()
    never_clean = MixtureProcess(VOCABULARY, noisy_at_zero, torch.full((5,), 0.2))
    model = objective(ElboLoss(), RULES["flat"], 0.0).denoiser

    def build(process, loss, share):
        return DiffusionObjective(process, model, loss, RULES["flat"], share)

    assert build(never_clean, ElboLoss(), None).decoding_share == DECODING_SHARE
    assert build(never_clean, ElboLoss(), 0.0).decoding_share == 0.0
    assert build(never_clean, Choosing(), None).decoding_share == 0.0
    assert build(NEVER_CLEAN, ElboLoss(), None).decoding_share == 0.0


class EarlyNoise(LinearSchedule):
    """Schedule with alpha = 0.9 (1 - t), so that states are noisy at t = 0."""

    closes_at_clean = False

    def alpha(self, t: Tensor) -> Tensor:
        return 0.9 * super().alpha(t)

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        return 1.0 - self.alpha(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return 0.9 * super().d_alpha(t)


def test_clipped_loss_clips_the_weight_before_multiplication_by_speed() -> None:
    """Weights are clipped to [smallest, largest] before they are multiplied by the speed dt/dv."""
    x0 = torch.tensor([0, 0, 1])
    zt = torch.tensor([1, 1, 1])
    t = torch.tensor([1e-3, 0.5, 0.999], dtype=torch.float64)
    weight = NEVER_CLEAN.weight(x0, zt, t)
    low, middle, high = weight.sort().values.tolist()
    smallest, largest = (low + middle) / 2, (middle + high) / 2
    clipped = ClippedLoss(smallest, largest).weight(NEVER_CLEAN, x0, zt, t)
    assert clipped.tolist() == [min(max(w, smallest), largest) for w in weight.tolist()]
    assert low < smallest < largest < high
    assert (ClippedLoss().smallest, ClippedLoss().largest) == (0.0, 2.0)


def test_logged_training_bound_does_not_depend_on_the_training_loss() -> None:
    """Clipping changes the training loss, but not the logged diffusion term of the bound."""
    slots = torch.arange(SLOTS)
    (bound, reported), (clipped, still) = (
        loss_at(objective(loss, RULES["flat"], 0.0), 3, slots)
        for loss in (ElboLoss(), ClippedLoss(0.0, 1.5))
    )
    assert bound == pytest.approx(reported, rel=1e-12)
    assert still == pytest.approx(reported, rel=1e-12)
    assert clipped < 0.9 * bound


def test_training_loss_and_token_count_exclude_prompt_tokens() -> None:
    one, shown = objective(ElboLoss(), RULES["flat"], 0.0), batch(torch.arange(SLOTS))
    prompt = torch.arange(LENGTH) < 2
    part = replace(shown, scored=(~prompt).expand(SLOTS, -1))
    assert one.counts(part)["tokens"].item() == 4 * SLOTS
    one.process = OneNat(VOCABULARY, LinearSchedule(), torch.full((5,), 0.2))
    one.process.__dict__["information_time"] = IdentityTime()
    terms = one(part, CounterRng(4, 0, part.index, LENGTH), one.counts(part), SLOTS)
    assert terms.loss.item() == pytest.approx(1.0 - START)
    total, count = terms.metrics["nelbo_diffusion_nats_per_token"]
    assert (total.item(), count.item()) == (pytest.approx(4 * SLOTS * (1.0 - START)), 4 * SLOTS)


def test_training_metrics_of_a_tree_level_contain_only_rows_of_that_level() -> None:
    """Clusters (level 1) cost 0 nats and masks (level 2) cost 1, so only level 2 is not 0."""

    class MasksCost(TreeProcess):
        def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
            return torch.ones_like(t)

        def divergence(self, dist: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
            return 0.0 * super().divergence(dist, x0, zt, t) + (zt == self.vocabulary.root)

    tree = HierarchicalVocabulary([[0, 1, 0, 1, 1]])
    model = Denoiser(DiT(tree, 8, layers=1, heads=2), TreeHead(tree, 8, "levelwise")).double()
    one = DiffusionObjective(
        MasksCost(tree, LogTimeClock((1.0, 1.0))), model, ElboLoss(), FlatTimes()
    )
    shown = batch(torch.arange(SLOTS))
    metrics = one(shown, CounterRng(4, 0, shown.index, LENGTH), one.counts(shown), SLOTS).metrics
    first, second, total = (
        metrics[f"nelbo_{name}_nats_per_token"][0].item()
        for name in ("level1", "level2", "diffusion")
    )
    assert (first, second) == (0.0, total)
    assert total > 0.0
    parts = one.nll(
        shown, CounterRng(4, 0, shown.index, LENGTH), shown.index, SLOTS, FlatTimes()
    ).parts
    assert (parts["level1"].sum().item(), sorted(parts)) == (0.0, ["level1", "level2"])


def test_loss_with_custom_select_rows_excludes_prompt_tokens() -> None:
    class Everything(RecordingLoss):
        def select_rows(self, process: ForwardProcess, noisy: Noisy, times: Times) -> Tensor:
            return torch.ones_like(noisy.clean)

    loss = Everything()
    part = replace(batch(torch.arange(SLOTS)), scored=(torch.arange(LENGTH) >= 2).expand(SLOTS, -1))
    one = objective(loss, RULES["flat"], 0.0)
    one(part, CounterRng(4, 0, part.index, LENGTH), one.counts(part), SLOTS)
    assert [len(t) for t in loss.times] == [4 * SLOTS]
