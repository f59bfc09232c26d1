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


LONGEST = 160  # characters of a value that a message repeats


def shortened(text: str, longest: int = LONGEST) -> str:
    """`text`, or its beginning and end around the number of characters that are left out."""
    if len(text) <= longest:
        return text
    kept = longest // 2
    return f"{text[:kept]} ... ({len(text) - 2 * kept} more characters) ... {text[-kept:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest known name, or an empty string."""
    if len(name) > LONGEST:
        return ""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
