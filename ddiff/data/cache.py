"""Disk cache of built files, addressed by a fingerprint of the inputs."""

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
SMALL = 2**26  # bytes; files up to this size are hashed whenever their entry is looked up
_CONTENTS = "entry.json"
_LOCK = ".lock"  # lock file, locked by the process that builds an entry
_STALE = 24 * 3600.0  # seconds without a write after which an unlocked build counts as dead
_log = logging.getLogger(__name__)


def fingerprint(inputs: object) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of `inputs`, encoded as canonical JSON."""
    canonical = json.dumps(inputs, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def default_root() -> Path:
    """Return $DDIFF_CACHE, or `ddiff` in the user's cache folder if the variable is not set."""
    if os.environ.get("DDIFF_CACHE"):
        return Path(os.environ["DDIFF_CACHE"]).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "ddiff"


class Cache:
    """Cache folder; each entry is a directory named by the fingerprint of its inputs.

    The root is a local folder, because entries are memory-mapped. Each entry is built under a
    temporary name and then renamed, so that an incomplete entry is never read. The next build of
    the same kind of entry removes the unfinished directories of killed processes.

    A damaged entry is built again. To detect damage, the size of every file is compared with the
    size at the build. The SHA-256 is compared only for small files and for large files that were
    modified after the build.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        requested = str(os.environ.get("DDIFF_CACHE", "") if root is None else root)
        if "://" in requested:
            raise DataError(
                "Cache: root must be a local folder, because its files are memory-mapped; got "
                f"{requested}. Set DDIFF_CACHE to a folder of this machine."
            )
        self.root = default_root() if root is None else Path(root)

    def load_or_build(
        self, kind: str, inputs: Mapping[str, Any], build: Callable[[Path], None]
    ) -> Path:
        """Return the cached directory for `inputs`, and build the directory if it is missing.

        Args:
            kind: kind of the entry, such as "json_lines"; the name of a sub-folder of the cache.
            inputs: JSON values that determine the content, such as fingerprints and settings.
            build: function (directory) that writes the files of a new entry. If `build` raises an
                error, the entry is removed.

        Raises DataError if the cache root cannot be written.
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
            raise not_writable_error(self.root, error) from error
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


def not_writable_error(root: Path, error: OSError) -> DataError:
    """Return the DataError for a cache folder `root` that cannot be written."""
    return DataError(
        f"Cache: the folder {root} cannot be written ({error.strerror}). "
        "Set DDIFF_CACHE to a writable folder, or free space in this folder."
    )


def _remove_abandoned(folder: Path) -> None:
    """Remove the unfinished entries in `folder` whose processes have ended."""
    for partial in folder.glob(f"*{PARTIAL}*"):
        # The building process, or another process that cleans up, may remove the entry first.
        with suppress(OSError):
            if _is_abandoned(partial):
                shutil.rmtree(partial, ignore_errors=True)


def _is_abandoned(partial: Path) -> bool:
    try:
        with (partial / _LOCK).open("r+") as lock:
            return lock_file(lock)
    except OSError:
        # The entry may not be locked yet, may have been finished just now, or may be on a file
        # system without locks. Only the time of the last write shows whether the build still runs.
        newest = max(file.stat().st_mtime for file in (partial, *partial.rglob("*")))
        return time.time() - newest > _STALE


def _write_contents(directory: Path, identity: dict[str, Any]) -> None:
    files = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            about = file.stat()
            name = str(file.relative_to(directory))
            files[name] = [about.st_size, about.st_mtime_ns, _sha256(file)]
    contents = identity | {"files": files}
    (directory / _CONTENTS).write_text(json.dumps(contents, indent=1))


def _is_whole(place: Path, identity: dict[str, Any]) -> bool:
    """Return whether the entry at `place` exists and is intact.

    `identity` (format, kind and inputs) must equal the identity that the entry has stored. A
    warning is logged for a damaged entry.
    """
    if not place.exists():
        return False
    try:
        contents = json.loads((place / _CONTENTS).read_text())
        files = contents.pop("files")
        is_whole = contents == identity and all(
            _is_intact(place / name, *expected) for name, expected in files.items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        is_whole = False
    if not is_whole:
        _log.warning(
            "The cache entry %s is damaged or was not written by ddiff. It is built again.", place
        )
    return is_whole


def _is_intact(file: Path, size: int, modified_ns: int, sha256: str) -> bool:
    """Return whether a file still has the recorded size and SHA-256.

    The SHA-256 of a large file is not computed if its modification time is still `modified_ns`.
    """
    about = file.stat()
    if about.st_size != size:
        return False
    # Hashing takes seconds per gigabyte, so a large file is hashed only if it was modified.
    if size > SMALL and about.st_mtime_ns == modified_ns:
        return True
    return _sha256(file) == sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(partial: Path, place: Path, identity: dict[str, Any]) -> None:
    """Rename the finished directory `partial` to `place`.

    If another process has built the same cache entry in the meantime, that entry is kept.
    A damaged entry at `place` is replaced. `identity`: format, kind and inputs of the entry.
    """
    if place.exists() and not _is_whole(place, identity):
        damaged = place.with_name(partial_name(place.name))
        os.rename(place, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        os.rename(partial, place)
    except OSError:
        if not _is_whole(place, identity):
            raise
