"""Errors that a user can cause. Each message names the argument, what was expected, what came and what to do.

The command line prints them as one paragraph and exits with 2; anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from difflib import get_close_matches

FULL = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)  # no space left, no quota left, larger than files may be
_FULL_IN_WORDS = ("No space left on device", "Disk quota exceeded")


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


def no_room(error: BaseException) -> OSError | None:
    """The error of a full disk or quota among an error and its causes, where libraries hide its number; else None."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return OSError(seen.errno, os.strerror(seen.errno), seen.filename)
        words = next(
            (words for words in _FULL_IN_WORDS if words.lower() in str(seen).lower()), None
        )
        # numpy's tofile says how much it wrote, and nothing else
        short = isinstance(seen, OSError) and seen.errno is None and str(seen).endswith(" written")
        if words or short:
            return OSError(errno.ENOSPC, words or "No space left on device")
        seen = seen.__cause__ or seen.__context__
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest known name, or an empty string."""
    if len(name) > LONGEST:
        return ""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""
