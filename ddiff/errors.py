"""Errors that a user can cause, and their explanation on the command line.

Each message names the argument, what was expected, what came and what to do. The command line
prints it and exits with 2. Any other exception is a defect, and its traceback is printed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from difflib import get_close_matches

# ---------------------------------------------------------------------- exceptions


class DdiffError(Exception):
    """A mistake that the caller can fix."""


class ArgumentError(DdiffError, ValueError):
    """An argument of a Python call is out of range, has the wrong shape or contradicts another."""


class RecipeError(DdiffError):
    """A recipe is wrong; the message begins with `file:line:`."""


class PluginError(DdiffError):
    """A plugin or component is unknown, claimed twice, or does not load."""


class DataError(DdiffError):
    """A text, corpus, tokenizer or cluster file cannot be used as it is."""


class CheckpointError(DdiffError):
    """A checkpoint or run directory is truncated, missing or belongs to another run."""


class NonFiniteError(DdiffError):
    """A result is NaN or infinite."""


# ---------------------------------------------------------------------- parts of messages

LONGEST = 160  # characters of a value that a message repeats


def shorten(text: str, longest: int = LONGEST) -> str:
    """Replace the middle of a long text by its number of characters."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} more characters) ... {text[-half:]}"


def suggest(name: str, known: Iterable[str]) -> str:
    """Format ` Did you mean "x"?` for the most similar known name; empty if none is similar."""
    if len(name) > LONGEST:
        return ""
    similar = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{similar[0]}"?' if similar else ""


# ---------------------------------------------------------------------- full disks

DISK_FULL = (
    errno.ENOSPC,  # no space left
    errno.EDQUOT,  # no quota left
    errno.EFBIG,  # larger than a file may be
)
_DISK_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")


def find_disk_full(error: BaseException) -> OSError | None:
    """Find a full disk or quota among an error and its causes; None if there is none.

    Libraries raise other errors without the error number, so the text is searched as well.
    """
    current: BaseException | None = error
    while current is not None:
        number = current.errno if isinstance(current, OSError) else None
        if isinstance(current, OSError) and number in DISK_FULL:
            return OSError(number, os.strerror(number), current.filename)
        for text in _DISK_FULL_TEXTS:
            if text.lower() in str(current).lower():
                return OSError(errno.ENOSPC, text)
        # numpy's tofile has neither number nor text: it only says how much it wrote
        is_short_write = isinstance(current, OSError) and str(current).endswith(" written")
        if is_short_write and number is None:
            return OSError(errno.ENOSPC, "No space left on device")
        current = current.__cause__ or current.__context__
    return None


# ---------------------------------------------------------------------- paragraphs for the user

TRACEBACK = "DDIFF_TRACEBACK"
"""Environment variable that prints the traceback of a mistake as well."""

REPORT = (
    "This is a defect of ddiff or of a plugin, not of your input. Please report it with the "
    "command, the recipe and the lines above."
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
    errno.ELOOP: "Symbolic links form a circle there: fix them.",
    errno.ECONNREFUSED: "Check the address and the network.",
}

_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "unable to allocate",
    "cannot allocate",
)
_OVERFLOW_TEXTS = (
    "storage size calculation overflowed",
    "overflow when unpacking long",
    "exceeds the maximum",
)
_NO_THREADS_TEXTS = ("can't start new thread",)


def explain_error(error: BaseException) -> str | None:
    """Write one paragraph for an exception that a user can cause; None for a defect."""
    if isinstance(error, DdiffError):
        return str(error)
    disk_full = find_disk_full(error)
    if disk_full is not None:
        return _explain_os_error(disk_full)
    if isinstance(error, OSError):
        return _explain_os_error(error)
    text = shorten(" ".join(str(error).split()))
    if isinstance(error, EOFError):
        return (
            f"A file or the standard input ended too early ({text or 'nothing more to read'}). "
            "Make it whole again."
        )
    if isinstance(error, RecursionError):
        return "Something in the input is nested too deep to be read. Write it with fewer levels."
    if isinstance(error, UnicodeError):
        return (
            f"A text is not in the encoding that was expected: {text}. Save it as UTF-8, and set "
            "PYTHONIOENCODING=utf-8."
        )
    if _is_out_of_memory(error):
        return (
            f"The memory does not suffice: {text or 'an allocation was refused'}. Take a smaller "
            "batch ([train] batch, [evaluate] batch, [sample] batch), a shorter [data] length or a "
            "smaller network."
        )
    if isinstance(error, OverflowError) or _contains(error, _OVERFLOW_TEXTS):
        return (
            f"A number is too large to be computed with: {text}. Look for it among the sizes, "
            "counts and rates given."
        )
    if isinstance(error, RuntimeError) and _contains(error, _NO_THREADS_TEXTS):
        return (
            "The system starts no more threads. Lower [backend] workers and OMP_NUM_THREADS, or "
            "raise ulimit -u."
        )
    return None


def _explain_os_error(error: OSError) -> str:
    reason = error.strerror or shorten(" ".join(str(error).split())) or type(error).__name__
    names = [name for name in (error.filename, error.filename2) if name is not None]
    places = " and ".join(shorten(str(name)) for name in names)
    what = f"{reason}: {places}" if places else reason
    if error.errno in DISK_FULL:
        return (
            f"{what}. What was being written is lost, nothing that was there before. Make room, or "
            "name another folder, and repeat the command: a run resumes from its last checkpoint."
        )
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{what.rstrip('.')}. {remedy}".rstrip()


def _is_out_of_memory(error: BaseException) -> bool:
    # torch raises a plain RuntimeError on the CPU and OutOfMemoryError on a GPU; torch is not
    # imported here, so the class is known by its name
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _contains(error, _OUT_OF_MEMORY_TEXTS)


def _contains(error: BaseException, texts: tuple[str, ...]) -> bool:
    """Return whether the message of an error that libraries raise contains one of the texts."""
    if not isinstance(error, RuntimeError | ValueError | OverflowError):
        return False
    message = str(error).lower()
    return any(text in message for text in texts)
