"""Initial weights from counts of the text, another run, or a pretrained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddiff.checkpoint.checkpoints import Checkpoint, Checkpoints
from ddiff.checkpoint.weight_transfer import (
    Parts,
    TrainedWeights,
    start_from_output,
    transfer_weights,
)
from ddiff.clustering.cooccurrence import compute_cooccurrence_embeddings
from ddiff.clustering.files import load_model_embeddings
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.packing import Rows
from ddiff.data.tokenizer import Tokenizer
from ddiff.errors import ArgumentError, CheckpointError, DataError, explain_error
from ddiff.nn.adapters import remove_adapters
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.embedding import StateEmbedding
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.recipe.keys import InitKeys
from ddiff.recipe.model import Recipe
from ddiff.recipe.resolve import read_recipe
from ddiff.run_dir.files import CHECKPOINTS, RECIPE, TOKENIZER, VOCABULARY, RunRecord
from ddiff.run_dir.identity import check_fingerprints, check_recorded
from ddiff.runs.saved_tokenizer import load_saved_tokenizer
from ddiff.runs.trainable import evaluates_ema

COUNTED_TOKENS = 2**24  # tokens of the training text whose co-occurrences are counted


def load_initial_weights(
    denoiser: Denoiser, tokenizer: Tokenizer, init: InitKeys
) -> dict[str, Any]:
    """Load the weights that [train] init selects into `denoiser`.

    Returns a record of the source of the weights, for environment.json.
    """
    if init.run is None:
        return load_model_weights(denoiser, tokenizer, str(init.model))
    return load_run_weights(denoiser, tokenizer, init.run, init.parts)


def load_base(denoiser: Denoiser, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Load the frozen weights of a denoiser with adapters.

    They are the weights with which the run in [train] init is evaluated (the exponential moving
    average, if it has one), or those of the pretrained backbone. Raises ArgumentError if the recipe
    names neither. Also raises it if the head of the run has other rows and the head of `denoiser`
    is frozen, which would then keep its initial values.
    """
    init = recipe.train.init
    run_dir = None if init is None else init.run
    if run_dir is None and not denoiser.backbone.is_pretrained:
        raise ArgumentError(
            "[denoiser] lora: adapters need trained weights, which stay frozen; got none. Set "
            '[train] init = { run = "DIR" }, or use a pretrained backbone ([denoiser] kind = "hf" '
            "with path)."
        )
    with remove_adapters(denoiser):
        start_pretrained_head(denoiser)
        if run_dir is None:
            return
        record = load_run_weights(denoiser, tokenizer, run_dir, "all", evaluated=True)
    assert denoiser.adapters is not None, "only for a denoiser with adapters"
    # The run gives all frozen tensors, except those of a head with other rows.
    denoiser.adapters.has_new_head = not _has_head(record)
    if denoiser.adapters.has_new_head and not denoiser.head.table.requires_grad:
        raise ArgumentError(
            f"[denoiser] lora: the head of {run_dir} has other rows than that of this run, so that "
            "the frozen head would have no trained weights. Use the [denoiser] head and the "
            '[vocabulary] of that run, or train the head whole: lora.full = ["head"].'
        )


def _has_head(record: Mapping[str, Any]) -> bool:
    """Return whether the weights of another run contain the head. `record`: their record."""
    return "head.table" in (*record["whole"], *record["by_word"])


def explain_base(recipe: Recipe) -> str:
    """Return sentences about the place of the base of trained adapters, and a way to need none."""
    init = recipe.train.init
    if init is not None and init.run is not None:
        place = f"the run {init.run} ([train] init), here {Path(init.run).resolve()}"
    else:
        place = f"the pretrained model {recipe.denoiser.to_dict().get('path')} ([denoiser] path)"
    return (
        f"The base of the adapters in {recipe.run_dir} is expected in {place}. Restore it there. "
        f"With its base, `ddiff export {recipe.run_dir} DIR --merged` writes a run that needs no "
        "base."
    )


def start_pretrained_head(denoiser: Denoiser) -> None:
    """Start the head with the output matrix of a pretrained backbone, if it has one."""
    output = denoiser.backbone.pretrained_output()
    if output is not None:
        start_from_output(denoiser.head, output)


def check_source(run_dir: str) -> Path:
    """Return the directory of a trained run. Raises CheckpointError for any other directory."""
    directory = Path(run_dir)
    try:
        has_recipe = (directory / RECIPE).is_file()
        is_trained = has_recipe and bool(Checkpoints(str(directory / CHECKPOINTS)).steps())
    except OSError as error:
        raise ArgumentError(f"[train] init: {explain_error(error)}") from error
    if not is_trained:
        raise CheckpointError(
            f"[train] init: {run_dir} is not a trained run: it has no {RECIPE} or no complete "
            "checkpoint. Give the directory of a finished `ddiff run`; a relative path starts at "
            "the working directory."
        )
    return directory


