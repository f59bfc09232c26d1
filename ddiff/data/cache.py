"""Built things on disk, found again by the content that they were built from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddiff.atomic import PARTIAL, lock_file, partial_name
from ddiff.errors import DataError

FORMAT = 2  # raise it when the layout of any entry changes: every older entry is then built again
_CONTENTS = "entry.json"
_LOCK = ".lock"  # in an entry under way: held by the process that builds it
SMALL = 2**26  # bytes of a file that is hashed whenever its entry is looked up
_STALE = 24 * 3600.0  # seconds after which a build that has written nothing is held to be dead
_log = logging.getLogger(__name__)


def fingerprint(inputs: object) -> str:
    """32 hexadecimal digits of the SHA-256 of `inputs` as canonical JSON."""
    return hashlib.sha256(
        json.dumps(inputs, sort_keys=True, ensure_ascii=True).encode()
    ).hexdigest()[:32]


def default_root() -> Path:
    """$DDIFF_CACHE, else `ddiff` in the user's cache folder."""
    if os.environ.get("DDIFF_CACHE"):
        return Path(os.environ["DDIFF_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddiff"


class Cache:
    """A folder of entries, each a directory named by the fingerprint of what it was built from.

    Entries are memory-mapped, so the root is a local folder. An entry appears whole or not at all: it is built under
    another name and renamed. One that does not hold what its list of contents says is built again: the sizes of files are
    compared, and the SHA-256 of small ones and of those that were written to since. What killed processes left half built
    is removed by the next build of that kind.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        named = str(os.environ.get("DDIFF_CACHE", "") if root is None else root)
        if "://" in named:
            raise DataError(
                f"Cache: root must be a local folder, because its files are memory-mapped; got {named}. "
                "Set DDIFF_CACHE to a folder of this machine."
            )
        self.root = default_root() if root is None else Path(root)

    def load_or_build(
        self, kind: str, inputs: Mapping[str, Any], build: Callable[[Path], None]
    ) -> Path:
        """The directory that `build(directory)` filled for these inputs, now or in an earlier process.

        `inputs` are JSON values that determine the content: fingerprints and settings. DataError when the root cannot be
        written; whatever `build` raises leaves no entry behind.
        """
        identity = json.loads(json.dumps({"format": FORMAT, "kind": kind, "inputs": dict(inputs)}))
        place = self.root / kind / fingerprint(identity)
        if _is_whole(place, identity):
            return place
        partial = place.with_name(partial_name(place.name))
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(place.parent)
            partial.mkdir()
            lock = (partial / _LOCK).open("w")
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise not_writable(self.root, error) from error
        try:
            with lock:
                with suppress(OSError):  # a file system without locks
                    lock_file(lock)
                build(partial)
                (partial / _LOCK).unlink()
                _write_contents(partial, identity)
                _publish(partial, place, identity)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return place


def not_writable(root: Path, error: OSError) -> DataError:
    """The error of a cache folder that nothing can be written to."""
    return DataError(
        f"Cache: the folder {root} cannot be written ({error.strerror}). "
        "Set DDIFF_CACHE to a folder that can, or make room there."
    )


def _remove_abandoned(folder: Path) -> None:
    """Remove entries that no process builds any more."""
    for partial in folder.glob(f"*{PARTIAL}*"):
        with suppress(OSError):  # its own process, or another one that cleans up, was faster
            if _is_abandoned(partial):
                shutil.rmtree(partial, ignore_errors=True)


def _is_abandoned(partial: Path) -> bool:
    try:
        with (partial / _LOCK).open("r+") as lock:
            return lock_file(lock)
    except (
        OSError
    ):  # not locked yet, finished in this moment, or on a file system without locks: time tells
        written = max(file.stat().st_mtime for file in (partial, *partial.rglob("*")))
        return time.time() - written > _STALE


def _write_contents(directory: Path, identity: dict[str, Any]) -> None:
    files = {
        str(file.relative_to(directory)): [
            file.stat().st_size,
            file.stat().st_mtime_ns,
            _sha256(file),
        ]
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    (directory / _CONTENTS).write_text(json.dumps(identity | {"files": files}, indent=1))


def _is_whole(place: Path, identity: dict[str, Any]) -> bool:
    """Whether the entry is there with this identity and every file at its size; says so when it is there but is not."""
    if not place.exists():
        return False
    try:
        contents = json.loads((place / _CONTENTS).read_text())
        files = contents.pop("files")
        whole = contents == identity and all(
            _is_intact(place / name, *known) for name, known in files.items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        _log.warning(
            "The cache entry %s is truncated, damaged or is not ours; it is built again.", place
        )
    return whole


def _is_intact(file: Path, size: int, written: int, sha256: str) -> bool:
    """Whether a file is the one that was written. Large ones are read only where they were touched: a gigabyte takes
    seconds."""
    found = file.stat()
    if found.st_size != size:
        return False
    return (size > SMALL and found.st_mtime_ns == written) or _sha256(file) == sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(partial: Path, place: Path, identity: dict[str, Any]) -> None:
    """Give the finished directory its name; when another process was first, its equal entry is kept."""
    if place.exists() and not _is_whole(place, identity):
        damaged = place.with_name(partial_name(place.name))
        os.rename(place, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        os.rename(partial, place)
    except OSError:
        if not _is_whole(place, identity):
            raise
