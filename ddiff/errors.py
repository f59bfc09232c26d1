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


TRACEBACK = "DDIFF_TRACEBACK"
"""The environment variable that shows where a mistake was found."""

REPORT = (
    "This is a defect of ddiff or of a plugin, not of your input. Please report it with the command, the recipe and the "
    "lines above."
)

_REMEDIES = {
    errno.EACCES: "Change its permissions, or name another place.",
    errno.EPERM: "Change its permissions, or name another place.",
    errno.EROFS: "Name a place that can be written.",
    errno.EISDIR: "A file is needed there: name one.",
    errno.ENOTDIR: "A folder is needed there: name one.",
    errno.ENOENT: "Check the path; relative paths start where ddiff runs.",
    errno.ENAMETOOLONG: "Shorten the name.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 4096.",
    errno.ENFILE: "The machine has too many open files: end something else first.",
    errno.ELOOP: "Symbolic links go in a circle there: mend them.",
    errno.ECONNREFUSED: "Check the address and the network.",
}

_OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "unable to allocate",
    "cannot allocate",
)
_OVERFLOW = (
    "storage size calculation overflowed",
    "overflow when unpacking long",
    "exceeds the maximum",
)


def explained(error: BaseException) -> str | None:
    """One paragraph for an exception that a user can cause; None for what must be a defect."""
    if isinstance(error, DdiffError):
        return str(error)
    full = no_room(error)
    if full is not None:
        return _of_the_system(full)
    if isinstance(error, OSError):
        return _of_the_system(error)
    what = shortened(" ".join(str(error).split()))
    if isinstance(error, EOFError):
        return f"A file or the standard input ended too early ({what or 'nothing more to read'}). Make it whole again."
    if isinstance(error, RecursionError):
        return "Something in the input is nested too deep to be read. Write it with fewer levels."
    if isinstance(error, UnicodeError):
        return f"A text is not in the encoding that was expected: {what}. Save it as UTF-8, and set PYTHONIOENCODING=utf-8."
    if _is_out_of_memory(error):
        return (
            f"The memory does not suffice: {what or 'an allocation was refused'}. Take a smaller batch ([train] batch, "
            "[evaluate] batch, [sample] batch), a shorter [data] length or a smaller network."
        )
    if isinstance(error, OverflowError) or _says(error, _OVERFLOW):
        return f"A number is too large to be computed with: {what}. Look for it among the sizes, counts and rates given."
    if isinstance(error, RuntimeError) and _says(error, ("can't start new thread",)):
        return "The system starts no more threads. Lower [backend] workers and OMP_NUM_THREADS, or raise ulimit -u."
    return None


def _of_the_system(error: OSError) -> str:
    reason = error.strerror or shortened(" ".join(str(error).split())) or type(error).__name__
    places = [
        shortened(str(name)) for name in (error.filename, error.filename2) if name is not None
    ]
    what = f"{reason}: {' and '.join(places)}" if places else reason
    if error.errno in FULL:
        return (
            f"{what}. What was being written is lost, nothing that stood before. Make room, or name another folder, and "
            "repeat the command: a run resumes from its last checkpoint."
        )
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{what.rstrip('.')}. {remedy}".rstrip()


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises a RuntimeError on the CPU, and a subclass of its own on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _says(error, _OUT_OF_MEMORY)


def _says(error: BaseException, texts: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError | ValueError | OverflowError) and any(
        text in str(error).lower() for text in texts
    )
