"""Exceptions of Python and its libraries in words: what a user or a machine can cause and no room has explained.

The command line asks `explained` about whatever reaches it. Each room should raise a `DdiffError` that names the argument;
this is the last resort, so that no mistake ends as a bare traceback.
"""

from __future__ import annotations

import errno

from ddiff.errors import FULL, DdiffError, no_room, shortened

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
