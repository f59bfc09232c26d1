"""Weights of another run, or a model's embeddings, before the first step: `[train] init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.checkpoint.weight_transfer import Source, carried
from ddiff.clustering.files import load_model_embeddings
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.tokenizer import Tokenizer, load_tokenizer
from ddiff.errors import ArgumentError, CheckpointError, DataError
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.embedding import StateEmbedding
from ddiff.recipe.resolve import read_recipe
from ddiff.recipe.schema import InitKeys
from ddiff.run_dir.files import CHECKPOINTS, RECIPE, TOKENIZER, VOCABULARY
from ddiff.run_dir.identity import check_fingerprints, check_recorded
from ddiff.runs.build import build_head


def check_source(run_dir: str) -> Path:
    """The directory that [train] init names; CheckpointError when it is no trained run."""
    directory = Path(run_dir)
    if not (directory / RECIPE).is_file() or not Checkpoints(str(directory / CHECKPOINTS)).steps():
        raise CheckpointError(
            f"[train] init: {run_dir} is not a trained run: it has no {RECIPE} or no complete checkpoint. Name a directory "
            "that `ddiff run` has trained, relative to where ddiff runs."
        )
    return directory


def load_initial_weights(
    denoiser: Denoiser, tokenizer: Tokenizer, init: InitKeys
) -> dict[str, Any]:
    """Load what [train] init asks for into the denoiser; what was taken, for the record."""
    if init.run is None:
        return start_from_model(denoiser, tokenizer, str(init.model))
    return start_from_run(denoiser, tokenizer, init.run, init.parts)


def start_from_model(denoiser: Denoiser, tokenizer: Tokenizer, source: str) -> dict[str, Any]:
    """The words' rows of the state embeddings from a model of the transformers library, the nodes from their words."""
    tables = [part for part in denoiser.backbone.modules() if isinstance(part, StateEmbedding)]
    words = torch.from_numpy(load_model_embeddings(source, tokenizer.num_tokens))
    if len(tables) != 1 or tables[0].embedding_dim != words.shape[1]:
        own = ", ".join(str(table.embedding_dim) for table in tables) or "no embeddings of states"
        raise ArgumentError(
            f"[train] init: {source} has embeddings of width {words.shape[1]}, and the network of this run has {own}. Take "
            "a model as wide as [denoiser], or leave init out."
        )
    tables[0].start_from_words(words)
    return {"model": source, "parts": "embeddings", "tokenizer": tokenizer.fingerprint}


def start_from_run(
    denoiser: Denoiser, tokenizer: Tokenizer, run_dir: str, parts: Any
) -> dict[str, Any]:
    """Another run's weights, all or the embeddings of states."""
    directory = check_source(run_dir)
    newest = Checkpoints(str(directory / CHECKPOINTS)).newest()
    assert newest is not None
    check_recorded(directory, newest.state)
    theirs = load_tokenizer(str(directory / TOKENIZER)).fingerprint
    if theirs != tokenizer.fingerprint:
        raise DataError(
            f"[train] init: {run_dir} has another tokenizer ({theirs}) than this run ({tokenizer.fingerprint}): its words "
            "are not these words. Use the same [tokenizer] on the same [data]."
        )
    recipe = read_recipe(directory / RECIPE)
    vocabulary = Vocabulary.load(str(directory / VOCABULARY))
    kept = {"tokenizer": theirs, "vocabulary": vocabulary.fingerprint}
    check_fingerprints(
        directory, newest.state, kept, f"Restore the files of {directory} from a copy.", kept
    )
    weights = newest.weights()
    width = weights["head.table"].shape[-1] if "head.table" in weights else denoiser.head.width
    source = Source(run_dir, weights, vocabulary, build_head(recipe, vocabulary, width))
    taken = carried(denoiser, source, parts)
    denoiser.load_state_dict(taken.weights)
    return {
        "run": run_dir,
        "parts": parts,
        "step": newest.step,
        "tokenizer": theirs,
        "vocabulary": vocabulary.fingerprint,
        "recipe": recipe.fingerprint,
        "whole": taken.whole,
        "by_word": taken.by_word,
        "anew": taken.anew,
    }
