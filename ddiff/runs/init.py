"""Weights of another run before the first step: `[train] init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddiff.core.vocabulary import Vocabulary
from ddiff.data.tokenizer import Tokenizer, load_tokenizer
from ddiff.errors import CheckpointError, DataError
from ddiff.nn.denoiser import Denoiser
from ddiff.recipe import read_recipe
from ddiff.runs.directory import RECIPE, TOKENIZER, VOCABULARY
from ddiff.training.carry import Source, carried
from ddiff.training.checkpoint import Checkpoints


def check_source(run_dir: str) -> Path:
    """The directory that [train] init names; CheckpointError when it is no trained run."""
    directory = Path(run_dir)
    if not (directory / RECIPE).is_file() or not Checkpoints(str(directory / "checkpoints")).steps():
        raise CheckpointError(
            f"[train] init: {run_dir} is not a trained run: it has no {RECIPE} or no complete checkpoint. Name a directory "
            "that `ddiff run` has trained, relative to where ddiff runs."
        )
    return directory


def start_from_run(denoiser: Denoiser, tokenizer: Tokenizer, run_dir: str, parts: Any) -> dict[str, Any]:
    """Load what [train] init asks for into the denoiser; what was taken, for the record."""
    directory = check_source(run_dir)
    theirs = load_tokenizer(str(directory / TOKENIZER)).fingerprint
    if theirs != tokenizer.fingerprint:
        raise DataError(
            f"[train] init: {run_dir} has another tokenizer ({theirs}) than this run ({tokenizer.fingerprint}): its words "
            "are not these words. Use the same [tokenizer] on the same [data]."
        )
    checkpoints, recipe = Checkpoints(str(directory / "checkpoints")), read_recipe(directory / RECIPE)
    vocabulary = Vocabulary.load(str(directory / VOCABULARY))
    weights = checkpoints.weights()
    assert recipe.head is not None
    width = weights["head.table"].shape[-1] if "head.table" in weights else denoiser.head.width
    source = Source(run_dir, weights, vocabulary, recipe.head.build(vocabulary=vocabulary, width=width))
    taken = carried(denoiser, source, parts)
    denoiser.load_state_dict(taken.weights)
    return {
        "run": run_dir,
        "parts": parts,
        "step": checkpoints.steps()[-1],
        "tokenizer": theirs,
        "vocabulary": vocabulary.fingerprint,
        "recipe": recipe.fingerprint,
        "whole": taken.whole,
        "by_word": taken.by_word,
        "anew": taken.anew,
    }
