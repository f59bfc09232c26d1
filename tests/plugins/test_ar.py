"""Autoregression: exact likelihood and sampling, with and without the cache."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from ddiff_ar.objective import AutoregressiveObjective
from ddiff_ar.sampler import LeftToRight, LeftToRightSampler
from ddiff_dit.dit import DiT
from torch import Tensor

import ddiff
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.data.batch import Batch
from ddiff.distributed.single import SingleBackend
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import Context, Denoiser
from ddiff.nn.heads import TokenHead, TreeHead
from ddiff.nn.network import as_network
from ddiff.recipe.files import find_shipped_recipes
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.session import build_run
from ddiff.sampling.loop import generate

TREE = HierarchicalVocabulary([[0, 1, 0]])
NINE = HierarchicalVocabulary([[0, 1, 0, 2, 2, 1, 0, 2, 2]])
LENGTH = 4


def objective(vocabulary: Vocabulary = TREE, scale: float = 0.5) -> AutoregressiveObjective:
    """Make a small float64 objective; all weights are random, of standard deviation `scale`."""
    torch.manual_seed(0)
    backbone = DiT(vocabulary, 8, layers=2, heads=2, time=False)
    head = (
        TreeHead(vocabulary, 8, "levelwise")
        if vocabulary.num_levels > 1
        else TokenHead(vocabulary, 8)
    )
    model = Denoiser(backbone, head, inputs="previous").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=scale)
    return AutoregressiveObjective(model)


def batch_of(ids: Tensor, **changes: Any) -> Batch:
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(ids, everywhere, everywhere, torch.zeros_like(ids), torch.arange(len(ids)))
    return dataclasses.replace(batch, **changes)


def nll(one: AutoregressiveObjective, batch: Batch) -> Tensor:
    slot = batch.index
    rng = CounterRng(0, 0, slot, batch.ids.shape[1])
    return one.nll(batch, rng, slot, len(slot), FlatTimes()).terms["nll"]


@pytest.mark.parametrize("vocabulary", [TREE, FlatVocabulary(3)], ids=["tree", "flat"])
def test_ar_probabilities_of_all_sequences_sum_to_one(vocabulary: Vocabulary) -> None:
    """The sum is over all 81 sequences of four tokens, which have unequal probabilities."""
    sequences = torch.cartesian_prod(*[torch.arange(3)] * LENGTH)
    probability = (-nll(objective(vocabulary), batch_of(sequences)).sum(-1)).exp()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(probability.max() / probability.min()) > 2.0


def test_ar_likelihood_does_not_depend_on_rng_times_or_batch_size() -> None:
    one, ids = objective(), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    slot = torch.arange(2)
    several = [
        one.nll(batch_of(ids), CounterRng(seed, seed, slot, LENGTH), slot, 2, times).terms["nll"]
        for seed, times in ((0, FlatTimes()), (7, FlatTimes(0.3, 0.4)))
    ]
    assert torch.equal(*several)
    torch.testing.assert_close(nll(one, batch_of(ids[1:])), several[0][1:], rtol=0, atol=1e-12)


def test_ar_nll_counts_scored_tokens_and_ignores_padding() -> None:
    one, ids = objective(), torch.tensor([[0, 1, 2, 0, 1, 1]])
    valid = torch.tensor([[True, True, True, True, False, False]])
    padded = nll(one, batch_of(ids, valid=valid, scored=valid))
    assert not padded[:, 4:].any()
    torch.testing.assert_close(padded[:, :4], nll(one, batch_of(ids[:, :4])), rtol=0, atol=1e-12)


def test_ar_conditions_on_prompts_without_scoring_them() -> None:
    """The loss and the token count exclude the prompt, but later tokens depend on it."""
    one, ids = objective(), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    prompt = torch.tensor([[True, True, False, False], [True, False, False, False]])
    whole, part = batch_of(ids), batch_of(ids, scored=~prompt)
    kept = nll(one, whole).masked_fill(prompt, 0.0)
    torch.testing.assert_close(nll(one, part), kept, rtol=0, atol=1e-12)
    assert one.counts(part)["tokens"].item() == 5
    terms = one(part, CounterRng(0, 0, part.index, LENGTH), {"tokens": torch.tensor(5.0)}, 2)
    assert terms.loss.item() == pytest.approx(float(kept.sum()) / 5.0, rel=1e-12)
    total, count = terms.metrics["nll_nats_per_token"]
    assert (total.item(), count.item()) == (pytest.approx(float(kept.sum()), rel=1e-12), 5)
    other = batch_of(torch.tensor([[1, 1, 2, 0], [0, 2, 1, 0]]), scored=~prompt)
    assert not torch.allclose(nll(one, other), kept, rtol=0, atol=1e-6), (
        "predictions do not depend on the prompt"
    )


def test_ar_scores_packed_documents_as_separate_rows() -> None:
    one, ids = objective(), torch.tensor([[0, 1, 2, 0, 1, 1]])
    packed = nll(one, batch_of(ids, document=torch.tensor([[0, 0, 0, 1, 1, 1]]), packed=True))
    alone = torch.cat([nll(one, batch_of(ids[:, :3])), nll(one, batch_of(ids[:, 3:]))], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


def test_ar_loss_equals_nll_and_trains_every_weight() -> None:
    one, ids = objective(), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    batch = batch_of(ids)
    terms = one(
        batch, CounterRng(0, 0, batch.index, LENGTH), {"tokens": torch.tensor(16.0)}, 4
    )  # the batch is half of the global batch
    assert terms.loss.item() == pytest.approx(float(nll(one, batch).sum()) / 16.0, rel=1e-12)
    total, count = terms.metrics["nll_nats_per_token"]
    assert float(total / count) == pytest.approx(float(nll(one, batch).mean()), rel=1e-12)
    terms.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in one.denoiser.parameters())


# ---------------------------------------------------------------------- sampling


def sampled(
    one: AutoregressiveObjective, count: int, cached: bool, length: int = 12, **settings: Any
) -> Any:
    sampler = LeftToRight.build(
        LeftToRight.Config(**settings.pop("config", {})), vocabulary=one.vocabulary
    )
    network = as_network(one.denoiser, None, Context(), cached)
    return generate(
        sampler, None, network, index=torch.arange(count), length=length, seed=5, **settings
    )


@pytest.mark.parametrize("vocabulary", [NINE, FlatVocabulary(9)], ids=["tree", "flat"])
@pytest.mark.parametrize(
    "config", [{}, {"temperature": 0.7, "top_k": 2}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str
)
def test_left_to_right_samples_with_and_without_cache_are_identical(
    vocabulary: Vocabulary, config: dict[str, Any]
) -> None:
    one = objective(vocabulary, scale=0.2)
    drawn, plain = (sampled(one, 16, cached, config=config) for cached in (True, False))
    assert torch.equal(drawn.ids, plain.ids)
    assert drawn.nfe == 12
    assert plain.nfe <= 12, "more queries than positions"
    assert len(drawn.ids.unique(dim=0)) > 8


def test_left_to_right_samples_of_ragged_prompts_equal_those_of_single_rows() -> None:
    one = objective(FlatVocabulary(9))
    prompt = torch.randint(9, (3, 12), generator=torch.Generator().manual_seed(0))
    prompt_mask = torch.arange(12) < torch.tensor([[2], [7], [5]])
    prompt_mask[2, 9] = True  # a given token after a gap is kept
    drawn, plain = (
        sampled(one, 3, cached, prompt=prompt, prompt_mask=prompt_mask) for cached in (True, False)
    )
    assert torch.equal(drawn.ids, plain.ids)
    assert torch.equal(drawn.ids[prompt_mask], prompt[prompt_mask])
    for row in range(3):
        sampler = LeftToRightSampler(one.vocabulary)
        alone = generate(
            sampler,
            None,
            as_network(one.denoiser, cached=True),
            index=torch.tensor([row]),
            length=12,
            seed=5,
            prompt=prompt[row : row + 1],
            prompt_mask=prompt_mask[row : row + 1],
        )
        assert torch.equal(alone.ids[0], drawn.ids[row])
    assert drawn.runs.tolist() == [10] * 3, "with a cache, each forward pass covers the whole batch"
    assert (plain.runs <= torch.tensor([10, 5, 6])).all()


def test_left_to_right_samples_have_the_probabilities_that_nll_computes() -> None:
    """Compare the frequencies of 20 000 samples of two tokens with nine exact probabilities.

    By chance, the chi-square statistic is above its limit 35 with probability 2.7e-5.
    """
    one = objective()
    sequences = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    expected = (-nll(one, batch_of(sequences)).sum(-1)).exp() * 20_000
    drawn = sampled(one, 20_000, True, length=2).ids
    found = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9).double()
    assert float(((found - expected) ** 2 / expected).sum()) < 35


# ---------------------------------------------------------------------- invalid arguments


def test_ar_objective_refuses_unsupported_inputs_and_vocabularies() -> None:
    backbone = DiT(TREE, 8, layers=1, heads=2)
    with pytest.raises(ArgumentError, match='inputs = "previous"; got "own"'):
        AutoregressiveObjective(Denoiser(backbone, TokenHead(TREE, 8)))
    bare = FlatVocabulary(3, mask=False)
    with pytest.raises(ArgumentError, match="must have a mask"):
        AutoregressiveObjective(Denoiser(backbone, TokenHead(bare, 8), inputs="previous"))
    process = ddiff.MixtureProcess(bare, ddiff.LinearSchedule(), torch.full((3,), 1 / 3))
    with pytest.raises(ArgumentError, match="be trained without a process"):
        LeftToRightSampler(TREE).check_supported(process, "distribution")


# ---------------------------------------------------------------------- recipes


RECIPE = """
name = "markov"
plugins = ["ar", "dit"]
tokenizer = "alphabet"
vocabulary = "flat"
denoiser = { kind = "dit", width = 32, layers = 2, heads = 2, time = false }
objective = "ar"
train = { steps = 100, batch = 128, warmup = 20, optimizer = "muon" }
evaluate = { batch = 512 }
sample = { sampler = "left_to_right", count = 1 }
backend = { kind = "single", device = "cpu" }

