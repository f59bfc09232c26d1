"""Frequency of rare tokens in samples of ddiff, and of published samplers in float32.

The network predicts the Zipf distribution over 50,257 tokens at every position, so that positions
are independent. Two sets of tokens are counted in the samples: the rarest tokens with a total
probability of 0.01, and those with a total probability of 0.1. A count must be within four standard
deviations of its expectation; a correct sampler fails with probability 6e-5. Seeds are fixed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ddiff.core.clock import CdfClock
from ddiff.core.elbo import RowFunction
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import Query
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import Noisy
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.loop import generate

WORDS, STEPS, DRAWS = 50_257, 1024, 2048
WEIGHTS = 1.0 / torch.arange(1, WORDS + 1, dtype=torch.float64)
ZIPF = WEIGHTS / WEIGHTS.sum()  # the smallest probability is 1.7e-6
MASSES = (0.01, 0.1)
VOCABULARY, SAID = FlatVocabulary(WORDS), ZIPF.log().float()


def tail(mass: float) -> int:
    """Return the first id of the rarest tokens with the total probability `mass`."""
    return int((ZIPF.flip(0).cumsum(0).flip(0) > mass).sum())


def deviations(words: Tensor, mass: float) -> float:
    """Return (number of rare tokens - expected number) in standard deviations.

    Rare tokens are those of `tail(mass)`.
    """
    share = float(ZIPF[tail(mass) :].sum())
    count = int((words >= tail(mass)).sum())
    return (count - len(words) * share) / (len(words) * share * (1.0 - share)) ** 0.5


def zipf(noisy: Noisy) -> Query:
    """Network that predicts the Zipf distribution, in float32, at every position."""

    def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        return fn(DenseDistribution(SAID.expand(len(rows), -1), VOCABULARY), *per_row)

    return query


def test_ancestral_sampling_draws_rare_tokens_at_their_probability() -> None:
    process = TreeProcess(VOCABULARY, CdfClock([LinearSchedule()]))
    samples = generate(
        AncestralSampler(STEPS), process, zipf, index=torch.arange(8), length=DRAWS // 8, seed=0
    )
    words = samples.ids.reshape(-1)
    assert [round(deviations(words, mass), 1) for mass in MASSES] == pytest.approx(
        [0.0, 0.0], abs=4.0
    )


def exponential(u: Tensor) -> Tensor:
    """Return the exponential variable -ln u of float32 uniforms, as published code computes it.

    The uniforms are multiples of 2^-24, so the smallest value is 6e-8.
    """
    single = ((u * 2.0**24).floor() / 2.0**24).float()  # float32 uniforms as of torch.rand
    return 1e-10 - (single + 1e-10).log()


def draw_by_race(generator: torch.Generator) -> Tensor:
    """Sample masked diffusion by a float32 race of all tokens and the mask in each step.

    In the step from t = k/N to (k - 1)/N, a masked position takes the index v with the least
    E_v/w_v, where E_v is a float32 exponential variable. The weight w_v is p_v/k for token v, and
    (k - 1)/k for the mask.

    To save time, only few of the 50,257 variables are drawn. Rounding a uniform down to float32
    increases its exponential. Only tokens whose exact E_v/w_v is below the value of the mask can
    therefore win. The exact values are first arrivals of Poisson processes with rates w_v.
    """
    words = torch.full((DRAWS,), WORDS)
    cumulative = ZIPF.cumsum(0)
    draw = lambda count: torch.rand(count, generator=generator, dtype=torch.float64)  # noqa: E731
    for k in range(STEPS, 0, -1):
        masked = (words == WORDS).nonzero().squeeze(-1)
        best = (
            exponential(draw(len(masked))) / torch.tensor((k - 1) / k).float()
        )  # value of the mask; infinite at k = 1
        arrival = torch.zeros(len(masked), dtype=torch.float64)
        racing = torch.arange(len(masked))
        while len(racing):
            arrival[racing] -= (1.0 - draw(len(racing))).log() * k
            racing = racing[arrival[racing] < best[racing].double()]
            word = torch.searchsorted(cumulative, draw(len(racing))).clamp(max=WORDS - 1)
            weight = ZIPF[word] / k
            found = exponential(torch.exp(-arrival[racing] * weight)) / weight.float()
            won = found < best[racing]
            best[racing[won]] = found[won]
            words[masked[racing[won]]] = word[won]
    return words


def test_float32_gumbel_race_with_a_mask_draws_too_few_rare_tokens() -> None:
    """Published samplers draw too few rare tokens because of float32 (arXiv 2409.02908)."""
    words = draw_by_race(torch.Generator().manual_seed(0))
    assert int(words.max()) < WORDS
    assert deviations(words, 0.1) < -8.0
    assert deviations(words, 0.01) < -4.0


def test_float64_exponential_race_draws_rare_tokens_correctly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same race is correct with float64 exponentials, so float32 causes the error."""
    monkeypatch.setitem(globals(), "exponential", lambda u: -u.log())
    words = draw_by_race(torch.Generator().manual_seed(0))
    assert [round(deviations(words, mass), 1) for mass in MASSES] == pytest.approx(
        [0.0, 0.0], abs=4.0
    )
