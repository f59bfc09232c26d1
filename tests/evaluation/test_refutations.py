"""Three published claims below the entropy: the wrong method, and the right value by ddiff.

Each test implements the wrong method, and evaluates the same data with ddiff.
"""

from __future__ import annotations

import math
from typing import Any

import exact_fields
import numpy as np
import pytest
import torch
from exact_fields import BITS, MEAN, PROBABILITY
from exact_objective import ExactObjective
from tables import Known, full_rows, processes, scored_rows
from torch import Tensor

from ddiff.core.elbo import Likelihood
from ddiff.core.paths import given_path, shared_path
from ddiff.core.times import FlatTimes
from ddiff.data.batch import Batch
from ddiff.data.fields_batch import FieldsBatch, token_field, vector_field
from ddiff.evaluation.fields import evaluate_fields, evaluate_rate_distortion
from ddiff.evaluation.likelihood import Evaluation, Scored, evaluate
from ddiff.runs.evaluation_report import find_impossible

BIT = math.log(2)

# ---------------------------------------------------------------------- masked parts of tokens

PAIRS = 512
MASK = 4  # of the masked process of `tables`


def equal_digits(zt: Tensor, t: Tensor) -> Tensor:
    """Return the exact prediction of a digit that equals the other digit of its pair."""
    other = zt.flip(-1)
    known = torch.nn.functional.one_hot(other.clamp(max=3), 4).double()
    fair = torch.tensor([0.5, 0.5, 0.0, 0.0]).double().expand_as(known)
    return torch.where((other == MASK).unsqueeze(-1), fair, known).log()


class PartialMasking(Scored):
    """Wrong bound of a token of two digits: its whole cross-entropy with the weight of a digit.

    The digits are masked independently. The cross-entropy of the token under the exact prediction
    given the digits that are shown, divided by t, is averaged over t.
    """

    def nll(self, batch: Batch, rng: Any, slot: Tensor, slots: Tensor, times: Any) -> Likelihood:
        t = rng.uniform("time")[:, :1]
        is_masked = rng.uniform("digits") < t
        # a shown digit determines the token, whose two values have the probability 1/2 otherwise
        nats = torch.where(is_masked.all(-1, keepdim=True), BIT, 0.0) / t
        return Likelihood({"diffusion": (nats / 2.0).expand(-1, 2)}, {})


def evaluate_pairs(objective: Scored) -> Evaluation:
    digits = torch.randint(0, 2, (PAIRS, 1), generator=torch.Generator().manual_seed(0))
    return evaluate(
        objective,
        full_rows(digits.expand(-1, 2).contiguous()),
        np.arange(PAIRS),
        length=2,
        times=FlatTimes(1e-6, 1.0 - 1e-6),
        draws=24,
        batch=PAIRS,
    )


def test_loss_of_partially_masked_tokens_claims_half_of_the_entropy() -> None:
    """A token of two equal fair digits has an entropy of 1 bit.

    Both digits are masked with probability t^2, so the wrong method gives the integral of t^2/t,
    1/2 bit. The bound weights each masked digit by 1/t, and gives 2 times the integral of t^2/t.
    Both estimates are within four standard errors.
    """
    claimed = evaluate_pairs(PartialMasking())
    right = evaluate_pairs(Known(processes()["masked"], equal_digits))
    for found, bits in ((claimed, 0.5), (right, 1.0)):
        error = found.standard_errors_nats_per_token["total"]
        assert error is not None
        assert error < 0.012
        assert abs(2.0 * found.nelbo_nats_per_token - bits * BIT) < 8.0 * error
    assert "which no model can reach" in str(find_impossible(claimed, BIT / 2.0))
    assert find_impossible(right, BIT / 2.0) is None


# ---------------------------------------------------------------------- bits per byte

LETTERS = torch.tensor([0.5, 0.25, 0.125, 0.125]).double()  # an entropy of 1.75 bits
ASSUMED = 4.0  # bytes of a token, as of English words


