"""Exceptions for errors that a user can cause, and their explanation on the command line.

Each message names the argument, the expected value, the given value and the remedy. The command
line prints the message and exits with 2. Any other exception is a defect of ddiff or of a plugin,
and its traceback is printed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from difflib import get_close_matches

# ---------------------------------------------------------------------- exceptions


class DdiffError(Exception):
    """Base class of errors that the caller can fix."""


class ArgumentError(DdiffError, ValueError):
    """Invalid argument of a Python call: out of range, wrong shape, or conflicting arguments."""


class RecipeError(DdiffError):
    """Invalid recipe. The message begins with `file:line:`."""


class PluginError(DdiffError):
    """Error about a plugin or component that is unknown, registered twice, or fails to load."""


class DataError(DdiffError):
    """Error about a text, corpus, tokenizer or cluster file that cannot be used."""


class CheckpointError(DdiffError):
    """Error about a checkpoint or run directory: missing, damaged, or of another run."""


class NonFiniteError(DdiffError):
    """Error about a result that is NaN or infinite."""


# ---------------------------------------------------------------------- formatting of messages

LONGEST = 160  # characters of a value in a message; longer values are shortened


def shorten(text: str, longest: int = LONGEST) -> str:
    """Shorten a text of more than `longest` characters.

    The middle of the text is replaced by the number of characters that are left out.
    """
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} more characters) ... {text[-half:]}"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "x"?`, where x is the name in `known` that is most similar to `name`.

    Returns an empty string if no known name is similar.
    """
    if len(name) > LONGEST:
        return ""
    similar = get_close_matches(name, list(known), n=1)
    return f' Did you mean "{similar[0]}"?' if similar else ""


# ---------------------------------------------------------------------- full disks

DISK_FULL = (
    errno.ENOSPC,  # no space left
    errno.EDQUOT,  # no quota left
    errno.EFBIG,  # larger than a file may be
)
_DISK_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")


def find_disk_full(error: BaseException) -> OSError | None:
    """Search an exception and its causes for an error about a full disk or an exceeded quota.

    Returns None if there is no such error. The message texts are searched too, because some
    libraries raise errors without an error number.
    """
    current: BaseException | None = error
    while current is not None:
        number = current.errno if isinstance(current, OSError) else None
        if isinstance(current, OSError) and number in DISK_FULL:
            return OSError(number, os.strerror(number), current.filename)
        for text in _DISK_FULL_TEXTS:
            if text.lower() in str(current).lower():
                return OSError(errno.ENOSPC, text)
        # the error of numpy's tofile has no number and only says how many items were written
        is_short_write = isinstance(current, OSError) and str(current).endswith(" written")
        if is_short_write and number is None:
            return OSError(errno.ENOSPC, "No space left on device")
        current = current.__cause__ or current.__context__
    return None


# ---------------------------------------------------------------------- paragraphs for the user

TRACEBACK = "DDIFF_TRACEBACK"
"""Name of the environment variable that adds the traceback to the message of a user's error."""

REPORT = (
    "This is a defect of ddiff or of a plugin, not an error in your input. Please report it with "
    "the command, the recipe and the lines above."
)

_REMEDIES = {
    errno.EACCES: "Change its permissions, or use another path.",
    errno.EPERM: "Change its permissions, or use another path.",
    errno.EROFS: "Use a path on a writable file system.",
    errno.EISDIR: "This path must be a file, not a folder.",
    errno.ENOTDIR: "Every part of this path before the last must be a folder.",
    errno.ENOENT: "Check the path. Relative paths start in the working directory.",
    errno.ENAMETOOLONG: "Shorten the name.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 4096.",
    errno.ENFILE: "The machine has too many open files. Stop other programs first.",
    errno.ELOOP: "The symbolic links of this path form a cycle. Fix the links.",
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


def end_sentence(text: str) -> str:
    """Add a full stop to a text without an end mark, such as the message of another library."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def explain_error(error: BaseException) -> str | None:
    """Return one paragraph that explains an error of the user, or None for any other error.

    Errors that are not explained are defects of ddiff or of a plugin.
    """
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
            f"A file or the standard input ended too early ({text or 'unexpected end of file'}). "
            "Check that the file is complete."
        )
    if isinstance(error, RecursionError):
        return "A value in the input is nested too deeply. Use fewer levels of tables and lists."
    if isinstance(error, UnicodeError):
        return (
            f"A text is not in the expected encoding: {text}. Save the text as UTF-8, and set "
            "PYTHONIOENCODING=utf-8."
        )
    if is_out_of_memory(error):
        return (
            f"Out of memory: {text or 'an allocation failed'}. Use a smaller batch ([train] batch, "
            "[evaluate] batch, [sample] batch), a shorter [data] length or a smaller network."
        )
    if isinstance(error, OverflowError) or _contains(error, _OVERFLOW_TEXTS):
        return (
            f"A number is too large for the computation: {text}. Check the sizes, counts and "
            "rates in the recipe and in the command."
        )
    if isinstance(error, RuntimeError) and _contains(error, _NO_THREADS_TEXTS):
        return (
            "The system cannot start another thread. Lower [backend] workers and OMP_NUM_THREADS, "
            "or raise ulimit -u."
        )
    return None


def _explain_os_error(error: OSError) -> str:
    reason = error.strerror or shorten(" ".join(str(error).split())) or type(error).__name__
    names = [name for name in (error.filename, error.filename2) if name is not None]
    places = " and ".join(shorten(str(name)) for name in names)
    what = f"{reason}: {places}" if places else reason
    if error.errno in DISK_FULL:
        return (
            f"{what}. The file being written is lost; existing files are intact. Free disk space, "
            "or use another folder, and repeat the command. A run resumes from its last "
            "checkpoint."
        )
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{what.rstrip('.')}. {remedy}".rstrip()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that memory of the host or of a device is exhausted."""
    # torch raises a plain RuntimeError on the CPU and OutOfMemoryError on a GPU; torch is not
    # imported here, so the class is known by its name
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _contains(error, _OUT_OF_MEMORY_TEXTS)


def _contains(error: BaseException, texts: tuple[str, ...]) -> bool:
    """Return whether the message of an error contains one of the lower-case texts.

    Upper case in the message is ignored. The result is False for errors of other classes than
    RuntimeError, ValueError and OverflowError, which libraries raise.
    """
    if not isinstance(error, RuntimeError | ValueError | OverflowError):
        return False
    message = str(error).lower()
    return any(text in message for text in texts)
