"""Dry run: reject a recipe that cannot run, before any data is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ddiff.errors import ArgumentError, explain_error
from ddiff.recipe.model import BaseRecipe
from ddiff.runs.backends import check_backend
from ddiff.runs.build import NO_OVERRIDES
from ddiff.runs.directory import check_directory
from ddiff.runs.kinds import find_kind


def rehearse(recipe: BaseRecipe, *, fresh: bool = False) -> str:
    """Check a recipe without reading the data. Return one line, `fits: 2.1 M parameters, ...`.

    The checks cover the run directory, the existence of input files, the device and the memory. If
    the recipe determines the number of tokens, the model is also built on the meta device, with a
    placeholder vocabulary of the same shape. `fresh`: whether the run would delete an existing run.
    Raises a DdiffError if a check fails.
    """
    check_directory(recipe, NO_OVERRIDES, fresh, warn=True)
    device = check_backend(recipe)
    _check_files(recipe)
    return find_kind(recipe).rehearse(recipe, device)


def _check_files(recipe: BaseRecipe) -> None:
    """Raise DataError for a path or glob pattern that matches no file."""
    for component in recipe.components().values():
        patterns = component.input_paths()
        if patterns:
            from ddiff.data.paths import find_files  # slow to import; few recipes need it

            with _name_table(component.table), component.prefix_errors():
                for pattern in patterns:
                    find_files(pattern)


@contextmanager
def _name_table(table: str) -> Iterator[None]:
    """Convert an OSError to an ArgumentError whose message begins with the table's name."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(f"{table}: {explain_error(error)}") from error