[data]
kind = "markov"
alphabet = 8
peakedness = 2.0
rows = 8192
validation = 1024
length = 16
"""


def test_ar_objective_trains_in_the_precision_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective runs the denoiser of the run, in the precision of the backend."""
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    run = build_run(
        parse_recipe(RECIPE, settings=["data.rows=16", "backend.precision=bfloat16"]),
        SingleBackend(),
    )
    assert run.objective.module is run.denoiser
    assert run.denoiser.precision == torch.bfloat16
    products = []
    run.denoiser.backbone.blocks[0].up.register_forward_hook(
        lambda module, given, out: products.append(out.dtype)
    )
    batch = run.data.batch_at(0, 0)
    run.objective(
        batch,
        CounterRng(0, 0, batch.index, 16),
        {"tokens": batch.scored.sum().double()},
        len(batch.index),
    )
    assert products == [torch.bfloat16]


@pytest.mark.slow
def test_nll_of_trained_ar_model_is_at_most_3_percent_above_the_entropy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The NLL is at most 3 % above the entropy, and its interval does not end below the entropy.

    The entropy of rows of 16 symbols is known exactly. The NLL of the unigram distribution is 30 %
    above the entropy.
    """
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    run = ddiff.run(parse_recipe(RECIPE, settings=[f"run_dir={str(tmp_path / 'run')!r}"]))
    evaluation, entropy = run.evaluate()[0], run.data.documents.entropy_rate
    assert entropy is not None
    assert evaluation.interval is not None
    assert evaluation.interval[1] >= entropy
    assert evaluation.nelbo_nats_per_token < 1.03 * entropy
    assert set(evaluation.terms_nats_per_token) == {"nll"}
    assert math.isclose(
        evaluation.terms_nats_per_token["nll"], evaluation.nelbo_nats_per_token, rel_tol=1e-9
    )


def test_ar_small_and_mdlm_small_have_equal_data_denoiser_and_training() -> None:
    ours, theirs = (
        ddiff.read_recipe(find_shipped_recipes()[name]).to_dict()
        for name in ("ar_small", "mdlm_small")
    )
    for table in ("data", "tokenizer", "vocabulary", "denoiser", "train", "backend", "evaluate"):
        assert ours[table] == theirs[table], table
    assert "process" not in ours
    assert tomllib.loads(ddiff.read_recipe("ar_small").to_toml()) == ours
