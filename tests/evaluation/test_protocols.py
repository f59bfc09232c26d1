"""Named protocols undo the tokenization of test sets; the published protocol differs from ours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tables import Known, constant, full_rows, processes

from ddiff.core.times import FlatTimes
from ddiff.errors import ArgumentError
from ddiff.evaluation.likelihood import evaluate
from ddiff.evaluation.protocols import PROTOCOLS, PUBLISHED, PublishedTerms, find_protocol

CASES = {
    "ptb": ("he did n't say it 's $ N or N", "he didn't say it's $N or N"),
    "wikitext2": (
        ' = Robert <unk> = \n In 1 @,@ 000 " well @-@ known " games ( 2 @.@ 5 % ) , he won .',
        '= Robert <unk> =\n In 1,000 "well-known" games (2.5%), he won.',
    ),
    "lm1b": ("He said , `` I do n't know . ''", 'He said, "I don\'t know."'),
    "lambada": ("“ it ’s time , ” he said", '" it \'s time , " he said'),
    "ag_news": ("Oil Prices\\Up  as Bush #39;s", "Oil Prices Up as Bush 's"),
    "arxiv": ("we show ( see fig . ) that it holds .", "we show (see fig.) that it holds."),
}
P = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()


@pytest.mark.parametrize("name", CASES)
def test_protocol_undoes_the_tokenization_of_its_data_set(name: str) -> None:
    given, expected = CASES[name]
    assert find_protocol(name).detokenize(given) == expected


@pytest.mark.parametrize("name", PROTOCOLS)
def test_rules_of_a_protocol_keep_ordinary_text_and_are_idempotent(name: str) -> None:
    text = "Mr. Smith (of \"Acme, Inc.\") paid $5.50: 10% more than John's offer.\nHe didn't mind!"
    protocol = PROTOCOLS[name]
    assert protocol.detokenize(text) == text
    once = protocol.detokenize(CASES.get(name, CASES["arxiv"])[0])
    assert protocol.detokenize(once) == once


def test_unknown_protocol_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ArgumentError, match=r'expected one of ptb, .*Did you mean "wikitext2"'):
        find_protocol("wikitext-2")


def test_published_blocks_have_marks_at_both_ends_and_no_incomplete_block() -> None:
    blocks = PUBLISHED.make_blocks([1, 2, 3, 4, 5, 6, 7], 5, 0)
    assert blocks.tolist() == [[0, 1, 2, 3, 0], [0, 4, 5, 6, 0]]
    with pytest.raises(ArgumentError, match="one block of 5 tokens needs 3"):
        PUBLISHED.make_blocks([1, 2], 5, 0)


def test_published_value_leaves_out_the_ends_of_the_bound() -> None:
    """For independent tokens the integrand is constant, so its mean over any window is the entropy.

    The diffusion term of the bound is the entropy times the width of the window; the published
    value divides by the width. Both are within four standard errors of their values.
    """
    process = processes()["masked"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(P, 64 * 8, replacement=True, generator=generator).reshape(64, 8)
    exact = -float(P.log()[ids].mean())
    settings = {"length": 8, "draws": 50, "times": FlatTimes(*PUBLISHED.window)}
    known = Known(process, constant(P))
    ours = evaluate(known, full_rows(ids), np.arange(64), **settings)  # type: ignore[arg-type]
    theirs = evaluate(PublishedTerms(known), full_rows(ids), np.arange(64), **settings)  # type: ignore[arg-type]
    assert (ours.bound, theirs.bound) == ("NELBO", "PUBLISHED")
    assert list(theirs.terms_nats_per_token) == ["diffusion"]
    start, stop = PUBLISHED.window
    assert theirs.nelbo_nats_per_token == pytest.approx(
        ours.terms_nats_per_token["diffusion"] / (stop - start), rel=1e-12
    )
    for found in (ours, theirs):
        error = found.standard_errors_nats_per_token["monte_carlo"]
        assert error is not None
        assert abs(found.nelbo_nats_per_token - exact) < 4 * error


def equal_digits(zt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the exact prediction of a digit that equals the other digit of its pair."""
    other = zt.flip(-1)
    known = torch.nn.functional.one_hot(other.clamp(max=3), 4).double()
    fair = torch.tensor([0.5, 0.5, 0.0, 0.0]).double().expand_as(known)
    return torch.where((other == 4).unsqueeze(-1), fair, known).log()


def test_loss_of_partially_masked_tokens_is_below_the_entropy_and_the_bound_is_not() -> None:
    """A token of two equal fair digits has an entropy of 1 bit.

    Masking the digits independently, and weighting the cross-entropy of the whole token by 1/t,
    claims 0.5 bits: the cross-entropy is 1 bit only if both digits are masked, with probability
    t^2, and the integral of t is 1/2. The bound weights each masked digit by 1/t, and gives 1 bit,
    here within four standard errors.
    """
    claimed = 0.0
    times = (torch.arange(1000) + 0.5) / 1000
    for t in times.tolist():
        for masks in ((0, 0), (0, 1), (1, 0), (1, 1)):
            zt = torch.tensor([[4 if mask else 1 for mask in masks]])
            log_p = equal_digits(zt, torch.zeros(1, 2))[0, :, 1]
            # the token is known as soon as one digit is shown
            bits = -float(log_p[0]) / math.log(2) if all(masks) else 0.0
            chance = math.prod(t if mask else 1 - t for mask in masks)
            claimed += bits * chance / t / len(times)
    digits = torch.randint(0, 2, (256, 1), generator=torch.Generator().manual_seed(0))
    found = evaluate(
        Known(processes()["masked"], equal_digits),
        full_rows(digits.expand(-1, 2).contiguous()),
        np.arange(256),
        length=2,
        times=FlatTimes(1e-6, 1.0 - 1e-6),
        draws=60,
    )
    error = found.standard_errors_nats_per_token["monte_carlo"]
    assert error is not None
    bits = 2 * found.nelbo_nats_per_token / math.log(2)
    assert claimed == pytest.approx(0.5, abs=1e-3)
    assert bits == pytest.approx(1.0, abs=2 * 4 * error / math.log(2))
    assert bits > 0.9
