"""Vocabularies, heads and the backbone of ddiff pass every conformance check that applies."""

from __future__ import annotations

import pytest
import torch
from chains import FOUR, PAIR, SINGLE, THREE

from ddiff.core.clock import LogTimeClock
from ddiff.core.prediction import DenseDistribution
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, Vocabulary
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.heads import TokenHead, TreeHead
from ddiff.testing import (
    assert_laws,
    check_clean_distribution,
    check_denoiser,
    check_head,
    check_vocabulary,
)
from ddiff.testing.probes import random_log_probs

VOCABULARIES = {
    "no mask": FlatVocabulary(3, mask=False),
    "one level": FlatVocabulary(4),
    "two levels": PAIR,
    "one node below the root": SINGLE,
    "three levels": THREE,
    "four levels": FOUR,
}


@pytest.fixture(params=VOCABULARIES.values(), ids=VOCABULARIES.keys())
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return request.param


def test_vocabularies_pass_every_conformance_check(vocabulary: Vocabulary) -> None:
    assert_laws(check_vocabulary(vocabulary))


def test_dense_clean_distributions_pass_every_conformance_check(vocabulary: Vocabulary) -> None:
    assert_laws(
        check_clean_distribution(
            DenseDistribution(random_log_probs(vocabulary.num_tokens), vocabulary)
        )
    )


@pytest.mark.parametrize("kind", ["tokens", "tied", "levelwise"])
def test_heads_pass_every_conformance_check(kind: str, vocabulary: Vocabulary) -> None:
    if kind == "tokens":
        head = TokenHead(vocabulary, 5)
    else:
        head = TreeHead(vocabulary, 5, kind)  # type: ignore[arg-type]
    assert_laws(check_head(head))


@pytest.mark.parametrize("given", ["rest", "all"])
@pytest.mark.parametrize("xi", [1.0, 0.8])
def test_transformer_denoiser_passes_every_conformance_check(given: str, xi: float) -> None:
    from ddiff_dit.dit import DiT

    torch.manual_seed(0)
    backbone = DiT(PAIR, width=16, layers=2, heads=2)
    denoiser = Denoiser(backbone, TreeHead(PAIR, 16, "levelwise"), given)  # type: ignore[arg-type]
    assert_laws(check_denoiser(denoiser, TreeProcess(PAIR, LogTimeClock((1.0, 1.0)), xi)))
