"""Judges of generated text: every token is scored once, and padding never counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ddiff.errors import ArgumentError, DataError, NonFiniteError
from ddiff.evaluation.generation import GenerativePerplexity, MeanFigure
from ddiff.evaluation.judge_model import TransformersJudge, plan_windows, score_windows

WORDS = {"<end>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "<unk>": 5}
ROWS = [[1, 2, 3, 4, 1, 2], [2], [], [3, 3, 0, 1], [4, 4, 4, 1, 2]]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=6, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    found = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(0, 0.5)  # so that different contexts give different predictions
    return found.eval().requires_grad_(False)


def make_judge(model: GPT2LMHeadModel, **options: Any) -> TransformersJudge:
    return TransformersJudge(model, make_tokenizer(eos_token="<end>"), "toy", **options)


def score_in_a_loop(model: GPT2LMHeadModel, row: list[int], context: list[int]) -> float:
    """Nats of a row: one evaluation of the network per token, without padding or windows."""
    nats = 0.0
    for number, token in enumerate(row):
        before = context + row[:number]
        if before:
            logits = model(torch.tensor([before])).logits[0, -1]
            nats -= float(logits.log_softmax(-1)[token])
    return nats


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_ragged_rows_score_as_in_a_plain_loop_for_any_batch(
    model: GPT2LMHeadModel, batch: int
) -> None:
    found = make_judge(model, batch=batch).score(ROWS)
    expected = [score_in_a_loop(model, row, [0]) for row in ROWS]
    # float32 logits of magnitude 1; a batch changes the order of sums
    assert found.nats == pytest.approx(expected, abs=1e-4)
    assert found.tokens.tolist() == [6, 1, 0, 4, 5]


def make_bigram_judge(batch: int, window: int, stride: int) -> TransformersJudge:
    """Build a judge that gives the token i + d (mod 6) after token i the probability p_d.

    p = (1/2, 1/4, 1/8, 1/16, 1/32, 1/32). The network has no layer: the last norm maps the one-hot
    embedding of token i to (e_i - 1/6) / s, and the head multiplies it by s log p. The part of 1/6
    is the same for all tokens, and cancels in the softmax.
    """
    config = GPT2Config(
        vocab_size=6, n_positions=8, n_embd=6, n_layer=0, n_head=1, layer_norm_epsilon=1e-12
    )
    config.tie_word_embeddings = False
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    probabilities = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 32])
    tokens = torch.arange(6)
    model.transformer.wte.weight.copy_(torch.eye(6))
    model.transformer.wpe.weight.zero_()
    scale = torch.eye(6)[0].std(unbiased=False)
    differences = (tokens[:, None] - tokens) % 6  # row: next token; column: token before it
    model.lm_head.weight.copy_(scale * probabilities.log()[differences])
    return make_judge(model, batch=batch, window=window, stride=stride)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 100])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (4, 2), (3, 1)])
def test_perplexity_under_a_bigram_judge_equals_the_value_by_hand(
    batch: int, window: int, stride: int
) -> None:
    """Seven ragged rows, one of them empty: 7 is divisible by none of the batches 2, 3 and 4.

    The end mark 0 precedes each row. The row 3 3 0 1 has the differences 3 0 3 1, and therefore
    4 + 1 + 4 + 2 bits.
    """
    rows = [*ROWS, [5], [1, 1]]
    bits = np.array([14, 3, 0, 11, 13, 5, 3])
    tokens = np.array([6, 1, 0, 4, 5, 1, 2])
    scores = make_bigram_judge(batch, window, stride).score(rows)
    np.testing.assert_array_equal(scores.tokens, tokens)
    # the judge computes in float32
    np.testing.assert_allclose(scores.nats, bits * np.log(2), rtol=1e-5)
    entropy = MeanFigure(1.0, None, 7)
    found = GenerativePerplexity.of(scores.nats, scores.tokens, entropy)
    assert found.corpus == pytest.approx(2 ** (49 / 19), rel=1e-5)
    each = [2 ** (14 / 6), 2**3, 2 ** (11 / 4), 2 ** (13 / 5), 2**5, 2**1.5]
    assert found.per_sample.value == pytest.approx(sum(each) / 6, rel=1e-5)
    assert found.tokens == 19
    assert found.unscored == 1


def test_tokenizer_without_marks_leaves_the_first_token_unscored(model: GPT2LMHeadModel) -> None:
    judge = TransformersJudge(model, make_tokenizer(), "toy")
    found = judge.score(ROWS)
    expected = [score_in_a_loop(model, row, []) for row in ROWS]
    assert found.nats == pytest.approx(expected, abs=1e-4)
    assert found.tokens.tolist() == [5, 0, 0, 3, 4]
    assert judge.protocol["first_token"] == "context"


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (4, 1), (4, 3), (5, 2), (8, 7), (8, 3)])
@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 9, 23])
def test_windows_score_every_position_once(window: int, stride: int, size: int) -> None:
    scored: list[int] = []
    for part in plan_windows(0, size, 1, window, stride):
        assert part.start < part.scored < part.stop <= part.start + window
        scored += range(part.scored, part.stop)
    assert scored == list(range(1, size))


def test_windowed_scores_equal_a_loop_over_windows(model: GPT2LMHeadModel) -> None:
    row = [1, 2, 3, 4, 1, 3, 2, 2, 4, 1, 1]
    found = make_judge(model, window=5, stride=2).score([row])
    full = [0, *row]
    nats = 0.0
    for j in range(1, len(full)):
        # windows [0,5), [2,7), ...: the first window that contains position j
        start = max(0, -(-(j - 4) // 2) * 2)
        logits = model(torch.tensor([full[start:j]])).logits[0, -1]
        nats -= float(logits.log_softmax(-1)[full[j]])
    assert found.nats == pytest.approx([nats], abs=1e-4)
    assert found.tokens.tolist() == [len(row)]


def test_documents_are_joined_by_the_end_mark_of_the_judge(model: GPT2LMHeadModel) -> None:
    assert make_judge(model).encode(["a b", "", "c"]) == [1, 2, 0, 0, 3]
    assert make_judge(model).encode(["a b", ""]) == [1, 2, 0]
    assert TransformersJudge(model, make_tokenizer(), "toy").encode(["a b", "c"]) == [1, 2, 3]


def test_features_are_the_last_hidden_states_of_the_last_tokens(model: GPT2LMHeadModel) -> None:
    found = make_judge(model, batch=2).features(ROWS)
    for number, row in enumerate(ROWS):
        output = model(torch.tensor([[0, *row]]), output_hidden_states=True)
        expected = output.hidden_states[-1][0, -1].detach().numpy()
        assert found[number] == pytest.approx(expected, abs=1e-4)


def test_judge_loads_from_a_directory_in_float32(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    make_tokenizer(eos_token="<end>").save_pretrained(tmp_path)
    judge = TransformersJudge.load(str(tmp_path))
    assert judge.score(ROWS).nats == pytest.approx(make_judge(model).score(ROWS).nats, abs=1e-4)
    assert judge.protocol["dtype"] == "float32"
    assert judge.protocol["window"] == 8


def test_judge_of_a_missing_or_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        TransformersJudge.load(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="no readable"):
        TransformersJudge.load(str(tmp_path))


def test_window_and_stride_out_of_range_are_refused(model: GPT2LMHeadModel) -> None:
    with pytest.raises(ArgumentError, match="window must be from 2 to 8"):
        make_judge(model, window=9)
    with pytest.raises(ArgumentError, match="stride must be from 1 to 3"):
        make_judge(model, window=4, stride=4)


def test_scores_that_are_not_finite_are_refused() -> None:
    windows = list(plan_windows(0, 3, 0, 4, 1))
    with pytest.raises(NonFiniteError, match="1 of 2 samples"):
        score_windows(windows, 2, 8, lambda part: np.full(len(part), np.inf))
