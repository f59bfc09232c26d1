"""Transformer of published checkpoints (ddit): noise levels, mixed embeddings, labels."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ddiff_dit.ddit import DDiT, LevelEmbedding
from ddiff_hybrid.epsilon import EpsilonHybrid
from ddiff_hybrid.gamma import GammaHybrid
from ddiff_mdlm.process import MaskedDiffusion
from ddiff_sedd.head import ScoreHead
from ddiff_sedd.process import ScoreEntropyDiffusion
from networks import randomize_zeros
from torch import Tensor

from ddiff.core.components import MixtureProcess, mask_distribution
from ddiff.core.dense import DenseProcess
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import CosineSchedule, LinearSchedule
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import UNPADDED, Context, Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.training.optimizers import split_parameters

VOCABULARY = FlatVocabulary(7)
BATCH, LENGTH, WIDTH = 2, 12, 16
LINEAR = MixtureProcess(VOCABULARY, LinearSchedule(1e-3), mask_distribution(VOCABULARY))


def make(process: ForwardProcess | None = LINEAR, trained: bool = True, **options: Any) -> DDiT:
    """Make a float64 network; `trained`: parameters that start at zero are random."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": 2, "heads": 2, "condition_width": 6, **options}
    model = DDiT(VOCABULARY, process, WIDTH, **sizes).double().eval()
    if trained:
        randomize_zeros(model)
    return model


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY.num_states, (BATCH, LENGTH), generator=generator)
    return ids, torch.rand(BATCH, LENGTH, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------- noise levels


def test_sequence_reads_the_largest_level_of_its_positions_and_nothing_else() -> None:
    ids, t = inputs()
    model = make()
    largest = t.amax(-1, keepdim=True).expand_as(t)
    assert torch.equal(model(ids, t, UNPADDED), model(ids, largest, UNPADDED))
    # clean positions, such as those of a prompt, change no bit
    prompt = torch.where(t < largest, 0.0, t)
    assert torch.equal(model(ids, t, UNPADDED), model(ids, prompt, UNPADDED))
    later = largest + 0.5 * (1.0 - largest)
    change = (model(ids, later, UNPADDED) - model(ids, t, UNPADDED)).abs().amax(-1)
    assert (change > 1e-6).all()


def test_position_reads_its_own_level() -> None:
    ids, t = inputs()
    model = make(per="position")
    later = t.clone()
    later[:, 3] = 1.0 - later[:, 3]
    apart = Context(document=torch.arange(LENGTH).expand(BATCH, -1))  # nobody attends to another
    change = (model(ids, later, apart) - model(ids, t, apart)).abs().amax(-1)
    assert (change[:, 3] > 1e-6).all()
    assert not change[:, torch.arange(LENGTH) != 3].any()


@pytest.mark.parametrize("per", ["sequence", "position"])
def test_sigma_depends_on_the_clock_of_the_process_only_through_the_kept_tokens(per: str) -> None:
    ids, t = inputs()
    cosine = MixtureProcess(VOCABULARY, CosineSchedule(), mask_distribution(VOCABULARY))
    same = LinearSchedule(0.0).alpha(t)
    # the time at which the cosine clock has kept as many tokens
    other = 2.0 / math.pi * torch.asin(t)
    torch.testing.assert_close(cosine.keep_probability(other.flatten()), same.flatten())
    linear = MixtureProcess(VOCABULARY, LinearSchedule(0.0), mask_distribution(VOCABULARY))
    ours = make(linear, per=per, mixing=0.2)(ids, t, UNPADDED)
    theirs = make(cosine, per=per, mixing=0.2)(ids, other, UNPADDED)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_network_that_reads_t_needs_no_process() -> None:
    ids, t = inputs()
    with_process = make(noise="t")(ids, t, UNPADDED)
    assert torch.equal(make(None, noise="t")(ids, t, UNPADDED), with_process)
    assert not torch.equal(make()(ids, t, UNPADDED), with_process)


def test_level_embedding_has_cosines_then_sines_from_period_one_to_ten_thousand() -> None:
    embedding = LevelEmbedding(4).double()
    embedding.mlp = torch.nn.Identity()
    level = torch.tensor([[0.0, 2.5]], dtype=torch.float64)
    features = embedding(level, torch.float64)
    assert features.shape == (1, 2, 256)
    assert torch.equal(features[0, 0], torch.cat([torch.ones(128), torch.zeros(128)]).double())
    for number in (0, 64, 127):
        angle = 2.5 * 10_000.0 ** (-number / 128)
        assert features[0, 1, number] == pytest.approx(math.cos(angle), abs=1e-12)
        assert features[0, 1, 128 + number] == pytest.approx(math.sin(angle), abs=1e-12)


def test_levels_at_both_ends_of_time_are_finite() -> None:
    ids, t = inputs()
    linear = MixtureProcess(VOCABULARY, LinearSchedule(0.0), mask_distribution(VOCABULARY))
    for per in ("sequence", "position"):
        model = make(linear, per=per, mixing=0.5)
        for end in (0.0, 1.0):
            assert model(ids, torch.full_like(t, end), UNPADDED).isfinite().all()


# ---------------------------------------------------------------------- mixed embeddings


def test_mixed_embedding_is_that_of_the_state_without_noise_and_of_the_mask_in_the_limit() -> None:
    ids, t = inputs()
    model = make(mixing=1.0, per="position", trained=False)  # the blocks are the identity
    clean = model(ids, torch.zeros_like(t), UNPADDED)
    expected = F.layer_norm(model.embedding(ids), (WIDTH,))
    torch.testing.assert_close(clean, expected, rtol=0, atol=1e-12)
    masked = F.layer_norm(model.embedding(torch.full_like(ids, VOCABULARY.root)), (WIDTH,))
    noisy = model(ids, torch.ones_like(t), UNPADDED)
    # one token in a thousand is left at t = 1
    assert (noisy - masked).abs().max() < 0.02
    assert not torch.equal(noisy, masked)


def test_weight_of_the_mask_is_that_of_the_formula() -> None:
    ids, t = inputs()
    mixing = 0.3
    model = make(mixing=mixing, per="position", trained=False)
    kept = LINEAR.keep_probability(t.flatten()).view(t.shape).pow(mixing).unsqueeze(-1)
    table = model.embedding.weight
    mixed = kept * table[ids] + (1.0 - kept) * table[VOCABULARY.root]
    expected = F.layer_norm(mixed, (WIDTH,))
    torch.testing.assert_close(model(ids, t, UNPADDED), expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- labels


def test_absent_labels_are_the_last_row_of_the_table() -> None:
    ids, t = inputs()
    model = make(classes=3)
    without = model(ids, t, UNPADDED)
    absent = model(ids, t, Context(conditions={"class": torch.tensor([-1, -1])}))
    assert torch.equal(without, absent)
    first = model(ids, t, Context(conditions={"class": torch.tensor([0, -1])}))
    assert (first[0] - without[0]).abs().max() > 1e-6
    assert torch.equal(first[1], without[1])
    per_position = torch.tensor([0, -1]).unsqueeze(-1).expand(-1, LENGTH)
    each = model(ids, t, Context(conditions={"class": per_position}))
    torch.testing.assert_close(each, first, rtol=0, atol=1e-12)  # products of other sizes


# ---------------------------------------------------------------------- rules of attention


def test_documents_and_padding_are_invisible() -> None:
    ids, t = inputs()
    t = t[:, :1].expand_as(t)
    model = make()
    half = LENGTH // 2
    document = (torch.arange(LENGTH) >= half).long().expand(BATCH, -1)
    packed = model(ids, t, Context(document=document))
    alone = model(ids[:, :half], t[:, :half], UNPADDED)
    torch.testing.assert_close(packed[:, :half], alone, rtol=0, atol=1e-12)
    valid = torch.arange(LENGTH).expand(BATCH, -1) < half
    padded = model(ids, t, Context(valid=valid))
    torch.testing.assert_close(padded[:, :half], alone, rtol=0, atol=1e-12)


def test_blocks_start_as_the_identity_and_every_parameter_gets_a_gradient() -> None:
    ids, t = inputs()
    start = make(trained=False)
    expected = F.layer_norm(start.embedding(ids), (WIDTH,))
    assert torch.equal(start(ids, t, UNPADDED), expected)
    model = make(classes=2)
    weight = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    label = torch.tensor([0, 1])
    (model(ids, t, Context(conditions={"class": label})) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_muon_gets_no_modulation_matrices() -> None:
    hidden, _ = split_parameters(Denoiser(make(classes=2), TokenHead(VOCABULARY, WIDTH)))
    parts = {name.split(".")[-2] for name in hidden}
    assert parts == {"qkv", "attended", "up", "down", "0", "2"}  # "0", "2": layers of the level


# ---------------------------------------------------------------------- refusals


def test_network_refuses_levels_that_are_not_defined() -> None:
    with pytest.raises(ArgumentError, match="need a forward process"):
        make(None)
    with pytest.raises(ArgumentError, match="need a forward process"):
        make(None, noise="t", mixing=0.1)
    with pytest.raises(ArgumentError, match=r"multiple of 2 \* heads.*got width 16 and heads 3"):
        make(heads=3)
    tokens = FlatVocabulary(7, mask=False)
    with pytest.raises(ArgumentError, match="mixing > 0 needs a vocabulary with a mask"):
        DDiT(tokens, LINEAR, WIDTH, layers=1, heads=2, mixing=0.5)
    ids, t = inputs()
    dense = DenseProcess.examples()[0]
    with pytest.raises(ArgumentError, match="DenseProcess defines no keep_probability"):
        make(dense)(ids, t, UNPADDED)


# ---------------------------------------------------------------------- kept tokens


def keepers() -> list[ForwardProcess]:
    kinds = (EpsilonHybrid, GammaHybrid, MaskedDiffusion, ScoreEntropyDiffusion)
    found = [process for kind in kinds for process in kind.examples()]
    return [*found, LINEAR]


@pytest.mark.parametrize("process", keepers(), ids=repr)
def test_keep_probability_is_what_the_clean_token_adds_to_the_noise(
    process: ForwardProcess,
) -> None:
    """The noise does not depend on the token: q_t(x|x) - q_t(x|y) is the kept share, y != x."""
    num_tokens = process.vocabulary.num_tokens
    times = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
    certain = torch.eye(num_tokens, dtype=torch.float64).log()
    for t in times:
        rows = t.repeat(num_tokens)
        marginal = process.log_marginal(certain, rows).exp()[:, :num_tokens]
        own = marginal.diagonal()
        other = marginal.roll(1, 0).diagonal()
        kept = process.keep_probability(rows)
        # differences of probabilities near 1
        torch.testing.assert_close(kept, own - other, rtol=0, atol=1e-12)
    shares = process.keep_probability(times).tolist()
    assert all(later <= earlier for earlier, later in pairwise(shares))


def test_score_scaled_everywhere_is_the_published_formula() -> None:
    process = GammaHybrid(VOCABULARY, 0.1, "noise", 5e-3)
    head = ScoreHead(VOCABULARY, WIDTH, scaled=True, everywhere=True)
    zt = torch.tensor([0, 3, VOCABULARY.root])
    t = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    sigma = -torch.log1p(-(1 - 5e-3) * t)
    expected = torch.log(torch.expm1(sigma)) + math.log(7)
    prepared = head.parameterization.prepare(process, zt, t)
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-12)
    clean = head.parameterization.prepare(process, zt, torch.zeros_like(t))
    assert clean.isfinite().all()
    # in an absorbing process the masks are scaled alike with and without the key
    only_masks = ScoreHead(VOCABULARY, WIDTH, scaled=True).parameterization
    masked = torch.full_like(zt, VOCABULARY.root)
    ours = head.parameterization.prepare(LINEAR, masked, t)
    torch.testing.assert_close(ours, only_masks.prepare(LINEAR, masked, t), rtol=0, atol=1e-12)
    with pytest.raises(ArgumentError, match="everywhere = true needs scaled = true"):
        ScoreHead(VOCABULARY, WIDTH, scaled=False, everywhere=True)
