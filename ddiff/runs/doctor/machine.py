"""Checks of `ddiff doctor` of the machine: cores, memory, folders, caches and variables."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ddiff.data.cache import default_root
from ddiff.runs.doctor.findings import Finding, State, format_bytes

LITTLE_MEMORY = 2e9  # bytes; a small run needs about one gigabyte
LITTLE_SPACE = 1e9  # bytes; a checkpoint of a small run has about ten megabytes
SECONDS = 5.0  # time limit of measuring a cache, which may have millions of files
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
MEANS_UNSET = ("", "0", "false", "no", "off")  # such a value of a variable permits downloads


def check_memory() -> Iterator[Finding]:
    """Compare the available memory with that of a small run."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    available = _read_meminfo().get("MemAvailable", total)
    limit = _read_limit()
    room = available if limit is None else min(available, limit)
    meaning = f"{format_bytes(available)} of {format_bytes(total)} available"
    if limit is not None and limit < total:
        meaning += f"; the container may use {format_bytes(limit)}"
    if room < LITTLE_MEMORY:
        yield Finding(
            "memory",
            "note",
            f"{meaning}, which is little",
            "Stop other programs, or use a small recipe; `ddiff run RECIPE --dry-run` prints the "
            "memory that a recipe needs.",
        )
        return
    yield Finding("memory", "ok", meaning)


def _read_meminfo() -> dict[str, float]:
    """Return the values of /proc/meminfo in bytes; empty on other systems than Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = 1024.0 * float(value.split()[0])
    return found


def _read_limit() -> float | None:
    """Return the memory limit of the container, or None if there is none."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no container, or "max"
        return None


def check_folders() -> Iterator[Finding]:
    """Check that the folders of runs and of temporary files are writable and have space."""
    yield _check_folder("run directories", Path("runs"), "Use another one: --set run_dir=DIR.")
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        yield Finding(
            "temporary files", "problem", str(error), "Set TMPDIR to a writable folder with space."
        )
        return
    yield _check_folder("temporary files", temporary, "Set TMPDIR to another folder.")


def check_caches() -> Iterator[Finding]:
    """Check the caches of ddiff and of the Hugging Face libraries, and their sizes."""
    own = default_root()
    yield _check_folder("cache of ddiff", own, "Set DDIFF_CACHE to another folder.", measured=True)
    home = Path(os.environ.get("HF_HOME") or _user_cache() / "huggingface").expanduser()
    for name, variable, folder in (
        ("cache of models", "HF_HUB_CACHE", home / "hub"),
        ("cache of data sets", "HF_DATASETS_CACHE", home / "datasets"),
    ):
        place = Path(os.environ.get(variable) or folder).expanduser()
        remedy = f"Set {variable} to another folder; needed only for downloads from the hub."
        yield _check_folder(name, place, remedy, failure="note", measured=True)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _check_folder(
    name: str, folder: Path, remedy: str, failure: State = "problem", measured: bool = False
) -> Finding:
    """Check that a folder can be written, or created, and that its disk has space.

    Args:
        remedy: remedy if the folder is not usable.
        failure: state of the finding if the folder is not writable.
        measured: whether the size of the folder is part of the finding.
    """
    place = folder.absolute()
    try:
        existing = next(path for path in (place, *place.parents) if os.path.lexists(path))
        with tempfile.TemporaryDirectory(prefix=".ddiff-", dir=existing):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Finding(name, failure, f"{place} is not writable: {error.strerror}", remedy)
    meaning = f"{place}: {format_bytes(free)} free"
    if measured:
        meaning += f", {_describe_size(place)}"
    if free < LITTLE_SPACE:
        return Finding(name, "note", f"{meaning}, which is little", f"Free disk space. {remedy}")
    return Finding(name, "ok", meaning)


def _describe_size(folder: Path) -> str:
    """Return the size of a folder as text; a lower limit if its files are many."""
    deadline = time.monotonic() + SECONDS
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                # links are not followed: the hub has one file and several links to it
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # removed meanwhile
                continue
        if time.monotonic() > deadline:
            return f"more than {format_bytes(total)} used"
    return f"{format_bytes(total)} used"


def check_variables() -> Iterator[Finding]:
    """Report the variables that forbid downloads."""
    names = [name for name in OFFLINE if os.environ.get(name, "").lower() not in MEANS_UNSET]
    if not names:
        yield Finding("downloads", "ok", "no variable forbids downloads from the hub")
        return
    yield Finding(
        "downloads",
        "note",
        f"{', '.join(names)} set: models and data sets of the hub are read from the caches only",
        f"To download, unset the variables: unset {' '.join(names)}.",
    )
