"""`ddiff run --dry-run`: refuse what is known to fail before any data is read, in two seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddiff.errors import ArgumentError, explain_error
from ddiff.recipe.model import Recipe
from ddiff.runs.build import (
    Overrides,
    build_objective,
    build_process,
    check_backend,
    check_sampling,
    outlined,
)
from ddiff.runs.directory import check_directory, print_foreign
from ddiff.runs.memory import check_memory


def rehearse(recipe: Recipe, *, fresh: bool = False) -> str:
    """Refuse what can be known to fail before any data is read; the verdict, `fits: 2.1 M parameters, ...`.

    Checked are the run directory, the files that are named, the device, the memory; and where the recipe tells how many
    tokens there are, the parts that stand on a vocabulary, built on one of the same shape.
    """
    check_directory(Path(recipe.run_dir), recipe, Overrides(), fresh)
    print_foreign(Path(recipe.run_dir), recipe)
    check_backend(recipe)
    check_memory(recipe, None)
    _check_files(recipe)
    recipe.data.preview(length=recipe.length)
    vocabulary = recipe.vocabulary.preview(num_tokens=recipe.tokenizer.preview())
    if (init := recipe.train.init) is not None and init.run is not None:
        from ddiff.runs.initial_weights import check_source

        with _told_of("[train] init"):
            check_source(init.run)
    if vocabulary is None:
        return check_memory(recipe, None)
    process = build_process(recipe, vocabulary)
    denoiser = outlined(recipe, vocabulary)
    verdict = check_memory(recipe, denoiser)
    objective = build_objective(recipe, process, denoiser)
    check_sampling(recipe, vocabulary, process, getattr(objective, "denoiser", denoiser), objective)
    return verdict


def _check_files(recipe: Recipe) -> None:
    """Raises DataError for a path or glob that finds no file."""
    for part in recipe.components().values():
        patterns = part.input_paths()
        if patterns:
            from ddiff.data.paths import find_files

            with part.prefix_errors(), _told_of(part.table):
                for pattern in patterns:
                    find_files(pattern)


@contextmanager
def _told_of(table: str) -> Iterator[None]:
    """Errors of the file system are told with the table that names the file."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(f"{table}: {explain_error(error)}") from error
