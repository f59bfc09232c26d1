"""Errors that a user can cause. Each message names the argument, what was expected, what came and what to do.

The command line prints them as one paragraph and exits with 2; anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DdiffError(Exception):
    """A mistake that the caller can mend."""


class ArgumentError(DdiffError, ValueError):
    """An argument of a Python call is out of range, of the wrong shape or does not fit another one."""


class RecipeError(DdiffError):
    """A recipe is wrong; the message begins with `file:line:`."""


class PluginError(DdiffError):
    """A plugin or component is unknown, claimed twice, or does not load."""


class DataError(DdiffError):
    """A text, corpus, tokenizer or cluster file cannot be used as it is."""


class CheckpointError(DdiffError):
    """A checkpoint or run directory is truncated, missing or belongs to something else."""


class NonFiniteError(DdiffError):
    """NaN or infinity where a number is due."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest known name, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
