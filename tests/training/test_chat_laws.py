"""Laws of training and evaluation on conversations: prompts are given, answers are conditional."""

from __future__ import annotations

import math
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddiff_dit.dit import DiT
from torch import Tensor

from ddiff.core.components import MixtureProcess, mask_distribution
from ddiff.core.elbo import corrupt, nelbo, network_from_table
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import FlatTimes
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.data.batch import Batch
from ddiff.data.cache import Cache
from ddiff.data.chat import ChatCorpus, ChatSettings
from ddiff.data.number_questions import make_number_questions
from ddiff.data.packing import batch_rows
from ddiff.data.tokenizer import BytePairTokenizer
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.training.context import build_context
from ddiff.training.losses import ElboLoss
from ddiff.training.objective import DiffusionObjective

LENGTH = 160
DOCUMENTS = make_number_questions(12, 3, largest=20)
TOKENIZER = BytePairTokenizer.train(DOCUMENTS.train["text"], 270)
VOCABULARY = FlatVocabulary(TOKENIZER.num_tokens)


def make_batch(tmp_path: Path, **settings: Any) -> Batch:
    corpus = ChatCorpus(DOCUMENTS, ChatSettings(**settings))
    rows = corpus.rows("train", TOKENIZER, LENGTH, Cache(tmp_path))
    return batch_rows(rows, np.arange(min(4, len(rows))))


def make_process(vocabulary: FlatVocabulary) -> MixtureProcess:
    return MixtureProcess(vocabulary, LinearSchedule(), mask_distribution(vocabulary))


def make_denoiser() -> Denoiser:
    torch.manual_seed(0)
    config = DiT.Config(width=16, layers=2, heads=2)
    backbone = DiT.build(config, vocabulary=VOCABULARY, length=LENGTH)
    denoiser = Denoiser(backbone, TokenHead(VOCABULARY, 16)).double()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return denoiser


class NoiseOfPrompts:
    """Random generator with other uniforms for the states of the positions `given` [B,L]."""

    def __init__(self, rng: CounterRng, other: CounterRng, given: Tensor) -> None:
        self.rng = rng
        self.other = other
        self.given = given

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        own = self.rng.uniform(channel, count)
        if channel != "diffusion":  # the times are shared by all positions of a row
            return own
        given = self.given if own.ndim == 2 else self.given.unsqueeze(-1)
        return torch.where(given, self.other.uniform(channel, count), own)

    def uniform_per_group(self, channel: str) -> Tensor:
        return self.rng.uniform_per_group(channel)


@pytest.mark.parametrize("seed", range(3))
def test_noise_never_changes_a_prompt_token(seed: int, tmp_path: Path) -> None:
    batch = make_batch(tmp_path, answer_length=20)
    process = make_process(VOCABULARY)
    rng = CounterRng(seed, 0, batch.index, LENGTH)
    times = FlatTimes(0.9, 1.0).draw(
        process.information_time, rng, batch.index, len(batch.ids), LENGTH
    )
    noisy = corrupt(process, batch.ids, times, batch.scored, rng, "diffusion")
    given = ~batch.scored
    assert torch.equal(noisy.zt[given], batch.ids[given])
    assert (noisy.zt[batch.scored] == VOCABULARY.mask_id).float().mean() > 0.5
    assert bool((noisy.t[given] == 0).all())


def test_gradient_does_not_depend_on_the_noise_of_prompts(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, answer_length=20)
    denoiser = make_denoiser()
    objective = DiffusionObjective(make_process(VOCABULARY), denoiser, ElboLoss(), FlatTimes())
    own = CounterRng(0, 0, batch.index, LENGTH)
    gradients = []
    for other in (own, CounterRng(1, 0, batch.index, LENGTH)):
        denoiser.zero_grad()
        rng: Any = NoiseOfPrompts(own, other, ~batch.scored)
        objective(batch, rng, objective.counts(batch), len(batch.ids)).loss.backward()
        found = [parameter.grad for parameter in denoiser.parameters()]
        gradients.append([grad.clone() for grad in found if grad is not None])
    assert gradients[0]
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_loss_is_divided_by_the_tokens_of_answers(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, answer_length=20)
    objective = DiffusionObjective(
        make_process(VOCABULARY), make_denoiser(), ElboLoss(), FlatTimes()
    )
    assert int(objective.counts(batch)["tokens"]) == int(batch.tokens.sum())
    assert int(batch.tokens.sum()) < int(batch.scored.sum())


