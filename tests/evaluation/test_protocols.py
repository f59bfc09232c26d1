"""Named protocols undo the tokenization of test sets; published programs are repeated exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tables import Known, constant, full_rows, processes

from ddiff.core.elbo import Likelihood
from ddiff.core.information import IdentityTime
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes
from ddiff.data.batch import Batch
from ddiff.errors import ArgumentError
from ddiff.evaluation.detokenization import apply_rules
from ddiff.evaluation.likelihood import Evaluation, Scored, evaluate
from ddiff.evaluation.protocols import (
    DEFAULT_PROGRAM,
    PROGRAMS,
    PROTOCOLS,
    PublishedProgram,
    PublishedTerms,
    find_program,
    find_protocol,
)

CASES = {
    "ptb": [
        ("he did n't say it 's $ N or N", "he didn't say it's $N or N"),
        ("the companies ' plans cost 1\\/2 of <unk>", "the companies' plans cost 1/2 of <unk>"),
    ],
    "wikitext2": [
        (
            ' = Robert <unk> = \n In 1 @,@ 000 " well @-@ known " games ( 2 @.@ 5 % ) , he won .',
            '= Robert <unk> =\nIn 1,000 "well-known" games (2.5%), he won.',
        ),
        (" = = Early life = = \n He didn 't win .", "== Early life ==\nHe didn't win."),
    ],
    "lm1b": [
        ("He said , `` I do n't know . ''", 'He said, "I don\'t know."'),
        ("It isn 't his ; see http : / / a.b .", "It isn't his; see http://a.b."),
    ],
    "lambada": [("“ it ’s time , ” he said", '" it \'s time , " he said')],
    "ag_news": [("Oil Prices\\Up  as Bush #39;s #36;5", "Oil Prices Up as Bush 's $5")],
    "arxiv": [("we show ( see fig . ) that it holds .", "we show (see fig.) that it holds.")],
}
# Effects of the published rules, derived by hand from their description in `detokenization`. The
# errors of these rules are marked.
PUBLISHED_CASES = [
    ("ptb", "the dog 's $ N or # N N", "the dog's $1 or #1 N"),  # the last N stays
    ("ptb", "companies ' plans do n't cost 1\\/2 <unk>", "companies' plans don't cost 1/2 ?"),
    ("ptb", "they 're sure", "they 're sure"),  # stays divided
    ("wikitext2", " = = Early life = = \n", " == Early life ==\n"),
    (
        "wikitext2",
        "in 1 @,@ 000 games ( 2 @.@ 5 % ) , he won .\n",
        "in 1,000 games (2.5 %), he won .\n",
    ),
    ("wikitext2", ' a " well @-@ known " man at 5 ° C \n', ' a "well-known" man at 5°C\n'),
    ("wikitext2", " it didn 't , Ann 's \n", " it didn 't, Ann's\n"),  # apostrophes as a pair
    ("wikitext2", " the years ' end : N of N \n", " the years' end: 1 of N\n"),
    ("lm1b", "He didn 't say : go / stay .", "He didn't say: go/stay."),
    ("lm1b", "said 'yes ' ?", "said'yes '?"),  # an opening quotation mark is joined
    ("lm1b", 'They cost $ 5 ( or [ £ 4 ] ) , " no " .', 'They cost $5 (or [£4]), "no" .'),
    ("lm1b", "see http : / / a.b for more !", "see http://a.b for more!"),
    ("lambada", " “ it ’s time , ” he said ", '\n" it ’s time , " he said'),
    ("ag_news", "Oil\\Up  as Bush #39;s", "Oil\\Up  as Bush #39;s"),  # no rules
    ("pubmed", "we show ( see fig . 2 ) n = 3 / 4 .", "we show (see fig. 2) n = 3/4."),
]
P = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()


@pytest.mark.parametrize("name", CASES)
def test_protocol_undoes_the_tokenization_of_its_data_set(name: str) -> None:
    for given, expected in CASES[name]:
        assert find_protocol(name).detokenize(given) == expected


@pytest.mark.parametrize("name", PROTOCOLS)
def test_rules_of_a_protocol_keep_ordinary_text_and_are_idempotent(name: str) -> None:
    text = "Mr. Smith (of \"Acme, Inc.\") paid $5.50: 10% more than John's offer.\nHe didn't mind!"
    protocol = PROTOCOLS[name]
    assert protocol.detokenize(text) == text
    for given, _ in CASES.get(name, CASES["arxiv"]):
        once = protocol.detokenize(given)
        assert protocol.detokenize(once) == once


@pytest.mark.parametrize(("name", "given", "expected"), PUBLISHED_CASES)
def test_published_rules_have_their_published_effect(name: str, given: str, expected: str) -> None:
    assert apply_rules(given, PROTOCOLS[name].published_rules) == expected


def test_every_protocol_names_its_text_on_the_hub() -> None:
    splits = {}
    for protocol in PROTOCOLS.values():
        assert protocol.hub.path.count("/") == 1
        splits[protocol.name] = protocol.hub.split
    # the published programs evaluate the validation split where it is not the only held-out one
    tested = {name for name, split in splits.items() if split == "test"}
    assert tested == {"lm1b", "lambada", "ag_news"}
    assert set(splits.values()) == {"test", "validation"}


def test_unknown_protocol_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ArgumentError, match=r'expected one of ptb, .*Did you mean "wikitext2"'):
        find_protocol("wikitext-2")
    with pytest.raises(ArgumentError, match=r"expected the arXiv number .*got 2406\.0752\."):
        find_program("2406.0752")
    assert find_program(None).paper == DEFAULT_PROGRAM


# ---------------------------------------------------------------------- documents

ARTICLES = " \n = First = \n a b \n \n = = Part = = \n c \n = Second = \n = 5 \n"


def test_files_with_articles_are_divided_at_titles_of_articles_only() -> None:
    found = PROTOCOLS["wikitext2"].read_documents([ARTICLES])
    assert found == ["= First =\na b\n\n== Part ==\nc", "= Second =\n= 5"]


def test_rows_of_the_hub_give_the_documents_of_a_local_file() -> None:
    protocol = PROTOCOLS["wikitext2"]
    rows = [
        "",
        " = First = \n",
        " a b \n",
        "",
        " = = Part = = \n",
        " c \n",
        " = Second = \n",
        " = 5 \n",
    ]
    parts = protocol.join_rows(rows)
    assert protocol.read_documents(parts) == protocol.read_documents([ARTICLES])
    assert protocol.read_published_documents(parts) == protocol.read_published_documents([ARTICLES])
    lines = PROTOCOLS["pubmed"].join_rows(["a\nb", None, " ", "c"])
    assert lines == ["a\nb", "c"]


def test_published_documents_of_articles_include_empty_lines() -> None:
    found = PROTOCOLS["wikitext2"].read_published_documents([ARTICLES])
    assert found == [
        "",
        " = First =\n",
        " a b\n",
        "",
        " == Part ==\n",
        " c\n",
        " = Second =\n",
        " = 5\n",
    ]


# ---------------------------------------------------------------------- blocks

DOCUMENTS = [[1, 2, 3], [4], [], [5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("paper", "blocks"),
    [
        ("2310.16834", [[1, 2, 3, 0, 4], [0, 0, 5, 6, 7]]),
        ("2406.07524", [[0, 1, 2, 3, 0], [0, 0, 4, 0, 0], [0, 0, 5, 6, 0], [0, 7, 8, 0, 0]]),
        ("2503.09573", [[0, 1, 2, 3, 0], [0, 4, 5, 6, 0]]),
        ("2506.10892", [[0, 1, 2, 3, 0], [0, 4, 5, 6, 0]]),
        ("2504.06416", [[1, 2, 3, 0, 4], [0, 0, 5, 6, 7]]),
    ],
)
def test_published_blocks_are_full_and_have_the_marks_of_their_program(
    paper: str, blocks: list[list[int]]
) -> None:
    program = PublishedProgram(
        paper, PROGRAMS[paper].has_end_marks, PROGRAMS[paper].has_block_marks
    )
    assert program.make_blocks(DOCUMENTS, 5, 0).tolist() == blocks
    with pytest.raises(ArgumentError, match="one block of 5 tokens needs"):
        program.make_blocks([[1]], 5, 0)


def test_published_blocks_leave_out_the_rest_of_every_group_and_part() -> None:
    """Ten documents of three tokens. A block has four, and every group loses its rest."""
    documents = [[number] * 3 for number in range(1, 11)]
    count = {}
    for settings in ((1000, 1), (4, 1), (1000, 3), (2, 3)):
        program = PublishedProgram(
            "x", False, False, documents_at_once=settings[0], processes=settings[1]
        )
        count[settings] = len(program.make_blocks(documents, 4, 0))
    # 30 tokens at once; groups of 12, 12 and 6 tokens; parts of 12, 9 and 9 tokens; parts of
    # 6 + 6, 6 + 3 and 6 + 3 tokens
    assert count == {(1000, 1): 7, (4, 1): 7, (1000, 3): 7, (2, 3): 4}
    single = PublishedProgram("x", False, False, documents_at_once=1, processes=99)
    with pytest.raises(ArgumentError, match="one block of 4 tokens needs 4 tokens"):
        single.make_blocks(documents, 4, 0)


# ---------------------------------------------------------------------- terms


def published_value(paper: str, table: torch.Tensor, ids: torch.Tensor, draws: int) -> Evaluation:
    program = PROGRAMS[paper]
    known = Known(processes()["masked"], constant(table))
    settings = {"length": ids.shape[1], "draws": draws, "batch": 256}
    times = FlatTimes(*program.information_window)
    return evaluate(
        PublishedTerms(known, program), full_rows(ids), np.arange(len(ids)), times=times, **settings
    )


@pytest.mark.parametrize("paper", PROGRAMS)
def test_published_value_of_independent_tokens_has_its_hand_computed_factor(paper: str) -> None:
    """For independent tokens with exact predictions, the program is a sum that needs no network.

    With H the entropy, t uniform in [0.001, 1] and m the probability of a mask, the program
    averages H m/t over t. For m = 0.999 t, that is 0.999 H, below the entropy. For m = t, it is H,
    times L/(L-1) if one token less counts. Tolerance: four standard errors.
    """
    length = 8
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(P, 64 * length, replacement=True, generator=generator)
    ids = ids.reshape(64, length)
    entropy = -float(P.log()[ids].mean())
    factor = length / (length - 1) if paper == "2504.06416" else 0.999
    found = published_value(paper, P, ids, draws=60)
    assert found.bound == "PUBLISHED"
    assert list(found.terms_nats_per_token) == ["diffusion"]
    error = found.standard_errors_nats_per_token["monte_carlo"]
    assert error is not None
    assert abs(found.nelbo_nats_per_token - factor * entropy) < 4 * error


def masked_nats(mask: float) -> float:
    """Expected nats per token of a pair, each token of which is masked with probability `mask`.

    A token with a masked partner costs 2 nats, and one with a clean partner 1 nat.
    """
    return mask * (2.0 * mask + 1.0 * (1.0 - mask))


class Integrand(Scored):
    """Objective with the expectation of the diffusion term of masked diffusion, without noise."""

    times = FlatTimes()

    def nll(
        self, batch: Batch, rng: CounterRng, slot: torch.Tensor, slots: torch.Tensor, times: Any
    ) -> Likelihood:
        drawn = times.draw(IdentityTime(), rng, slot, slots, batch.ids.shape[1])
        nats = drawn.speed * masked_nats(drawn.t) / drawn.t
        return Likelihood({"closing": torch.ones_like(nats), "diffusion": nats}, {})


def test_published_value_equals_the_integral_that_its_paper_computes() -> None:
    """Noise sigma(t) = -ln(1 - 0.999 t) and weight sigma'/(exp(sigma) - 1), for t from 0.001 to 1.

    The times of 4,000 rows are stratified, and both sums are within 1e-5 of the integrals. The
    bound itself, or a window that ends at 1, differs by 1e-3 or more.
    """
    kept = 0.999
    expected = 0.0
    for t in (1e-3 + kept * (np.arange(4000) + 0.5) / 4000).tolist():
        sigma = -math.log1p(-kept * t)
        weight = kept / (1.0 - kept * t) / math.expm1(sigma)
        expected += weight * masked_nats(1.0 - math.exp(-sigma)) / 4000
    program = PROGRAMS["2406.07524"]
    ids = torch.zeros(4000, 2, dtype=torch.long)
    found = evaluate(
        PublishedTerms(Integrand(), program),
        full_rows(ids),
        np.zeros(4000, np.int64),
        length=2,
        batch=4000,
        times=FlatTimes(*program.information_window, tokens=2**30),
    )
    assert found.nelbo_nats_per_token == pytest.approx(expected, abs=1e-5)
    assert abs(found.nelbo_nats_per_token - 1.5) > 1e-3


def test_published_program_leaves_an_exact_likelihood_unchanged() -> None:
    class Exact(Scored):
        def nll(self, batch: Batch, *_: object) -> Likelihood:
            return Likelihood({"nll": -P.log()[batch.ids] * batch.scored}, {})

    ids = torch.randint(0, 4, (6, 5), generator=torch.Generator().manual_seed(1))
    found = evaluate(
        PublishedTerms(Exact(), PROGRAMS["2406.07524"]),
        full_rows(ids),
        np.arange(6),
        length=5,
        times=FlatTimes(),
    )
    assert found.nelbo_nats_per_token == pytest.approx(-float(P.log()[ids].mean()), rel=1e-12)
