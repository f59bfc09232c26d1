"""Built things on disk, found again by the content that they were built from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddiff.errors import DataError

FORMAT = 1  # raise it when the layout of any entry changes: every older entry is then built again
_CONTENTS = "entry.json"
_STALE = 24 * 3600.0  # seconds after which a build that has written nothing is held to be dead
_log = logging.getLogger(__name__)


def fingerprint(inputs: object) -> str:
    """32 hexadecimal digits of the SHA-256 of `inputs` as canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]


def default_root() -> Path:
    """$DDIFF_CACHE, else `ddiff` in the user's cache folder."""
    if os.environ.get("DDIFF_CACHE"):
        return Path(os.environ["DDIFF_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddiff"


class Cache:
    """A folder of entries, each a directory named by the fingerprint of what it was built from.

    Entries are memory-mapped, so the root is a local folder. An entry appears whole or not at all: it is built under
    another name and renamed. One that does not hold what its list of contents says is built again. What killed processes
    left half built is removed by a later build of that kind, a day after it was last written to.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        named = str(os.environ.get("DDIFF_CACHE", "") if root is None else root)
        if "://" in named:
            raise DataError(
                f"Cache: root must be a local folder, because its files are memory-mapped; got {named}. "
                "Set DDIFF_CACHE to a folder of this machine."
            )
        self.root = default_root() if root is None else Path(root)

    def entry(self, kind: str, inputs: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
        """The directory that `build(directory)` filled for these inputs, now or in an earlier process.

        `inputs` are JSON values that determine the content: fingerprints and settings. DataError when the root cannot be
        written; whatever `build` raises leaves no entry behind.
        """
        identity = json.loads(json.dumps({"format": FORMAT, "kind": kind, "inputs": dict(inputs)}))
        place = self.root / kind / fingerprint(identity)
        if _is_whole(place, identity):
            return place
        partial = place.with_name(f"{place.name}.partial-{uuid.uuid4().hex[:8]}")
        self._make(partial)
        _remove_abandoned(place.parent)
        try:
            build(partial)
            _write_contents(partial, identity)
            _publish(partial, place, identity)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return place

    def _make(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            raise DataError(
                f"Cache: the folder {self.root} cannot be written ({error.strerror}). "
                "Set DDIFF_CACHE to a folder that can, or make room there."
            ) from error


def _remove_abandoned(folder: Path) -> None:
    for partial in folder.glob("*.partial-*"):
        with suppress(OSError):  # its own process, or another one that cleans up, was faster
            written = max(file.stat().st_mtime for file in (partial, *partial.rglob("*")))
            if time.time() - written > _STALE:
                shutil.rmtree(partial, ignore_errors=True)


def _write_contents(directory: Path, identity: dict[str, Any]) -> None:
    sizes = {str(file.relative_to(directory)): file.stat().st_size for file in directory.rglob("*") if file.is_file()}
    (directory / _CONTENTS).write_text(json.dumps(identity | {"files": sizes}, indent=1))


def _is_whole(place: Path, identity: dict[str, Any]) -> bool:
    """Whether the entry is there with this identity and every file at its size; says so when it is there but is not."""
    if not place.exists():
        return False
    try:
        contents = json.loads((place / _CONTENTS).read_text())
        sizes = contents.pop("files")
        whole = contents == identity and all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        whole = False
    if not whole:
        _log.warning("The cache entry %s is truncated or is not ours; it is built again.", place)
    return whole


def _publish(partial: Path, place: Path, identity: dict[str, Any]) -> None:
    """Give the finished directory its name; when another process was first, its equal entry is kept."""
    if place.exists() and not _is_whole(place, identity):
        damaged = place.with_name(f"{partial.name}-damaged")
        os.rename(place, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        os.rename(partial, place)
    except OSError:
        if not _is_whole(place, identity):
            raise
