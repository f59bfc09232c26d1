"""Likelihood of the validation text, or of given texts, under the model of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from ddiff.core.times import FlatTimes
from ddiff.data.batch import Batch
from ddiff.data.conditions import Conditions
from ddiff.data.documents import Documents
from ddiff.data.packing import PackedRows, batch_rows, pack_texts
from ddiff.data.symbol_rows import fill_rows
from ddiff.data.text import check_text
from ddiff.data.tokenizer import Tokenizer
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, DdiffError
from ddiff.evaluation.baselines import Baselines, score_baselines
from ddiff.evaluation.compared_run import describe_rows
from ddiff.evaluation.likelihood import Evaluation, Scored, evaluate
from ddiff.evaluation.protocols import PublishedProgram, PublishedTerms
from ddiff.recipe.model import Recipe
from ddiff.run_dir.files import EVALUATION, read_json
from ddiff.runs.build import Model
from ddiff.runs.conditioning import SampleConditions
from ddiff.runs.data import RunData
from ddiff.runs.text_bytes import count_changed_texts

# Number of training tokens whose bigrams are counted. Counting sorts the bigrams; to sort a whole
# large corpus would take longer than the evaluation.
_COUNTED_TOKENS = 2**26
PROMPTS = "prompts"
"""Given part of conversations, in the protocol of an evaluation."""


def score_validation(
    model: Model,
    data: RunData,
    recipe: Recipe,
    console: Console | None = None,
    until: float | None = None,
    has_bytes: bool = True,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Compute the likelihood bound of the validation rows selected by the key [evaluate] rows.

    Args:
        model, data, recipe: model, data and recipe of the run.
        console: console for the progress bar.
        until: draws are added until the half width of the Monte-Carlo interval is at most this;
            None: no draws are added.
        has_bytes: whether the tokens determine all bytes of the text, as bits per byte need.
        ranks: processes that divide the batches; None: only this process.
    """
    found = score_rows(
        model,
        data.validation_rows,
        recipe,
        data.tokenizer,
        numbers=evaluated_rows(data, recipe),
        draws=recipe.evaluate.draws,
        conditions=data.validation_conditions,
        console=console,
        until=until,
        has_bytes=has_bytes,
        ranks=ranks,
    )
    if data.is_chat:
        return found.mark_given(PROMPTS)
    own = find_own_vectors(data)
    return found.mark_own_vectors(own) if own else found


def count_changed_documents(data: RunData, recipe: Recipe) -> int:
    """Return the number of validation documents that the tokenizer changes.

    Returns 0 without a count if bits per byte have no meaning, or if only tokens are stored. Raises
    DataError if the tokens claim another number of bytes than that of the documents.
    """
    rows = data.validation_rows
    texts = data.validation_texts
    if data.tokenizer.unit == "symbol" or texts is None or data.is_chat:
        return 0
    if len(evaluated_rows(data, recipe)) < len(rows):
        return 0
    return count_changed_texts(texts, rows, data.tokenizer)


def find_own_vectors(data: RunData) -> list[str]:
    """Return the conditions of the run that are vectors computed from the text itself."""
    if not isinstance(data.documents, Documents):
        return []
    return [
        name for name in data.documents.own_vectors if name in data.validation_conditions.values
    ]


def find_given_own_vectors(
    data: RunData, run_dir: Path, conditions: Mapping[str, Any]
) -> list[str]:
    """Return the given conditions that the run computes from the text itself.

    If the data set cannot be read, because the run was copied without it, the names of these
    conditions are read from evaluation.json.
    """
    try:
        documents = data.documents
        own = documents.own_vectors if isinstance(documents, Documents) else ()
    except DdiffError:
        recorded = read_json(run_dir / EVALUATION, allow_missing=True)
        own = recorded.get("protocol", {}).get("own_vectors", ())
    return [name for name in conditions if name in own]


def evaluated_rows(data: RunData, recipe: Recipe) -> NDArray[np.int64]:
    """Return the indices of the evaluated validation rows, evenly spaced over the text."""
    count = len(data.validation_rows)
    wanted = recipe.evaluate.rows
    if wanted is None or wanted >= count:
        return np.arange(count)
    # evenly spaced, since neighbouring rows often belong to the same document
    return np.arange(wanted) * count // wanted