def load_model_weights(denoiser: Denoiser, tokenizer: Tokenizer, source: str) -> dict[str, Any]:
    """Load token embeddings from a model of the transformers library, for [train] init.

    `source`: local folder or hub name of the model. The initial embedding of a cluster of tokens (a
    tree node) is the mean of the embeddings of its tokens.
    """
    tables = _find_tables(denoiser)
    embeddings = torch.from_numpy(load_model_embeddings(source, tokenizer.num_tokens))
    if len(tables) != 1 or tables[0].embedding_dim != embeddings.shape[1]:
        widths = [str(table.embedding_dim) for table in tables]
        raise ArgumentError(
            f"[train] init: {source} has embeddings of width {embeddings.shape[1]}, but the "
            f"network of this run has {', '.join(widths) or 'no state embeddings'}. Choose a model "
            "with the width of [denoiser], or remove init."
        )
    tables[0].start_from_tokens(embeddings)
    return {"model": source, "parts": "embeddings", "tokenizer": tokenizer.fingerprint}


def start_from_cooccurrence(denoiser: Denoiser, rows: Rows) -> None:
    """Set the token embeddings to co-occurrence embeddings of the training rows, for [train].

    The embedding of a token is scaled to norm 1, the expected norm of a random embedding. Tokens
    that do not occur in the rows keep their random embeddings. The initial embedding of a tree node
    is the mean of the embeddings of its tokens.
    """
    tables = _find_tables(denoiser)
    if len(tables) != 1:
        raise ArgumentError(
            '[train] embeddings = "cooccurrence" needs a network with one table of state '
            f"embeddings; the network of this run has {len(tables)}. "
            'Set [train] embeddings = "random".'
        )
    (table,) = tables
    num_tokens = table.vocabulary.num_tokens
    ids, document = rows.stream(COUNTED_TOKENS)
    counted = compute_cooccurrence_embeddings(ids, document, num_tokens, width=table.embedding_dim)
    embeddings = torch.from_numpy(counted).to(table.weight.device)
    norm = embeddings.norm(dim=1, keepdim=True)
    random = table.weight.detach()[:num_tokens].to(embeddings.dtype)
    occurs = norm > 0.0
    table.start_from_tokens(torch.where(occurs, embeddings / norm, random))


def _find_tables(denoiser: Denoiser) -> list[StateEmbedding]:
    """Return the tables of state embeddings; with several, the table of the tokens is ambiguous."""
    return [part for part in denoiser.backbone.modules() if isinstance(part, StateEmbedding)]


def load_run_weights(
    denoiser: Denoiser,
    tokenizer: Tokenizer,
    run_dir: str,
    parts: Parts,
    *,
    evaluated: bool = False,
) -> dict[str, Any]:
    """Load the weights of another run with the same tokenizer, for [train] init.

    Args:
        denoiser: denoiser that gets the weights.
        tokenizer: tokenizer of this run.
        run_dir: directory of the other run.
        parts: "all" for all weights, "embeddings" for only the embeddings of tokens, tree nodes
            and mask.
        evaluated: load the weights with which the run is evaluated, which may be their moving
            average. Otherwise the trained weights are loaded.

    Raises DataError if the tokenizers differ.
    """
    directory = check_source(run_dir)
    newest = Checkpoints(str(directory / CHECKPOINTS)).newest()
    assert newest is not None  # `check_source` refuses a run without one
    check_recorded(RunRecord.read(directory), newest.state)
    recipe = require_text_recipe(read_recipe(directory / RECIPE), "[train] init")
    if recipe.denoiser_keys.lora is not None:
        raise ArgumentError(
            f"[train] init: {run_dir} holds LoRA adapters without their base. Merge them first: "
            f"`ddiff export {run_dir} DIR --merged`, and name DIR."
        )
    saved = load_saved_tokenizer(recipe.tokenizer, str(directory / TOKENIZER))
    theirs = saved.fingerprint
    if theirs != tokenizer.fingerprint:
        raise DataError(
            f"[train] init: both runs must have the same tokenizer; got {theirs} in {run_dir} and "
            f"{tokenizer.fingerprint} in this run. Use the same [tokenizer] on the same [data]."
        )
    vocabulary = Vocabulary.load(str(directory / VOCABULARY))
    _check_components(directory, newest, theirs, vocabulary)
    weights = newest.read_weights(average=evaluated and evaluates_ema(recipe))
    # The head of the other run maps the rows of its table to states. The head is built with the
    # width of that table, which may differ from the width of this run.
    width = denoiser.head.width
    if "head.table" in weights:
        width = weights["head.table"].shape[-1]
    assert recipe.head is not None
    head = recipe.head.build(vocabulary=vocabulary, width=width)
    source = TrainedWeights(run_dir, weights, vocabulary, head)
    taken = transfer_weights(denoiser, source, parts)
    denoiser.load_state_dict(taken.weights)
    return {
        "run": run_dir,
        "parts": parts,
        "step": newest.step,
        "tokenizer": theirs,
        "vocabulary": vocabulary.fingerprint,
        "recipe": recipe.fingerprint,
        "whole": taken.whole,
        "by_word": taken.by_token,
        "anew": taken.fresh,
    }


def _check_components(
    directory: Path, newest: Checkpoint, tokenizer: str, vocabulary: Vocabulary
) -> None:
    """Raise CheckpointError if the checkpoint records another tokenizer or vocabulary."""
    found = {"tokenizer": tokenizer, "vocabulary": vocabulary.fingerprint}
    remedy = f"Restore the files of {directory} from a copy."
    check_fingerprints(directory, newest.state, found, remedy, found)