def test_bound_of_an_answer_equals_the_dense_conditional_bound() -> None:
    """Compare the estimate with the sum over all sets of masked answer positions.

    For masks with alpha = 1 - t, and a network that ignores the time, the integral over t of the
    probability of the masked set S, of k among n positions, times the weight 1/t, is
    (k - 1)! (n - k)! / n!. So the bound is the sum over S of this number, times the nats of the
    masked tokens given all others.
    """
    vocabulary = FlatVocabulary(3)
    process = make_process(vocabulary)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4, 4, 4, 4, 4, 3, generator=generator, dtype=torch.float64)
    table = table.log_softmax(-1)

    def log_p(zt: Tensor, t: Tensor) -> Tensor:
        places = torch.arange(zt.shape[1])
        sums = [table[tuple(row[:4])] for row in zt]  # [4,3] for each row
        return torch.stack([found[places % 4] for found in sums])

    prompt = [2, 0]
    answer = [1, 2]
    x0 = torch.tensor(prompt + answer)
    n = len(answer)
    expected = 0.0
    places = [2, 3]
    for masked in chain(combinations(places, 1), combinations(places, 2)):
        zt = x0.clone()
        zt[list(masked)] = vocabulary.root
        found = log_p(zt.unsqueeze(0), torch.zeros(1, 4))[0]
        k = len(masked)
        share = math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)
        expected -= share * float(sum(found[place, x0[place]] for place in masked))
    rows = 4096
    scored = torch.tensor([False, False, True, True]).expand(rows, -1)
    ids = x0.expand(rows, -1)
    slot = torch.arange(rows)
    rng = CounterRng(0, 0, slot, 4)
    network = network_from_table(log_p, vocabulary)
    terms = nelbo(process, network, ids, scored, FlatTimes(), rng, slot, rows)
    total = (terms.closing + terms.diffusion + terms.decoding).double()
    assert bool((total[:, :2] == 0).all())  # prompts add nothing
    nats = total.sum(-1)
    error = float(nats.std()) / math.sqrt(rows)
    # 4 standard errors of independent draws; stratified times make the real error smaller
    assert abs(float(nats.mean()) - expected) < 4 * error
    assert error < 0.03 * expected


def test_packed_conversations_are_predicted_as_if_they_were_separate(tmp_path: Path) -> None:
    packed = make_batch(tmp_path, answer_length=20)
    denoiser = make_denoiser().eval()
    generator = torch.Generator().manual_seed(0)
    is_masked = packed.scored & (torch.rand(packed.ids.shape, generator=generator) < 0.6)
    zt = torch.where(is_masked, VOCABULARY.root, packed.ids)
    t = torch.where(packed.scored, 0.6, 0.0).double()
    together = denoiser.backbone(zt, t, build_context(packed))
    assert packed.packed
    compared = 0
    for row in range(len(zt)):
        for document in packed.document[row].unique():
            inside = (packed.document[row] == document) & packed.valid[row]
            own = zt[row][inside].unsqueeze(0)
            own_t = t[row][inside].unsqueeze(0)
            separate = denoiser.backbone(own, own_t, build_context(cut(packed, own)))
            # positions start at 0 in the separate row: rotary embeddings are equal up to rounding
            assert torch.allclose(together[row][inside], separate[0], rtol=0.0, atol=1e-9)
            compared += 1
    assert compared > len(zt)


def test_packed_conversation_never_reaches_another_one(tmp_path: Path) -> None:
    packed = make_batch(tmp_path, answer_length=20)
    denoiser = make_denoiser().eval()
    context = build_context(packed)
    t = torch.zeros(packed.ids.shape, dtype=torch.float64)
    before = denoiser.backbone(packed.ids, t, context)
    first = packed.document[0, 0]
    is_first = packed.document[0] == first
    changed = packed.ids.clone()
    changed[0][is_first] = (changed[0][is_first] + 1) % VOCABULARY.num_tokens
    after = denoiser.backbone(changed, t, context)
    others = ~is_first & packed.valid[0]
    assert torch.equal(before[0][others], after[0][others])
    assert not torch.equal(before[0][is_first], after[0][is_first])


def cut(batch: Batch, ids: Tensor) -> Batch:
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, everywhere, everywhere, torch.zeros_like(ids), torch.zeros(1).long())