def score_texts(
    model: Model,
    recipe: Recipe,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    draws: int,
    conditions: Mapping[str, Any],
) -> Evaluation:
    """Compute the likelihood bound of given texts, each of which is a separate document.

    `draws`: number of independent draws of noise times and noise per text. `conditions` maps the
    name of a condition to one value for all texts or to one value per text.
    """
    if isinstance(texts, str | bytes | dict) or not isinstance(texts, Iterable):
        raise ArgumentError(
            "run.nelbo: texts must be a list of str, one per document; "
            f"got {texts!r}. For one text, pass [text]."
        )
    texts = [check_text(text, f"run.nelbo: text {number}") for number, text in enumerate(texts)]
    parsed = SampleConditions.parse(model.denoiser, conditions, len(texts))
    texts = fill_rows(texts, tokenizer, recipe.length)
    rows = pack_texts(texts, tokenizer, recipe.length)
    changed = count_changed_texts(texts, rows, tokenizer) if tokenizer.unit == "token" else 0
    return score_rows(
        model,
        rows,
        recipe,
        tokenizer,
        numbers=np.arange(len(rows)),
        draws=draws,
        conditions=Conditions(parsed.values),
        has_bytes=changed == 0,
    )


def score_rows(
    model: Model,
    rows: PackedRows,
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    numbers: NDArray[np.int64],
    draws: int,
    conditions: Conditions,
    console: Console | None = None,
    until: float | None = None,
    published: PublishedProgram | None = None,
    has_bytes: bool = True,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Compute the likelihood bound of selected rows, with the settings of [evaluate].

    Args:
        model: denoiser with its process and objective.
        rows: rows from which `numbers` selects.
        recipe: recipe of the run.
        tokenizer: tokenizer of the rows.
        numbers: indices of the selected rows, an array [R].
        draws: number of independent draws of noise times and noise per row.
        conditions: conditions of the documents from which the rows were packed.
        console: console for the progress bar.
        until: draws are added until the half width of the Monte-Carlo interval is at most this;
            None: no draws are added.
        published: published program, whose terms and window replace ours.
        has_bytes: whether the tokens determine all bytes of the text, as bits per byte need.
        ranks: processes that divide the batches; None: only this process.
    """
    keys = recipe.evaluate
    objective: Scored = model.objective
    window = keys.window
    if published is not None:
        objective = PublishedTerms(objective, published)
        window = published.information_window
    # The bytes of symbols have no meaning, and the number of bytes in a subset of rows is unknown.
    has_bytes = has_bytes and tokenizer.unit == "token" and len(numbers) == len(rows)
    has_bytes = has_bytes and rows.marks is None
    # an objective without times computes the exact likelihood, so its time rule has no effect
    times = model.objective.times or FlatTimes()

    # the published programs of exact likelihoods score no first token
    has_context = published is not None and model.objective.times is None

    def batch_of(places: NDArray[np.int64]) -> Batch:
        batch = batch_rows(rows, numbers[places], conditions=conditions)
        if has_context:
            batch = batch.with_prefixes(torch.ones(len(places)))
        return batch.to(model.device)

    model.objective.module.eval()  # no dropout; the trainer switches back after a validation
    return evaluate(
        objective,
        batch_of,
        rows.first_documents()[numbers],
        length=recipe.length,
        times=times.with_window(*window, recipe.length),
        num_bytes=rows.tokens.num_bytes if has_bytes else None,
        draws=draws,
        until=until,
        batch=keys.batch,
        seed=keys.seed,
        unit=tokenizer.unit,
        device=model.device,
        console=console,
        ranks=ranks,
    )


def count_baselines(data: RunData, recipe: Recipe, num_tokens: int) -> Baselines:
    """Compute unigram and bigram baselines for the evaluated tokens from the training text."""
    return score_baselines(
        data.train_rows.stream(_COUNTED_TOKENS),
        data.validation_rows.stream(),
        num_tokens,
        data.validation_rows.tokens_in_rows(evaluated_rows(data, recipe)),
    )


def evaluation_protocol(data: RunData, recipe: Recipe) -> dict[str, Any]:
    """Return the settings that must be equal in two evaluations that are compared."""
    rows = data.validation_rows
    read = len(evaluated_rows(data, recipe))
    fingerprint = describe_rows(rows.fingerprint, read, len(rows))
    protocol = {
        "window": list(recipe.evaluate.window),
        "tokenizer": data.tokenizer.fingerprint,
        "data": fingerprint,
        "conditions": sorted(data.validation_conditions.values),
    }
    if own := find_own_vectors(data):
        protocol["own_vectors"] = own
    if data.is_chat:
        protocol["given"] = PROMPTS
    return protocol
