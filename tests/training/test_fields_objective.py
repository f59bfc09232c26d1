"""Objective of several fields: equal to that of text alone, exact in its sums, and it learns."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from ddiff_dit.dit import DiT
from ddiff_dit.mmdit import MMDiT, StreamSpec
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.components import MixtureProcess
from ddiff.core.field import Field
from ddiff.core.gaussian import GaussianProcess
from ddiff.core.gaussian_schedule import CosineVP
from ddiff.core.paths import LegPath, first_path, given_path, shared_path
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import GeometricSchedule
from ddiff.core.times import FlatTimes, TimeRule, WindowTimes
from ddiff.core.training_paths import IndependentTimes, MixedPaths, TrainingPath
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.data.batch import Batch
from ddiff.data.fields_batch import FieldBatch, FieldsBatch, token_field, vector_field
from ddiff.errors import ArgumentError, DataError
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.nn.joint_denoiser import JointDenoiser
from ddiff.nn.parameterization import PARAMETERIZATIONS
from ddiff.nn.vector_head import VectorHead
from ddiff.training.fields_objective import FieldsObjective
from ddiff.training.losses import ElboLoss
from ddiff.training.objective import DiffusionObjective

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from exact_fields import BITS, MEAN, PROBABILITY, SPREAD, VOCABULARY

LENGTH = 8
NAMES = ("text", "latent")
SHARED = shared_path(NAMES)


def make_objective(
    path: TrainingPath,
    vocabulary: FlatVocabulary = VOCABULARY,
    rule: TimeRule | None = None,
    dim: int = 1,
    weight: float = 0.5,
    kind: str = "masked",
) -> FieldsObjective:
    torch.manual_seed(0)
    fields = {
        "text": Field(make_process(kind, vocabulary), rule or FlatTimes(), 1),
        "latent": Field(GaussianProcess(CosineVP(), dim), FlatTimes(), 1),
    }
    streams = {"text": StreamSpec(32, vocabulary=vocabulary), "latent": StreamSpec(32, dim=dim)}
    backbone = MMDiT(streams, layers=2, heads=4, head_width=8)
    vector_head = VectorHead(dim, 32)
    denoiser = JointDenoiser(
        backbone,
        {"text": TokenHead(vocabulary, 32), "latent": vector_head},
        {"text": PARAMETERIZATIONS["rest"], "latent": vector_head.parameterization},
    )
    return FieldsObjective(
        fields, denoiser, path, {"text": ElboLoss(), "latent": ElboLoss()}, {"latent": weight}
    )


def randomize(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def make_batch(samples: int, dim: int = 4, vectors: int = 2) -> FieldsBatch:
    generator = torch.Generator().manual_seed(samples)
    ids = torch.randint(0, 2, (samples, LENGTH), generator=generator)
    latent = torch.randn(samples, vectors, dim, generator=generator, dtype=torch.float64)
    absent = torch.arange(samples) % 4 == 3
    latent = latent * ~absent[:, None, None]
    fields = {"text": token_field(ids), "latent": vector_field(latent, absent=absent)}
    return FieldsBatch(fields, torch.arange(samples))


def select(batch: FieldsBatch, samples: Tensor) -> FieldsBatch:
    fields = {
        name: FieldBatch(*(value[samples] for value in field))
        for name, field in batch.fields.items()
    }
    return FieldsBatch(fields, batch.index[samples])


def compute(objective: FieldsObjective, batch: FieldsBatch, whole: FieldsBatch) -> Tensor:
    """Return the loss of a micro-batch of the global batch `whole`, and add its gradients."""
    counts = {name: count.double() for name, count in objective.counts(whole).items()}
    rng = CounterRng(3, 5, batch.index, LENGTH)
    loss = objective(batch, rng, counts, len(whole.index)).loss
    loss.backward()
    return loss.detach()


def make_process(kind: str, vocabulary: FlatVocabulary) -> ForwardProcess:
    """Return masked diffusion, or uniform or masked noise that is already there at t = 0."""
    if kind == "masked":
        return TreeProcess(vocabulary, LogTimeClock((1.0,)))
    emission = torch.zeros(vocabulary.num_states, dtype=torch.float64)
    if kind == "noisy mask":
        emission[vocabulary.num_tokens] = 1.0
    else:
        emission[: vocabulary.num_tokens] = 1.0 / vocabulary.num_tokens
    return MixtureProcess(vocabulary, GeometricSchedule(0.1), emission)


@pytest.mark.parametrize("kind", ["masked", "noisy", "noisy mask"])
@pytest.mark.parametrize(
    "rule",
    [FlatTimes(tokens=8), WindowTimes(4), WindowTimes(4, paired=False), WindowTimes(4, "slide")],
    ids=["flat", "block", "one block", "slide"],
)
def test_objective_of_one_field_equals_the_plain_objective_bitwise(
    kind: str, rule: TimeRule
) -> None:
    vocabulary = FlatVocabulary(11)
    process = make_process(kind, vocabulary)
    plain_denoiser = Denoiser(DiT(vocabulary, 32, layers=2, heads=4), TokenHead(vocabulary, 32))
    randomize(plain_denoiser)
    plain = DiffusionObjective(process, plain_denoiser, ElboLoss(), rule)
    backbone = MMDiT({"text": StreamSpec(32, vocabulary=vocabulary)}, 2, heads=4, head_width=8)
    denoiser = JointDenoiser(
        backbone, {"text": TokenHead(vocabulary, 32)}, {"text": PARAMETERIZATIONS["rest"]}
    )
    renamed = {}
    for name, value in plain_denoiser.state_dict().items():
        renamed[_rename(name)] = value
    denoiser.load_state_dict(renamed)
    joint = FieldsObjective(
        {"text": Field(process, rule, 1)},
        denoiser,
        shared_path(["text"]),
        {"text": ElboLoss()},
    )
    # Of 20 samples, 2 train the decoding term.
    ids = torch.randint(0, 11, (20, LENGTH), generator=torch.Generator().manual_seed(0))
    every = torch.ones_like(ids, dtype=torch.bool)
    index = torch.arange(20)
    rng = CounterRng(1, 2, index, LENGTH)
    count = torch.tensor(20.0 * LENGTH, dtype=torch.float64)
    batch = Batch(ids, every, every, torch.zeros_like(ids), index)
    expected = plain(batch, rng, {"tokens": count}, 20)
    found = joint(FieldsBatch({"text": token_field(ids)}, index), rng, {"text": count}, 20)
    assert torch.equal(found.loss, expected.loss)
    metric, _ = found.metrics["text_nelbo_diffusion_nats_per_token"]
    assert torch.equal(metric, expected.metrics["nelbo_diffusion_nats_per_token"][0])
    found.loss.backward()
    expected.loss.backward()
    gradients = dict(denoiser.named_parameters())
    for name, parameter in plain_denoiser.named_parameters():
        assert torch.equal(gradients[_rename(name)].grad, parameter.grad), name


def _rename(name: str) -> str:
    """Return the name of a parameter of the plain denoiser in the denoiser of one field."""
    if name.startswith("head."):
        return f"heads.text.{name.removeprefix('head.')}"
    inner = name.removeprefix("backbone.")
    if not inner.startswith("blocks."):
        return f"backbone.streams.text.{inner}"
    _, layer, rest = inner.split(".", 2)
    return f"backbone.blocks.{layer}.streams.text.{rest}"


PATHS: dict[str, TrainingPath] = {
    "shared": SHARED,
    "first": first_path(["latent", "text"]),
    "independent": IndependentTimes(NAMES),
    "mixed": MixedPaths(
        [
            (SHARED, 0.5),
            (given_path(SHARED, {"latent": "clean"}), 0.25),
            (given_path(SHARED, {"latent": "absent"}), 0.25),
        ]
    ),
}


@pytest.mark.parametrize("name", list(PATHS))
def test_losses_of_micro_batches_add_up_to_the_loss_of_the_batch(name: str) -> None:
    """Draws depend on the slot of a sample in the global batch only, so splits change nothing.

    The tolerances cover the order of float32 sums.
    """
    whole = make_batch(16)
    objective = make_objective(PATHS[name], dim=4)
    randomize(objective.denoiser)
    total = compute(objective, whole, whole)
    expected = {n: p.grad.clone() for n, p in objective.denoiser.named_parameters()}
    objective.denoiser.zero_grad()
    parts = [compute(objective, select(whole, half), whole) for half in torch.arange(16).chunk(4)]
    torch.testing.assert_close(sum(parts), total, rtol=1e-6, atol=0.0)
    for n, parameter in objective.denoiser.named_parameters():
        largest = float(expected[n].abs().max())
        torch.testing.assert_close(parameter.grad, expected[n], rtol=0.0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        (SHARED, FlatTimes()),
        (first_path(["latent", "text"]), WindowTimes(4, paired=False)),
        (MixedPaths([(SHARED, 0.6), (given_path(SHARED, {"latent": "clean"}), 0.4)]), FlatTimes()),
    ],
    ids=["shared", "first, windows", "mixed"],
)
def test_mean_of_training_terms_is_the_diffusion_and_decoding_term_of_the_bound(
    path: TrainingPath, rule: TimeRule
) -> None:
    """The text is noisy at t = 0, and one sample of four has no latent.

    With the weight 0 for the latent, the loss is that of the text: its diffusion term, which is
    also a metric, and its decoding term. The means over 40 steps of 16 samples differ by less than
    4 standard errors. With the normalization "sample" and weights 1, the loss is the sum of all
    terms divided by 16, so its mean is the bound per sample.
    """
    parts = path.parts if isinstance(path, MixedPaths) else [(path, 1.0)]
    objective = make_objective(path, rule=rule, dim=2, weight=0.0, kind="noisy")
    randomize(objective.denoiser)
    assert objective.decoding == {"text": 0.1}
    whole = FieldsObjective(
        objective.fields,
        objective.denoiser,
        path,
        objective.losses,
        normalization="sample",
    )
    batch = make_batch(16, dim=2, vectors=1)
    ones = {field: torch.ones((), dtype=torch.float64) for field in objective.fields}
    trained = torch.zeros(40, 3, dtype=torch.float64)
    evaluated = torch.zeros(40, 3, dtype=torch.float64)
    for step in range(40):
        with torch.no_grad():
            found = objective(batch, CounterRng(3, step, batch.index, LENGTH), ones, 16)
        text, _ = found.metrics["text_nelbo_diffusion_nats_per_token"]
        latent, _ = found.metrics["latent_nelbo_diffusion_nats_per_number"]
        trained[step] = torch.stack([text, found.loss - text, latent])
        with torch.no_grad():
            joint = whole(batch, CounterRng(3, step, batch.index, LENGTH), ones, 16)
        # Sums of float32 predictions.
        assert float(joint.loss) * 16 == pytest.approx(float(trained[step].sum()), rel=1e-6)
        for part, weight in parts:
            rng = CounterRng(8, step, batch.index, LENGTH, "evaluate")
            nll = objective.nll(batch, rng, batch.index, 16, part)
            terms = [nll["text"].terms["diffusion"], nll["text"].terms["decoding"]]
            terms.append(nll["latent"].terms["diffusion"])
            evaluated[step] += weight * torch.stack([term.sum() for term in terms])
    error = ((trained.var(0) + evaluated.var(0)) / 40).sqrt()
    assert (evaluated.mean(0) > 5.0 * error).all(), "a missing term would be found"
    assert ((trained.mean(0) - evaluated.mean(0)).abs() < 4.0 * error).all()


def test_decoding_share_is_a_part_of_the_samples_and_only_of_noisy_processes() -> None:
    denoiser = make_objective(SHARED, kind="noisy").denoiser
    fields = make_objective(SHARED, kind="noisy").fields
    losses = {"text": ElboLoss(), "latent": ElboLoss()}
    assert make_objective(SHARED).decoding == {}
    off = FieldsObjective(fields, denoiser, SHARED, losses, decoding_share=0.0)
    assert off.decoding == {}
    for share in (1.0, -0.1, math.nan):
        with pytest.raises(ArgumentError, match="decoding_share must be at least 0"):
            FieldsObjective(fields, denoiser, SHARED, losses, decoding_share=share)


def test_unknown_normalization_is_refused_with_a_suggestion() -> None:
    plain = make_objective(SHARED)
    with pytest.raises(ArgumentError, match="one of item, sample; got 'samples'"):
        FieldsObjective(plain.fields, plain.denoiser, SHARED, plain.losses, normalization="samples")


def test_clean_field_trains_its_encoder_but_not_its_head() -> None:
    batch = make_batch(8)
    objective = make_objective(given_path(SHARED, {"latent": "clean"}), dim=4)
    randomize(objective.denoiser)
    compute(objective, batch, batch)
    head = objective.denoiser.heads["latent"]
    assert all(float(parameter.grad.abs().max()) == 0.0 for parameter in head.parameters())
    encoder = objective.denoiser.backbone.streams["latent"].embedding
    assert float(encoder.weight.grad.abs().max()) > 0.0


def test_loss_ignores_a_field_that_no_sample_has() -> None:
    batch = make_batch(4)
    everyone = torch.ones(4, dtype=torch.bool)
    nothing = vector_field(torch.zeros(4, 2, 4), absent=everyone)
    batch = FieldsBatch({**batch.fields, "latent": nothing}, batch.index)
    objective = make_objective(SHARED, dim=4)
    randomize(objective.denoiser)
    loss = compute(objective, batch, batch)
    assert bool(loss.isfinite())
    head = objective.denoiser.heads["latent"]
    assert all(float(parameter.grad.abs().max()) == 0.0 for parameter in head.parameters())


def test_block_diffusion_with_a_clean_latent_trains_all_blocks_in_one_pass() -> None:
    batch = make_batch(8)
    rule = WindowTimes(4)
    objective = make_objective(given_path(SHARED, {"latent": "clean"}), rule=rule, dim=4)
    randomize(objective.denoiser)
    assert bool(compute(objective, batch, batch).isfinite())
    # On the path that samples the latent first, the leg is chosen per step: windows in one pass
    # serve all samples of a batch or none.
    objective = make_objective(first_path(["latent", "text"]), rule=rule, dim=4)
    randomize(objective.denoiser)
    assert bool(compute(objective, batch, batch).isfinite())


def test_windows_are_refused_where_another_field_moves_at_the_same_time() -> None:
    batch = make_batch(8)
    objective = make_objective(SHARED, rule=WindowTimes(4, paired=False), dim=4)
    with pytest.raises(ArgumentError, match="latent moves at the same time"):
        compute(objective, batch, batch)


def test_fields_of_wrong_dimensions_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[B,n,d\].*\(4, 3\).*unsqueeze"):
        vector_field(torch.zeros(4, 3))
    with pytest.raises(DataError, match=r"\[B,n\].*\(4,\)"):
        token_field(torch.zeros(4, dtype=torch.long))


def test_fields_batch_refuses_nan_in_absent_values() -> None:
    with pytest.raises(DataError, match='field "latent" must be finite'):
        FieldsBatch({"latent": vector_field(torch.full((1, 1, 2), torch.nan))}, torch.arange(1))


def test_trained_denoiser_bounds_both_conditionals_near_their_entropies() -> None:
    """After 250 steps each bound is above the entropy and below the bound without the condition.

    Two tokens and one number (`exact_fields`): H(number | tokens) = 0.727 nats in units of the
    number's deviation, and 1.419 nats without the tokens, for a normal number. The bounds are means
    over 2,048 samples, whose standard errors are below 0.05 nats; 0.1 is allowed below an entropy.
    For five first weights, the bounds of the number lie between 0.96 and 0.99 at this learning
    rate (at twice the rate between 0.99 and 1.19), those of the tokens between 0.62 and 0.64.
    """
    mixed = MixedPaths(
        [
            (SHARED, 0.4),
            (given_path(SHARED, {"latent": "clean"}), 0.3),
            (given_path(SHARED, {"text": "clean"}), 0.3),
        ]
    )
    objective = make_objective(mixed, weight=1.0)
    optimizer = torch.optim.AdamW(objective.denoiser.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    for step in range(250):
        batch = _draw_exact(128, step)
        counts = {name: count.double() for name, count in objective.counts(batch).items()}
        loss = objective(batch, CounterRng(0, step, batch.index, 2), counts, 128).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    batch = _draw_exact(2048, 10**6)

    def bound(path: LegPath) -> float:
        rng = CounterRng(1, 0, batch.index, 2, "evaluate")
        likelihood = objective.nll(batch, rng, batch.index, 2048, path)
        return sum(
            float(values.sum()) / 2048
            for field in likelihood.values()
            for values in field.terms.values()
        )

    entropy_given_text = 0.5 * math.log(2.0 * math.pi * math.e * (SPREAD / _deviation()) ** 2)
    number = bound(given_path(SHARED, {"text": "clean"}))
    assert entropy_given_text - 0.1 < number < entropy_given_text + 0.45
    entropy_of_text = float(-(PROBABILITY * PROBABILITY.log()).sum())
    # The number tells about half of the tokens' entropy.
    text = bound(given_path(SHARED, {"latent": "clean"}))
    assert 0.4 < text < 0.8 * entropy_of_text
    joint = bound(SHARED)
    assert entropy_of_text + entropy_given_text - 0.1 < joint
    assert joint < entropy_of_text + entropy_given_text + 0.7


def _deviation() -> float:
    mean = float((PROBABILITY * MEAN).sum())
    return math.sqrt(float((PROBABILITY * (MEAN - mean) ** 2).sum()) + SPREAD**2)


def _draw_exact(samples: int, seed: int) -> FieldsBatch:
    """Draw samples of `exact_fields`, with the number normalized to mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(PROBABILITY, samples, True, generator=generator)
    noise = torch.randn(samples, generator=generator, dtype=torch.float64)
    mean = float((PROBABILITY * MEAN).sum())
    number = (MEAN[chosen] + SPREAD * noise - mean) / _deviation()
    fields = {
        "text": token_field(BITS[chosen]),
        "latent": vector_field(number.reshape(-1, 1, 1)),
    }
    return FieldsBatch(fields, torch.arange(samples))