class Independent(Scored):
    """Exact likelihood of tokens of `size` independent letters, which are one byte each."""

    bound = "NLL"

    def __init__(self, size: int) -> None:
        self.dist = LETTERS
        for _ in range(size - 1):
            self.dist = (self.dist[:, None] * LETTERS).reshape(-1)

    def nll(self, batch: Batch, *_: Any) -> Likelihood:
        return Likelihood({"nll": -self.dist.log()[batch.ids] * batch.scored}, {})


def join_letters(letters: Tensor, size: int) -> Tensor:
    """Return the tokens of `size` letters of a text."""
    powers = 4 ** torch.arange(size - 1, -1, -1)
    return (letters.reshape(-1, size) * powers).sum(-1)


def test_assumed_bytes_per_token_claims_bits_below_the_entropy() -> None:
    """One text of 6,000 bytes as tokens of 1, 2, 3 and 5 bytes, with its exact likelihood."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.multinomial(LETTERS, 6000, replacement=True, generator=generator)
    exact = -float(LETTERS.log2()[letters].mean())  # bits per byte of this text
    assert exact == pytest.approx(1.75, abs=0.05)
    claimed = []
    for size in (1, 2, 3, 5):
        ids = join_letters(letters, size).reshape(-1, 40)
        found = evaluate(
            Independent(size),
            scored_rows(ids, torch.full((len(ids),), 40)),
            np.arange(len(ids)),
            length=40,
            times=FlatTimes(),
            num_bytes=6000,
        )
        assert found.bits_per_byte == pytest.approx(exact, rel=1e-12)
        claimed.append(found.nelbo_nats_per_token / BIT / ASSUMED)
    # the likelihood is that of the same text, and the claim is proportional to the token
    assert claimed == pytest.approx([exact * size / 4 for size in (1, 2, 3, 5)], rel=1e-12)
    assert claimed[0] < 0.3 * 1.75


# ---------------------------------------------------------------------- text given its embedding

TEXTS = 200
ENTROPY = -float((PROBABILITY * PROBABILITY.log()).sum())  # 1.2488 nats per text
SHARED = shared_path(["text", "latent"])


def texts_with_embeddings(numbers: np.ndarray) -> FieldsBatch:
    """Return texts of two tokens, whose embedding f(x) = MEAN[x] determines the text."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(PROBABILITY, TEXTS, True, generator=generator)[numbers]
    embedding = MEAN[chosen].reshape(-1, 1, 1)
    fields = {"text": token_field(BITS[chosen]), "latent": vector_field(embedding)}
    return FieldsBatch(fields, torch.from_numpy(numbers))


@pytest.mark.parametrize(("spread", "most"), [(0.6, 0.9), (0.1, 0.06), (0.02, 1e-6)])
def test_text_given_its_own_embedding_claims_nats_below_the_entropy(
    spread: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closer the model's embeddings of a text are to f(x), the less the text costs given f(x).

    With exact predictions of a model whose embeddings have the deviation `spread` around f(x), the
    conditional term tends to 0. Rate plus distortion with noise s has the exact value
    H + (r - 1 - ln r) / 2 with r = s^2 / (spread^2 + s^2), which is at least H.
    """
    monkeypatch.setattr(exact_fields, "SPREAD", spread)
    path = given_path(SHARED, {"latent": "clean"})
    claimed = evaluate_fields(
        ExactObjective(), texts_with_embeddings, TEXTS, path, draws=4, batch=TEXTS
    )
    assert claimed.interval is not None
    assert claimed.interval[1] < most < ENTROPY
    deviation = 0.5
    right = evaluate_rate_distortion(
        ExactObjective(),
        texts_with_embeddings,
        TEXTS,
        "text",
        "latent",
        deviation,
        draws=32,
        batch=TEXTS,
    )
    ratio = deviation**2 / (spread**2 + deviation**2)
    numbers = np.arange(TEXTS)
    chosen = texts_with_embeddings(numbers).fields["text"].values @ torch.tensor([2, 1])
    truth = -float(PROBABILITY.log()[chosen].mean())  # -ln p of these texts
    exact = truth + 0.5 * (ratio - 1.0 - math.log(ratio))
    low, high = right.monte_carlo_interval or (0.0, 0.0)
    # 95 % intervals, widened to four standard errors
    half = high - low
    assert half < 0.5
    assert abs(right.nats_per_sample - exact) < half
    assert right.nats_per_sample + half > truth
