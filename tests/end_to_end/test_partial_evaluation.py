"""`[evaluate] rows`: evaluation and baselines on a subset of the validation rows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from small import RECIPE

from ddiff.data.packing import batch_rows
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.run import Run
from ddiff.runs.session import TrainingSession

# a single validation document with many rows
LONG = 'data={kind="text", files=["corpus.txt"], validation=["held_out.txt"], length=8}'


def built(*settings: str) -> Run:
    session = TrainingSession.open(parse_recipe(RECIPE, "small.toml", [LONG, *settings]))
    session.initialize_weights()
    return session.run


@pytest.fixture(autouse=True)
def place(folder: Path) -> None:
    """Write a corpus with one validation document."""
    Path("held_out.txt").write_text(Path("corpus.txt").read_text().replace("cat", "dog"))


def test_evaluation_on_some_rows_and_its_baselines_score_the_same_rows() -> None:
    run = built("evaluate.rows=7")
    rows, (found, counted) = run.data.validation_rows, run.evaluate()
    chosen = np.arange(7) * len(rows) // 7
    assert len(rows) > 14  # evaluated rows are not neighbours
    read = batch_rows(rows, chosen)
    assert found.tokens == int(read.scored.sum())
    assert found.bits_per_byte is None
    train, _ = run.data.train_rows.stream()
    counts = np.bincount(train, minlength=run.vocabulary.num_tokens) + 1.0
    expected = -np.log(counts / counts.sum())[read.ids[read.valid].numpy()].mean()
    assert math.isclose(counted.unigram_nats_per_token, expected, rel_tol=1e-12)


def test_bound_of_untrained_model_equals_unigram_baseline() -> None:
    """An untrained model predicts the unigram distribution in any context.

    The tolerance is 2 %, because the number of masked tokens per row is random.
    """
    found, counted = built("evaluate.rows=12", "evaluate.draws=400").evaluate()
    assert found.nelbo_nats_per_token == pytest.approx(counted.unigram_nats_per_token, rel=0.02)


def test_evaluate_key_rows_above_the_row_count_scores_all_rows() -> None:
    whole, limited = built().evaluate(), built("evaluate.rows=10000").evaluate()
    assert limited == whole
    assert whole[0].bits_per_byte is not None


def test_recorded_evaluation_settings_state_the_evaluated_rows() -> None:
    assert built().protocol()["data"] != built("evaluate.rows=7").protocol()["data"]
    assert built().protocol() == built("evaluate.rows=10000").protocol()
